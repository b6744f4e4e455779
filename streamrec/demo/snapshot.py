"""The state of the demo at one moment, as screen and summary show it."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamrec.demo.hits import HitRates
from streamrec.demo.retrain import Round

MAX_HIT_RATES = 26  # points of the hit rate over time


@dataclass
class Swap:
    """The replacement of the model by a new one while clicks came."""

    after_clicks: int
    old_version: str
    version: str
    before: HitRates
    first_point: int  # the new model's first point of the hit rate over time
    after: HitRates | None = None  # None until a click came
    old_model_after: float | None = None  # the hit rate that the old model would have had after the swap
    p99_ms: dict[str, float | None] = field(default_factory=dict)  # click to list, by phase


@dataclass
class Snapshot:
    """The state of the demo. Latencies are None until one is measured."""

    total: int
    sent: int = 0
    applied: int = 0
    seconds: float = 0.0
    events_per_s: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    lag_records: int = 0
    hit_rate: float = 0.0
    popularity_hit_rate: float = 0.0
    dead_letters: int = 0
    hit_rates_over_time: list[float] = field(default_factory=list)  # each over the same number of clicks
    retraining_s: float | None = None  # since the start of the retraining, while it runs
    round: Round | None = None
    swap: Swap | None = None
    user_id: str = ""
    clicks: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    listed_ago_s: float = 0.0
    listed_after: int = 0
