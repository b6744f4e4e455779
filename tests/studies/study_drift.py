"""A drift study: the popular items change in the stream. With retraining a daemon recovers, without it does not.

Two daemons read the same topic. Each has its own registry, group and Redis keys; both start with the same champion.
Beside one of them runs `streamrec retrain`. Clicks come at a fixed rate from users who walk along a Markov chain, so
the best possible hit rate is known; at the turn another chain replaces it.

`make drift` runs the study in about four minutes, and draws .github/drift.png.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from sasrec import Event
from streamrec.archive.segments import EventArchive
from streamrec.kafka.topics import ensure_topics
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon, Retrain
from support.kafka_client import raw_producer, wait_caught_up
from support.workload import click

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.study, pytest.mark.timeout(900)]

MakeSettings = Callable[..., Settings]
StartDaemon = Callable[..., Daemon]
Floats = NDArray[np.float64]

USERS, OLD_ITEMS, NEW_ITEMS = 300, 150, 50
ITEMS = OLD_ITEMS + NEW_ITEMS
ZIPF = 0.7  # popularity of the item of rank r is proportional to r ** -ZIPF
NUM_FOLLOWERS, FOLLOW_PROBABILITY = 6, 0.85  # probability that a click is on one of the last item's followers
# numbers of clicks
TRAINED, BEFORE, AFTER, MAX_AFTER = 12_000, 6_000, 12_000, 40_000
PER_S = 120.0
WINDOW = 1_000  # clicks per hit rate in the plot; figures use twice this number
RECOVERED = 0.7  # of the earlier hit rate
K = 10

SETTINGS: dict[str, Any] = {
    "model_dir": None,
    "lists_filter_seen": False,  # walkers return to items
    "lists_popular_half_life_s": 20,  # short, so that the popular list follows the turn
    "model_max_len": 20,
    "model_hidden_units": 32,
    "model_num_blocks": 1,
    "model_dropout_rate": 0.1,
    "train_learning_rate": 0.003,
    "retrain_update_learning_rate": 0.003,
    "retrain_holdout_share": 0.05,
    "archive_flush_s": 2,
}


class Walkers:
    """Users who walk along a Markov chain over items; a random user clicks next."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        common, rare = np.arange(OLD_ITEMS - NEW_ITEMS), np.arange(OLD_ITEMS - NEW_ITEMS, OLD_ITEMS)
        new = np.arange(OLD_ITEMS, ITEMS)
        self.before = self._transitions(np.concatenate((common, rare)))
        # new and rare items become the most popular ones, the most popular ones become rare
        self.after = self._transitions(np.concatenate((np.column_stack((new, rare[::-1])).ravel(), common[::-1])))
        self.now = self.before
        self._at = self._rng.choice(OLD_ITEMS, USERS, p=stationary(self.before)[:OLD_ITEMS])

    def _transitions(self, ranked: NDArray[np.int64]) -> Floats:
        """Return a chain (ITEMS, ITEMS) over items ranked by popularity: row i is the distribution after item i."""
        popularity = np.zeros(ITEMS)
        popularity[ranked] = np.arange(1, len(ranked) + 1) ** -ZIPF
        popularity /= popularity.sum()
        chain = np.tile((1 - FOLLOW_PROBABILITY) * popularity, (ITEMS, 1))  # (ITEMS, ITEMS)
        shares = 1 / np.arange(1, NUM_FOLLOWERS + 1)
        for row in chain:
            row[self._rng.choice(ITEMS, NUM_FOLLOWERS, replace=False, p=popularity)] += (
                FOLLOW_PROBABILITY * shares / shares.sum()
            )
        return chain

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield user and item without an end."""
        while True:
            user = self._rng.integers(USERS)
            self._at[user] = self._rng.choice(ITEMS, p=self.now[self._at[user]])
            yield f"u{user}", f"i{self._at[user]}"


def stationary(chain: Floats) -> Floats:
    """Return the long-run share of clicks on each item, (ITEMS,)."""
    share = np.full(ITEMS, 1 / ITEMS)
    for _ in range(1_000):
        share = share @ chain
    return share


def best_rates(chain: Floats) -> tuple[float, float]:
    """Return the highest possible hit rates in the long run: with a list per user, and with one list for all users.

    The chain has no memory, so the best list has the likeliest followers of the last item.
    """
    share = stationary(chain)
    return float(share @ np.sort(chain, axis=1)[:, -K:].sum(axis=1)), float(np.sort(share)[-K:].sum())


@dataclass(frozen=True)
class Sample:
    """The values of /metrics at one moment."""

    judged: int
    hits: int
    popularity_hits: int
    version: str


@dataclass
class Course:
    """The samples of one daemon over time. The position of a sample is the number of clicks judged before it."""

    samples: list[Sample] = field(default_factory=list)

    async def sample(self, daemon: Daemon) -> None:
        """Add a sample; a busy daemon that does not answer adds none."""
        totals: dict[str, float] = {}
        version = ""
        for family in text_string_to_metric_families((await daemon.get("/metrics"))[1]):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
                if sample.name == "streamrec_model_info":
                    version = sample.labels["version"]
        counts = [
            int(totals.get(f"streamrec_{name}_total", 0)) for name in ("judged_clicks", "hits", "popularity_hits")
        ]
        if version:
            self.samples.append(Sample(counts[0], counts[1], counts[2], version))

    def rates(self, name: str = "hits", window: int = WINDOW) -> tuple[list[int], list[float]]:
        """Return positions of samples, and the hit rates over the last ``window`` clicks before them."""
        judged = np.array([sample.judged for sample in self.samples])
        hits = np.array([getattr(sample, name) for sample in self.samples])
        ends = np.flatnonzero(judged >= judged[0] + window) if len(judged) else np.array([], np.int64)
        begins = np.searchsorted(judged, judged[ends] - window, side="right") - 1
        rates = (hits[ends] - hits[begins]) / (judged[ends] - judged[begins])
        return judged[ends].tolist(), rates.tolist()

    def rate(self, end: int, name: str = "hits", window: int = 2 * WINDOW) -> float:
        """Return the hit rate over the last ``window`` clicks before position ``end``; 0 if there is none yet."""
        found = [rate for judged, rate in zip(*self.rates(name, window), strict=True) if judged <= end]
        return found[-1] if found else 0.0

    @property
    def swaps(self) -> list[int]:
        """Return the positions at which a new version was first seen."""
        pairs = zip(self.samples, self.samples[1:], strict=False)
        return [new.judged for old, new in pairs if new.version != old.version]


@dataclass(frozen=True)
class Race:
    """The courses of the daemons "with" and "without" retraining; the number of clicks before the turn and in total."""

    courses: dict[str, Course]
    turn: int
    total: int

    def table(self) -> list[tuple[str, float, float, float]]:
        """Return hit rates before the turn, right after it, and at the end."""
        lines = [(name, course, "hits") for name, course in self.courses.items()]
        lines.append(("popularity", self.courses["without"], "popularity_hits"))
        ends = (self.turn, self.turn + 2 * WINDOW, self.total)
        return [(name, *(course.rate(end, kind) for end in ends)) for name, course, kind in lines]  # type: ignore[misc]

    @property
    def recovered_after(self) -> int:
        """Return the clicks after the turn until retraining restored RECOVERED of the earlier hit rate."""
        course = self.courses["with"]
        wanted = RECOVERED * course.rate(self.turn)
        found = (at for at, rate in zip(*course.rates(), strict=True) if at > self.turn + WINDOW and rate >= wanted)
        return next(found) - self.turn


@contextlib.asynccontextmanager
async def watching(daemons: dict[str, Daemon]) -> AsyncIterator[dict[str, Course]]:
    """Record the course of every daemon while the block runs."""
    courses = {name: Course() for name in daemons}
    done = asyncio.Event()

    async def watch(name: str) -> None:
        while not done.is_set():
            await courses[name].sample(daemons[name])
            await asyncio.sleep(0.25)
        await courses[name].sample(daemons[name])

    async with asyncio.TaskGroup() as group:
        for name in daemons:
            group.create_task(watch(name))
        yield courses
        done.set()


async def send(settings: Settings, walkers: Walkers, enough: Callable[[int], bool]) -> int:
    """Send clicks at a fixed rate until ``enough`` returns True; return their number."""
    async with raw_producer(settings) as producer:
        started, waiting = time.monotonic(), []
        for sent, (user, item) in enumerate(walkers):
            if enough(sent):
                break
            await asyncio.sleep(max(0.0, started + sent / PER_S - time.monotonic()))
            waiting.append(await producer.send(settings.kafka.topic, click(user, item), key=user.encode()))
        await asyncio.gather(*waiting)
    return sent


async def first_champion(settings: Settings, walkers: Walkers) -> None:
    """Train the first champion on clicks before the stream, with `streamrec retrain`."""
    assert settings.archive.dir is not None
    begin_ms = time.time() * 1000 - TRAINED / PER_S * 1000
    clicks = [
        Event(user, item, int(begin_ms + number / PER_S * 1000))
        for number, (user, item) in zip(range(TRAINED), walkers, strict=False)
    ]
    EventArchive(settings.archive.dir).import_events(clicks)
    await Retrain(settings, "--once", "--no-follow").ends()


async def race(make_settings: MakeSettings, start_daemon: StartDaemon, walkers: Walkers, folder: Path) -> Race:
    """Run both daemons through the turn until one has recovered and all clicks are processed."""
    shared = make_settings()
    await ensure_topics(shared.kafka, (shared.kafka.topic, shared.kafka.dead_letters))
    own: dict[str, dict[str, Any]] = {
        name: SETTINGS
        | {
            "registry_dir": folder / name,
            "kafka_group": f"{shared.kafka.group}-{name}",
            "redis_key_prefix": f"{shared.redis.key_prefix}-{name}",
        }
        for name in ("with", "without")
    }
    retrained = make_settings(**own["with"], archive_dir=folder / "archive")
    await first_champion(retrained, walkers)
    shutil.copytree(folder / "with", folder / "without")
    daemons = {name: start_daemon(**changes) for name, changes in own.items()}
    for daemon in daemons.values():
        await daemon.wait_ready()

    retraining = Retrain(retrained, "--every", "10s", "--min-new-events", "500")
    try:
        async with watching(daemons) as courses:
            turn = await send(shared, walkers, lambda sent: sent >= BEFORE)
            await wait_all_processed(daemons, turn)
            log.info("popularity changes after %d clicks", turn)
            walkers.now = walkers.after
            wanted = (RECOVERED + 0.05) * courses["with"].rate(turn)
            total = turn + await send(
                shared,
                walkers,
                lambda sent: sent >= AFTER and (sent >= MAX_AFTER or courses["with"].rate(turn + sent) >= wanted),
            )
            await wait_all_processed(daemons, total)
            for daemon in daemons.values():
                await wait_caught_up(daemon.settings)
        retraining.process.send_signal(signal.SIGTERM)
        await retraining.ends()
    finally:
        retraining.kill()
    for daemon in daemons.values():
        assert await daemon.metric(EVENTS, outcome="applied") == total
        assert daemon.lines("ERROR") == []
    return Race(courses, turn, total)


async def wait_all_processed(daemons: dict[str, Daemon], clicks: int) -> None:
    for daemon in daemons.values():
        await daemon.wait_handled(clicks, timeout_s=300)


async def test_after_a_change_of_popularity_only_the_daemon_with_retraining_recovers(
    make_settings: MakeSettings, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    logging.getLogger("aiokafka").setLevel(logging.WARNING)
    walkers = Walkers(seed=1)
    seen = await race(make_settings, start_daemon, walkers, tmp_path)
    table = {name: rates for name, *rates in seen.table()}
    for name, rates in table.items():
        log.info("%s: before the turn %.3f, right after it %.3f, at the end %.3f", name, *rates)
    best = best_rates(walkers.before), best_rates(walkers.after)
    log.info(
        "the best lists per user: %.3f, %.3f; the best list for all users: %.3f, %.3f", *np.transpose(best).ravel()
    )

    # before: both are similar, and well above popularity
    retrained, left_alone, popular = table["with"], table["without"], table["popularity"]
    assert retrained[0] == pytest.approx(left_alone[0], rel=0.15)
    assert min(retrained[0], left_alone[0]) > 1.5 * popular[0]
    # right after the turn: both are bad
    assert max(retrained[1], left_alone[1]) < 0.5 * min(retrained[0], left_alone[0])
    # at the end: one has recovered, the other has not
    assert retrained[2] >= RECOVERED * retrained[0]
    assert retrained[2] > popular[2]
    assert left_alone[2] <= 0.5 * retrained[2]
    assert any(swap > seen.turn for swap in seen.courses["with"].swaps)
    assert seen.courses["without"].swaps == []
    # nearly every click was judged: clicks of users that are re-scored at that moment are skipped
    for course in seen.courses.values():
        assert 0.95 * seen.total <= course.samples[-1].judged <= seen.total
    log.info("recovered to %.0f %% after %d clicks", 100 * RECOVERED, seen.recovered_after)
    if path := os.environ.get("DRIFT_PLOT"):
        draw(seen, best, path)


def draw(seen: Race, best: tuple[tuple[float, float], tuple[float, float]], path: str) -> None:
    """Draw the hit rates over the clicks into an image file."""
    from matplotlib.figure import Figure

    blue, orange, grey = "#1b5faa", "#c4500f", "#767676"
    figure = Figure(figsize=(9, 4.6), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot(xlim=(0, seen.total * 1.16), ylim=(0, 1))
    axes.set_xlabel(f"clicks, {PER_S:.0f} per second")
    axes.set_ylabel(f"hit rate@{K} of the last {WINDOW:,} clicks")
    for swap in seen.courses["with"].swaps:
        axes.axvline(swap, ymax=0.92, color=blue, alpha=0.25, linewidth=1)
    axes.axvline(seen.turn, color="black", linewidth=1.2, linestyle="--")
    for (rate, _), begin, end in zip(best, (0, seen.turn), (seen.turn, seen.total), strict=True):
        axes.plot((begin, end), (rate, rate), color=grey, linestyle=":", linewidth=1.2)
    lines = (
        ("with", "hits", "with retraining", blue, 2.2),
        ("without", "hits", "without", orange, 2.2),
        ("without", "popularity_hits", "popularity", grey, 1.0),
    )
    right = seen.total * 1.01
    for name, kind, label, color, width in lines:
        at, rates = seen.courses[name].rates(kind)
        axes.plot(at, rates, color=color, linewidth=width)
        axes.text(right, rates[-1], label, color=color, va="center")
    axes.text(right, best[1][0], "best possible", color=grey, va="center")
    above = {"y": 0.96, "va": "center"}
    axes.text(seen.turn * 1.03, s="popularity changes", **above)
    axes.text(seen.total, s="thin lines: a new model is swapped in", color=blue, ha="right", **above)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xticks(range(0, seen.total + 1, 3_000))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_bounds(0, seen.total)
    figure.savefig(path)
