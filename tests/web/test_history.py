"""The recent past on the live page: counters over time, in bounded memory, and updates that are of one moment."""

from __future__ import annotations

import asyncio

import pytest

from streamrec.health import Health
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter
from streamrec.web.history import MAX_DEAD_LETTERS, MAX_POINTS, WINDOW_TICKS, History, Received


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """A history of metrics that a test increments; a tick takes half a second."""

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


def test_the_present_covers_the_last_minute_or_all_time_if_that_had_no_click() -> None:
    scene = Scene()
    scene.clicks(4, seconds=0.002)
    scene.metrics.cache_hits.inc(3)
    scene.tick()
    scene.clicks(6, seconds=0.2)
    scene.tick(WINDOW_TICKS)
    now = scene.history.now()
    assert (now.since_start, now.events, now.judged) == (False, 10, 6)
    assert sum(n for _, n in now.latency) == 6
    assert now.latency[-1][0] is None
    assert now.p50_ms is not None and now.p50_ms > 100
    scene.tick(2)
    now = scene.history.now()
    assert (now.since_start, now.judged, now.cache_hits, now.events_per_s) == (True, 10, 3, 0.0)


def test_a_swap_is_marked_once_and_the_first_model_is_no_swap() -> None:
    scene = Scene()
    scene.metrics.model.labels("m1").set(1)
    scene.tick()
    assert not scene.history.swaps()
    scene.metrics.model.clear()
    scene.tick()
    assert scene.history.now().version == "m1"
    scene.metrics.model.labels("m2").set(1)
    scene.tick(3)
    assert [(mark.at_ms, mark.before, mark.after) for mark in scene.history.swaps()] == [(1_001_500, "m1", "m2")]


def test_memory_is_bounded() -> None:
    scene = Scene()
    for offset in range(MAX_DEAD_LETTERS + 5):
        scene.history.dead_letter(letter(offset, "no event " * 200))
    letters = scene.history.dead_letters()
    assert letters[0].offset == MAX_DEAD_LETTERS + 4
    assert len(letters) == MAX_DEAD_LETTERS
    assert scene.history.now().dead_letters == MAX_DEAD_LETTERS + 5, "the number counts the dropped ones too"
    assert len(letters[0].reason) == 500
    scene.tick(2 * MAX_POINTS + 20)
    points, made = scene.history.points_since(0)
    assert (len(points), made) == (MAX_POINTS, MAX_POINTS + 10)


def letter(offset: int, reason: str = "no event") -> DeadLetter:
    return DeadLetter("clicks", 1, offset, 0, None, b"x" * 1_000, reason)


def test_the_number_of_dead_letters_is_that_of_the_noted_ones_at_every_moment() -> None:
    scene, page = Scene(), Received()
    first = scene.history.update(page)
    assert (first.now.dead_letters, first.dead_letters) == (0, [])
    scene.metrics.dead_letters.inc()  # a daemon that counts a letter before it notes it
    scene.tick()
    between = scene.history.update(page)
    assert (between.now.dead_letters, between.dead_letters) == (0, None), "no number without its letter"
    scene.history.dead_letter(letter(7))
    noted = scene.history.update(page)
    assert noted.dead_letters is not None
    assert (noted.now.dead_letters, [row.offset for row in noted.dead_letters]) == (1, [7])
    assert scene.history.update(page).dead_letters is None, "a page receives a list once"


def test_a_page_that_connects_again_receives_the_list_even_if_the_number_is_unchanged() -> None:
    before, after = Scene(), Scene()
    before.history.dead_letter(letter(1))
    after.history.dead_letter(letter(2))
    for scene, offset in ((before, 1), (after, 2)):  # the daemon was restarted between them
        update = scene.history.update(Received())
        assert update.now.dead_letters == 1
        assert update.dead_letters is not None
        assert [row.offset for row in update.dead_letters] == [offset]


def test_numbers_shown_together_are_of_one_reading() -> None:
    scene = Scene()
    scene.metrics.lag_records.labels("0").set(3)
    scene.metrics.cached_users.set(5)
    scene.metrics.cache_misses.inc(5)
    scene.tick(2)
    scene.metrics.lag_records.labels("0").set(0)
    scene.metrics.cached_users.set(6)
    scene.metrics.cache_misses.inc(1)
    update = scene.history.update(Received())
    now, (point,) = update.now, update.points
    assert (now.lag_records, point.lag_records) == (3, 3)
    assert (now.cache_misses, now.cached_users) == (5, 5)


def test_model_and_swaps_of_an_update_are_of_one_moment() -> None:
    scene = Scene()
    scene.metrics.model.labels("m1").set(1)
    scene.tick()
    scene.metrics.model.clear()
    scene.metrics.model.labels("m2").set(1)
    before = scene.history.update(Received())
    assert (before.now.version, before.swaps) == ("m1", [])
    scene.tick()
    after = scene.history.update(Received())
    assert (after.now.version, [mark.after for mark in after.swaps]) == ("m2", ["m2"])


async def test_every_tick_wakes_all_that_wait() -> None:
    scene = Scene()
    waiting = [asyncio.create_task(scene.history.wait_tick()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    scene.tick()
    await asyncio.gather(*waiting)
