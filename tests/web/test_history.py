"""What the live page is told of the past: the daemon's counters over time, in bounded memory."""

from __future__ import annotations

import asyncio

import pytest

from streamrec.health import Health
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter
from streamrec.web.history import KEPT_DEAD_LETTERS, POINTS, WINDOW_TICKS, History


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """A history over metrics that a test counts in, at half a second a tick."""

    def __init__(self) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        self.history = History(self.metrics, Health(60, 60), self.clock)

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.clock.now_s += 0.5
            self.history.tick()

    def clicks(self, number: int, seconds: float = 0.007, model: str = "m1", hits: int = 0) -> None:
        self.metrics.events.labels("applied").inc(number)
        for _ in range(number):
            self.metrics.click_to_published.observe(seconds)
        self.metrics.judged.labels(model).inc(number)
        self.metrics.hits.labels(model).inc(hits)
        self.metrics.popularity_hits.labels(model).inc(1)


def test_a_point_a_second_holds_what_happened_in_that_second() -> None:
    scene = Scene()
    scene.clicks(10, hits=4)
    scene.metrics.lag_records.labels("0").set(3)
    scene.metrics.lag_records.labels("1").set(4)
    scene.tick(2)
    scene.tick(2)
    (first, second), made = scene.history.points_since(0)
    assert (first.at_ms, first.events_per_s, first.lag_records) == (1_001_000, 10.0, 7)
    assert first.models == {"m1": (10, 4, 1)}
    assert first.p50_ms == pytest.approx(7.0, abs=1.0)
    assert (second.events_per_s, second.models, second.p50_ms) == (0.0, {}, None)
    assert scene.history.points_since(made) == ([], 2)
    scene.tick(2)
    assert len(scene.history.points_since(made)[0]) == 1


def test_clicks_on_the_popular_list_are_left_out_of_the_comparison() -> None:
    scene = Scene()
    scene.clicks(5, model="popular")
    scene.clicks(3, model="m1")
    scene.tick(2)
    assert scene.history.points_since(0)[0][0].models == {"m1": (3, 0, 1)}
    assert scene.history.now().judged == 3


def test_the_present_is_the_last_minute_and_all_the_time_where_that_had_no_click() -> None:
    scene = Scene()
    scene.clicks(4, seconds=0.002)
    scene.metrics.cache_hits.inc(3)
    scene.tick()
    scene.clicks(6, seconds=0.2)
    scene.tick(WINDOW_TICKS)
    now = scene.history.now()
    assert (now.whole, now.events, now.judged) == (False, 10, 6)
    assert sum(n for _, n in now.latency) == 6
    assert now.latency[-1][0] is None
    assert now.p50_ms is not None and now.p50_ms > 100
    scene.tick(2)
    now = scene.history.now()
    assert (now.whole, now.judged, now.cache_hits, now.events_per_s) == (True, 10, 3, 0.0)


def test_a_swap_is_marked_once_and_the_first_model_is_none() -> None:
    scene = Scene()
    scene.metrics.model.labels("m1").set(1)
    scene.tick()
    assert not scene.history.swaps
    scene.metrics.model.clear()
    scene.tick()
    assert scene.history.now().version == "m1"
    scene.metrics.model.labels("m2").set(1)
    scene.tick(3)
    assert [(mark.at_ms, mark.before, mark.after) for mark in scene.history.swaps] == [(1_001_500, "m1", "m2")]


def test_memory_is_bounded() -> None:
    scene = Scene()
    for offset in range(KEPT_DEAD_LETTERS + 5):
        scene.history.dead_letter(DeadLetter("clicks", 1, offset, 0, None, b"x" * 1_000, "no event " * 200))
    letters = scene.history.dead_letters
    assert [letter.offset for letter in letters][-1] == KEPT_DEAD_LETTERS + 4
    assert len(letters) == KEPT_DEAD_LETTERS
    assert len(letters[0].reason) == 500
    scene.history._made = POINTS + 10
    scene.history._points.extend([scene.history._point(scene.history._start, scene.history._start)] * (POINTS + 10))
    points, made = scene.history.points_since(0)
    assert (len(points), made) == (POINTS, POINTS + 10)


async def test_who_waits_is_told_of_every_tick() -> None:
    scene = Scene()
    waiting = [asyncio.create_task(scene.history.ticked()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    scene.tick()
    await asyncio.gather(*waiting)
