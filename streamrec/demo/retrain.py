"""The demo's retraining: what it begins with, the process that does it beside the daemon, and what it came to.

`streamrec retrain --once` runs in a process of its own, behind the daemon in priority. It reads the live clicks
so far from the topic, as a team's own retraining would.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from sasrec import Engine, Event, Interactions, load_model
from streamrec.archive.segments import EventArchive
from streamrec.local.daemon import EMBEDDED, environment
from streamrec.local.servers import die_with_parent
from streamrec.metrics import quantile
from streamrec.registry import Registry
from streamrec.settings import Settings

K = 10
NICENESS = 5  # the daemon goes first
AROUND_S = 1.0  # before and after the moment of the swap
LOG_SHOWN_CHARS = 2_000
RANKED_AT_ONCE = 256


@dataclass(frozen=True)
class Round:
    """What a round of retraining came to. Without a version there was nothing to judge, and ``reason`` says why."""

    promoted: bool
    reason: str
    version: str = ""
    train_s: float = 0.0
    ndcg: float = math.nan
    champion_ndcg: float = math.nan


@dataclass(frozen=True)
class HitRates:
    """Shares of the same clicks that were in the first 10 published, or popular, just before."""

    clicks: int
    model: float
    popularity: float


@dataclass
class Swap:
    """A new model in the place of the old one while clicks went on; latencies are click to list, p99."""

    after_clicks: int
    old_version: str
    version: str
    before: HitRates
    spark: int  # the first point of the hit rate over time that is the new model's
    after: HitRates | None = None  # None until a click came
    old_model_after: float | None = None  # its hit rate on the clicks after the swap, had it made their lists
    p99_ms: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """A click, and the events that its list had been made from: none of a popular list."""

    history: list[str]
    item_id: str
    hit: bool


def prepare(settings: Settings, model_dir: Path, past: Interactions) -> None:
    """Make the model the champion of the registry, and the past clicks the beginning of the archive."""
    assert settings.registry.dir is not None and settings.archive.dir is not None
    saved, registry = load_model(model_dir), Registry(settings.registry.dir)
    registry.promote(registry.publish(saved.model, saved.vocab, saved.metadata), "trained on the past")
    rows = zip(past.user_ids, past.item_ids, past.timestamps_ms.tolist(), strict=True)
    EventArchive(settings.archive.dir).import_events(Event(*row) for row in rows)


def hit_rate_of(settings: Settings, version: str, clicks: list[Judged]) -> float:
    """The hit rate of another model, had it made the lists of these clicks, from the same events.

    Tastes drift: clicks before and after a swap compare two models less well than the same clicks do.
    """
    assert settings.registry.dir is not None
    saved = Registry(settings.registry.dir).load(version)
    engine = Engine(saved.model, saved.vocab, cache_bytes=0, index="exact")
    hits = 0
    for start in range(0, len(clicks), RANKED_AT_ONCE):
        part = clicks[start : start + RANKED_AT_ONCE]
        rankings = engine.recommend([click.history for click in part], K, filter_seen=settings.lists.filter_seen)
        for click, ranking in zip(part, rankings, strict=True):
            hits += click.item_id in ranking.items if ranking else click.hit
    return hits / len(clicks)


class Retraining:
    """One round, in a child process that ends with this object.

    Args:
        folder: where its output may lie.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._output, self._log = folder / "retrain.json", folder / "retrain.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._round: Round | None = None
        self.began_s = self.ended_s = math.inf  # time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill()  # it keeps nothing that is worth a goodbye
            self._process.wait()
        elif self._process.returncode and not self._complaint().startswith("streamrec: "):
            sys.stderr.write(self._log.read_text(errors="replace")[-LOG_SHOWN_CHARS:])

    def start(self) -> None:
        """Begin the round."""
        with self._output.open("wb") as output, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *EMBEDDED, "retrain", "--once", "--json"],
                env=environment(self._settings) | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
                preexec_fn=_stand_back,
            )
        self.began_s = time.monotonic()

    @property
    def runs(self) -> bool:
        """Whether it has begun and not ended."""
        return self.began_s < math.inf and self.ended() is None

    def ended(self) -> Round | None:
        """What came of it, once it has ended."""
        if self._round is None and self._process is not None and self._process.poll() is not None:
            self._round, self.ended_s = self._read(self._process.returncode), time.monotonic()
        return self._round

    def _read(self, status: int) -> Round:
        if status:
            return Round(False, self._complaint().removeprefix("streamrec: ") or f"it ended with status {status}")
        assert self._settings.registry.dir is not None
        told = json.loads(self._output.read_text())
        made = {version.version: version.metadata for version in Registry(self._settings.registry.dir).versions()}
        return Round(
            told["promoted"],
            told["reason"],
            told["version"],
            made[told["version"]]["train_s"],
            told["challenger"]["ndcg@10"],
            told["champion"]["ndcg@10"],
        )

    def _complaint(self) -> str:
        """The last line of its log: of a mistake, or of a traceback, that is what went wrong."""
        return self._log.read_text(errors="replace").strip().rpartition("\n")[2]


class Latencies:
    """Histograms of click to list as they were scraped, so that one time can be told from another."""

    def __init__(self) -> None:
        self._at_s: list[float] = []
        self._scraped: list[list[tuple[float, float]]] = []

    def add(self, at_s: float, cumulative: list[tuple[float, float]]) -> None:
        """Keep a scrape: (upper bound, observations up to it), by bound."""
        self._at_s.append(at_s)
        self._scraped.append(cumulative)

    def p99_ms(self, from_s: float, until_s: float) -> float | None:
        """Of the clicks between two moments, rounded outward to scrapes; None where there were none."""
        if not self._scraped:
            return None
        first = bisect.bisect_right(self._at_s, from_s) - 1
        last = min(bisect.bisect_left(self._at_s, until_s), len(self._at_s) - 1)
        before = self._scraped[first] if first >= 0 else [(bound, 0.0) for bound, _ in self._scraped[last]]
        p99 = quantile([(b, n - m) for (b, n), (_, m) in zip(self._scraped[last], before, strict=True)], 0.99)
        return None if p99 is None else p99 * 1000


def _stand_back() -> None:
    """In the child, before it becomes another program."""
    os.nice(NICENESS)
    if sys.platform == "linux":
        die_with_parent()
