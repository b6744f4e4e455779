"""The recent past of a daemon for its live page, in bounded memory.

Every ``TICK_S`` the counters of Metrics are read, and the open pages are notified; every second tick makes a point.
The code that serves clicks does not know this module; only dead letters are reported to it, each as it is
acknowledged.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import msgspec

from streamrec.health import Health
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter
from streamrec.web.readings import Hits, Reading, events_per_s, hits_between, latency_between, quantile_ms, read

TICK_S = 0.5
TICKS_PER_POINT = 2
MAX_POINTS = 3_600  # an hour
RATE_TICKS = 4  # events per second are measured over the last two seconds
WINDOW_TICKS = 120  # latencies, cache and hit rate are measured over the last minute, if it had clicks
MAX_SWAPS, MAX_DEAD_LETTERS = 100, 50
MAX_REASON_CHARS = 500


class Point(msgspec.Struct, array_like=True, frozen=True):
    """One second. ``models``: the judged clicks of that second, by the version that made their lists."""

    at_ms: int
    events_per_s: float
    lag_records: int
    p50_ms: float | None
    p99_ms: float | None
    models: dict[str, Hits]


class SwapMark(msgspec.Struct, frozen=True):
    """The replacement of one model version by another."""

    at_ms: int
    before: str
    after: str


class DeadLetterRow(msgspec.Struct, frozen=True):
    """A record that is no click event; its bytes are in the dead-letter topic alone."""

    at_ms: int
    partition: int
    offset: int
    reason: str


class Now(msgspec.Struct, frozen=True):
    """The present.

    ``latency``: clicks up to each bound in seconds and above the bound before; the last bound, None, is infinite.
    The fields from ``latency`` to ``cache_misses`` cover the last minute or, ``since_start``, the whole life of the
    daemon if that minute had no click.
    """

    at_ms: int
    version: str
    on_hold: bool
    not_ready: str | None
    events: int
    events_per_s: float
    lag_records: int
    lag_s: float
    since_start: bool
    latency: list[tuple[float | None, int]]
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


class Update(msgspec.Struct, frozen=True):
    """What a page has not received yet, all of one moment.

    ``dead_letters``: the newest ones, newest first; None if there is none that the page has not received.
    """

    now: Now
    points: list[Point]
    swaps: list[SwapMark]
    dead_letters: list[DeadLetterRow] | None


@dataclass(slots=True)
class Received:
    """How many points and dead letters a page has received; None until the first update."""

    points: int = 0
    dead_letters: int | None = None


class History:
    """Points, model swaps and dead letters of the last hour, and the present.

    Args:
        now_s: returns the Unix time.
    """

    def __init__(self, metrics: Metrics, health: Health, now_s: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._health = health
        self._now_s = now_s
        self._readings: deque[Reading] = deque(maxlen=WINDOW_TICKS + 1)
        self._points: deque[Point] = deque(maxlen=MAX_POINTS)
        self._points_made = 0
        self._ticks = 0
        self._version = ""
        self._swaps: deque[SwapMark] = deque(maxlen=MAX_SWAPS)
        self._dead_letters: deque[DeadLetterRow] = deque(maxlen=MAX_DEAD_LETTERS)  # oldest first
        self._dead_letters_noted = 0
        self._next_tick = asyncio.Event()
        self._start = self._last_point = read(metrics, now_s())
        self._readings.append(self._start)

    async def run(self) -> None:
        """Wait, then read the counters."""
        await asyncio.sleep(TICK_S)
        self.tick()

    def tick(self) -> None:
        """Read the counters, and notify the open pages."""
        self._readings.append(read(self._metrics, self._now_s()))
        self._note_version()
        self._ticks += 1
        if self._ticks % TICKS_PER_POINT == 0:
            self._points.append(_point(self._last_point, self._readings[-1]))
            self._last_point = self._readings[-1]
            self._points_made += 1
        self.notify()

    def notify(self) -> None:
        """Wake everything that waits for a tick."""
        waiting, self._next_tick = self._next_tick, asyncio.Event()
        waiting.set()

    async def wait_tick(self) -> None:
        """Wait until the next tick."""
        await self._next_tick.wait()

    def dead_letter(self, letter: DeadLetter) -> None:
        """Note a dead letter that the broker has acknowledged.

        The page shows the number of noted letters, not the metric, so that number and list always agree.
        """
        at_ms = int(self._now_s() * 1000)
        reason = letter.reason[:MAX_REASON_CHARS]
        self._dead_letters.append(DeadLetterRow(at_ms, letter.partition, letter.offset, reason))
        self._dead_letters_noted += 1

    def swaps(self) -> list[SwapMark]:
        """Return the last swaps, oldest first."""
        return list(self._swaps)

    def dead_letters(self) -> list[DeadLetterRow]:
        """Return the last dead letters, newest first."""
        return list(reversed(self._dead_letters))

    def points_since(self, number: int) -> tuple[list[Point], int]:
        """Return the stored points after the first ``number``, and the number of points made so far."""
        new = min(self._points_made - number, len(self._points))
        return list(islice(self._points, len(self._points) - new, None)), self._points_made

    def update(self, received: Received) -> Update:
        """Return what a page has not received yet, and add it to ``received``."""
        points, received.points = self.points_since(received.points)
        changed, received.dead_letters = received.dead_letters != self._dead_letters_noted, self._dead_letters_noted
        return Update(self.now(), points, self.swaps(), self.dead_letters() if changed else None)

    def now(self) -> Now:
        """Return the present: the last reading, and its difference to a minute before."""
        last, first = self._readings[-1], self._readings[0]
        if since_start := last.events == first.events:
            first = self._start
        before = self._readings[max(0, len(self._readings) - 1 - RATE_TICKS)]
        latency = latency_between(first, last)
        bounds = [None if bound == float("inf") else bound for bound, _ in latency]
        counts = [int(count - below) for (_, count), (_, below) in zip(latency, [(0, 0), *latency], strict=False)]
        hits = [sum(column) for column in zip((0, 0, 0), *hits_between(first, last).values(), strict=True)]
        return Now(
            at_ms=int(last.at_s * 1000),
            version=self._version,
            on_hold=last.on_hold,
            not_ready=self._health.not_ready(),
            events=last.events,
            events_per_s=events_per_s(before, last),
            lag_records=last.lag_records,
            lag_s=last.lag_s,
            since_start=since_start,
            latency=list(zip(bounds, counts, strict=True)),
            p50_ms=quantile_ms(latency, 0.5),
            p95_ms=quantile_ms(latency, 0.95),
            p99_ms=quantile_ms(latency, 0.99),
            judged=hits[0],
            hits=hits[1],
            popularity_hits=hits[2],
            cache_hits=last.cache_hits - first.cache_hits,
            cache_misses=last.cache_misses - first.cache_misses,
            cached_users=last.cached_users,
            dead_letters=self._dead_letters_noted,
        )

    def _note_version(self) -> None:
        last = self._readings[-1]
        if not last.version or last.version == self._version:
            return
        if self._version:
            self._swaps.append(SwapMark(int(last.at_s * 1000), self._version, last.version))
        self._version = last.version


def _point(before: Reading, last: Reading) -> Point:
    latency = latency_between(before, last)
    return Point(
        int(last.at_s * 1000),
        events_per_s(before, last),
        last.lag_records,
        quantile_ms(latency, 0.5),
        quantile_ms(latency, 0.99),
        hits_between(before, last),
    )
