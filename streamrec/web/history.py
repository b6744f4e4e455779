"""The daemon's counters over time, in bounded memory, so that a live page opened late shows the past too.

Every ``TICK_S`` the counters of Metrics are read, and whoever follows is told; every second tick makes a point.
Nothing is counted here, and the path of a click knows nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from streamrec.health import Health
from streamrec.metrics import Metrics, quantile
from streamrec.schemas import DeadLetter
from streamrec.serving.lists import POPULAR

TICK_S = 0.5
TICKS_A_POINT = 2
POINTS = 3_600  # an hour of them
RATE_TICKS = 4  # a rate is that of the last two seconds
WINDOW_TICKS = 120  # latencies, cache and hit rate are those of the last minute, if it had clicks
KEPT_SWAPS, KEPT_DEAD_LETTERS = 100, 50

Hits = tuple[int, int, int]  # clicks judged, hits, hits of the popular list on the same clicks


class Point(msgspec.Struct, array_like=True, frozen=True):
    """A second of the past. ``models`` are the clicks of that second by the version that made their lists."""

    at_ms: int
    events_per_s: float
    lag_records: int
    p50_ms: float | None
    p99_ms: float | None
    models: dict[str, Hits]


class SwapMark(msgspec.Struct, frozen=True):
    """A model took another one's place."""

    at_ms: int
    before: str
    after: str


class SeenDeadLetter(msgspec.Struct, frozen=True):
    """A record that was no click event; its bytes stay in the dead-letter topic."""

    at_ms: int
    partition: int
    offset: int
    reason: str


class Now(msgspec.Struct, frozen=True):
    """What is shown of this moment. ``latency`` counts the clicks up to each bound and above the one before.

    From ``latency`` on it is of the last minute; ``whole``: of all the time, since that minute had no click.
    """

    at_ms: int
    version: str
    not_ready: str | None
    events: int
    events_per_s: float
    lag_records: int
    lag_s: float
    whole: bool
    latency: list[tuple[float | None, int]]  # the last bound, None, is infinite
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    judged: int
    hits: int
    popularity_hits: int
    cache_hits: int
    cache_misses: int
    cached_users: int
    dead_letters: int


@dataclass(frozen=True, slots=True)
class _Reading:
    """The counters at one tick."""

    at_s: float
    events: int
    latency: list[tuple[float, float]]  # cumulative
    models: dict[str, Hits]
    cache_hits: int
    cache_misses: int


class History:
    """Points, swaps and dead letters of the last hour, and the present.

    Args:
        now_s: Unix time.
    """

    def __init__(self, metrics: Metrics, health: Health, now_s: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._health = health
        self._now_s = now_s
        self._readings: deque[_Reading] = deque(maxlen=WINDOW_TICKS + 1)
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._made = 0  # points ever made
        self._ticks = 0
        self._version = ""
        self.swaps: deque[SwapMark] = deque(maxlen=KEPT_SWAPS)
        self.dead_letters: deque[SeenDeadLetter] = deque(maxlen=KEPT_DEAD_LETTERS)  # the latest last
        self._next = asyncio.Event()
        self._start = self._last_point = self._read()
        self._readings.append(self._start)

    async def run(self) -> None:
        """Follow the counters until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Read the counters, and tell who waits for it."""
        self._readings.append(self._read())
        self._see_version()
        self._ticks += 1
        if self._ticks % TICKS_A_POINT == 0:
            self._points.append(self._point(self._last_point, self._readings[-1]))
            self._last_point = self._readings[-1]
            self._made += 1
        self.wake()

    def wake(self) -> None:
        """Let who waits for a tick go on."""
        waiting, self._next = self._next, asyncio.Event()
        waiting.set()

    async def ticked(self) -> None:
        """Until the next tick."""
        await self._next.wait()

    def dead_letter(self, letter: DeadLetter) -> None:
        """Note a dead letter that the broker has acknowledged."""
        self.dead_letters.append(
            SeenDeadLetter(int(self._now_s() * 1000), letter.partition, letter.offset, letter.reason[:500])
        )

    def points_since(self, number: int) -> tuple[list[Point], int]:
        """The points after so many, as far as they are kept, and how many there have been by now."""
        new = min(self._made - number, len(self._points))
        return list(islice(self._points, len(self._points) - new, None)), self._made

    def now(self) -> Now:
        """The present."""
        last, first = self._readings[-1], self._readings[0]
        if whole := last.events == first.events:
            first = self._start
        before = self._readings[max(0, len(self._readings) - 1 - RATE_TICKS)]
        latency = _since(first.latency, last.latency)
        judged, hits, popularity_hits = (
            sum(column) for column in zip((0, 0, 0), *_hits_since(first, last).values(), strict=True)
        )
        p50_ms, p95_ms, p99_ms = (_quantile_ms(latency, q) for q in (0.5, 0.95, 0.99))
        bounds = [None if bound == float("inf") else bound for bound, _ in latency]
        counts = [int(count - below) for (_, count), (_, below) in zip(latency, [(0, 0), *latency], strict=False)]
        metrics = self._metrics
        return Now(
            int(last.at_s * 1000),
            self._version,
            self._health.not_ready(),
            last.events,
            _rate(before, last),
            int(sum(_values(metrics.lag_records).values())),
            max(_values(metrics.lag_seconds).values(), default=0.0),
            whole,
            list(zip(bounds, counts, strict=True)),
            p50_ms,
            p95_ms,
            p99_ms,
            judged,
            hits,
            popularity_hits,
            last.cache_hits - first.cache_hits,
            last.cache_misses - first.cache_misses,
            int(_value(metrics.cached_users)),
            int(_value(metrics.dead_letters)),
        )

    def _point(self, before: _Reading, last: _Reading) -> Point:
        latency = _since(before.latency, last.latency)
        return Point(
            int(last.at_s * 1000),
            _rate(before, last),
            int(sum(_values(self._metrics.lag_records).values())),
            _quantile_ms(latency, 0.5),
            _quantile_ms(latency, 0.99),
            _hits_since(before, last),
        )

    def _read(self) -> _Reading:
        metrics = self._metrics
        counters = (metrics.judged, metrics.hits, metrics.popularity_hits)
        judged, hits, popularity_hits = (_values(counter) for counter in counters)
        models = {
            version: (int(clicks), int(hits.get(version, 0)), int(popularity_hits.get(version, 0)))
            for version, clicks in judged.items()
            if version != POPULAR  # clicks on that list compare nothing with it
        }
        return _Reading(
            self._now_s(),
            int(_values(metrics.events)["applied"]),
            _cumulative(metrics.click_to_published),
            models,
            int(_value(metrics.cache_hits)),
            int(_value(metrics.cache_misses)),
        )

    def _see_version(self) -> None:
        version = next(iter(_values(self._metrics.model)), "")
        if not version or version == self._version:  # while a swap goes on there may be none
            return
        if self._version:
            self.swaps.append(SwapMark(int(self._now_s() * 1000), self._version, version))
        self._version = version


def _rate(before: _Reading, last: _Reading) -> float:
    return round((last.events - before.events) / max(last.at_s - before.at_s, 1e-3), 1)


def _hits_since(before: _Reading, last: _Reading) -> dict[str, Hits]:
    """The clicks judged between two readings, by version; versions that had none are left out."""
    found = {}
    for version, (judged, hits, popularity_hits) in last.models.items():
        then = before.models.get(version, (0, 0, 0))
        if judged > then[0]:
            found[version] = (judged - then[0], hits - then[1], popularity_hits - then[2])
    return found


def _since(before: list[tuple[float, float]], last: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(bound, count - then) for (bound, count), (_, then) in zip(last, before, strict=True)]


def _quantile_ms(cumulative: list[tuple[float, float]], q: float) -> float | None:
    found = quantile(cumulative, q)
    return None if found is None else round(found * 1000, 2)


def _values(metric: Counter | Gauge) -> dict[str, float]:
    """Value by the metric's one label."""
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in metric.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def _value(metric: Counter | Gauge) -> float:
    return _values(metric).get("", 0.0)


def _cumulative(histogram: Histogram) -> list[tuple[float, float]]:
    """(upper bound in seconds, observations up to it), the last bound infinite."""
    return [
        (float(sample.labels["le"]), sample.value)
        for family in histogram.collect()
        for sample in family.samples
        if sample.name.endswith("_bucket")
    ]
