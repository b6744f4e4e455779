"""What has happened in a soak: a file in its folder, so that another process continues it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "state.json"
PARTITIONS = 4


@dataclass
class Kill:
    """A SIGKILL: the victim, when, and the seconds until it was up and clicks were applied again."""

    victim: str
    at_s: float
    recovered_s: float | None = None


@dataclass
class State:
    """What a soak should do, and has done. Times count the seconds in which it ran."""

    seed: int
    events: int
    kills: int
    rate: float
    kill_every_s: float
    users: int
    begin_ms: int  # the time of the first click
    run_s: float = 0.0
    runs: int = 0
    primary: int = 0  # number of the Redis server that has every acknowledged write
    produced: int = 0
    transactions: int = 0
    killed: list[Kill] = field(default_factory=list)
    rebalances: list[float] = field(default_factory=list)
    swaps: list[float] = field(default_factory=list)
    # time, records acknowledged, records behind; None while the broker does not answer
    samples: list[tuple[float, int, int | None]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # a process that ended by itself, a traceback

    def __post_init__(self) -> None:
        self._started = time.monotonic() - self.run_s

    @property
    def now_s(self) -> float:
        return round(time.monotonic() - self._started, 2)

    @property
    def enough(self) -> bool:
        """Whether there were as many events and kills as wanted."""
        return self.produced >= self.events and len(self.killed) >= self.kills

    def save(self, folder: Path) -> None:
        self.run_s = self.now_s
        made = folder / f"{FILE}.new"
        made.write_text(json.dumps(asdict(self)))
        made.replace(folder / FILE)


def load(folder: Path) -> State | None:
    """Return the state of an earlier run; None if there was none."""
    path = folder / FILE
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    found["killed"] = [Kill(**kill) for kill in found["killed"]]
    return State(**found)
