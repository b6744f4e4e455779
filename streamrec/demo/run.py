"""`streamrec demo`: the whole path on this machine, on real clicks.

Train on the first 80 % of the time line; start Redis, Kafka and the daemon as child processes; replay the
rest as live clicks; half way retrain beside the daemon, which takes the new model over while clicks go on; judge
each click against the list last published for its user *before* it. The demo stands where a team's own systems
stand: it writes to Kafka, reads Redis, and scrapes /metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import math
import os
import signal
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import aiohttp
import torch
from rich.console import Console

from sasrec import (
    DataFileError,
    Event,
    Interactions,
    ItemVocab,
    SASRecConfig,
    Sequences,
    TrainConfig,
    TrainingError,
    read_events,
    save_model,
    train,
)
from streamrec.demo.retrain import (
    AROUND_S,
    HitRates,
    Judged,
    K,
    Latencies,
    Retraining,
    Round,
    Swap,
    hit_rate_of,
    prepare,
)
from streamrec.demo.screen import SPARKS, Screen, Snapshot, print_summary
from streamrec.errors import StreamrecError
from streamrec.kafka.replay import Pacer, click_producer
from streamrec.kafka.topics import ensure_topics
from streamrec.local.daemon import DaemonProcess, forget_environment, running_daemon
from streamrec.local.movielens import TITLES, FetchError, cache_folder, fetch_movielens
from streamrec.local.servers import EmbeddedServers, free_port
from streamrec.local.simulator import simulate_clicks
from streamrec.metrics import quantile
from streamrec.redis.client import RedisClient
from streamrec.retraining.round import loss_for
from streamrec.schemas import PublishedList
from streamrec.serving.inspection import published
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings
from streamrec.stop_signals import stop_signals
from streamrec.web.titles import read_titles

DAEMON = ("streamrec.demo.daemon",)
TRAIN_FRACTION = 0.8
NEWEST_EVENTS = 100_000  # of one's own data: what trains within a minute or so on two cores
KEPT_ITEMS = 200  # of a user in Redis: more than the model's window, so that more seen items are left out
SHAPE = SASRecConfig(num_items=1, max_len=50, hidden_units=64, dropout_rate=0.3)
BATCH_SIZE = 32
REPEATS_MATTER = 0.1  # share of clicks on an item that the user clicked before
TRAIN_LIMIT_S = 120.0  # on a slow machine fewer epochs must do
SCREEN_EVERY_S = 0.25
DRAIN_TIMEOUT_S = 30.0
RETRAIN_AFTER = 0.5  # of the live clicks
RETRAIN_TIMEOUT_S = 30.0  # after the last click, should the new model not be there yet


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for. ``rate_per_s`` 0 is as fast as possible; ``stay``: go on after the last click."""

    data: Path | None = None
    items: Path | None = None
    json: Path | None = None
    rate_per_s: float = 300.0
    epochs: int = 15
    stay: bool = False


@dataclass(frozen=True)
class DemoData:
    """Clicks before and after the moment at which the demo goes live."""

    source: str
    past: Interactions
    live: Interactions
    titles: dict[str, str]

    @property
    def filter_seen(self) -> bool:
        """Films are watched once, groceries again and again: recommend seen items where they are clicked again."""
        distinct = len(set(zip(self.past.user_ids, self.past.item_ids, strict=True)))
        return len(self.past) - distinct < REPEATS_MATTER * len(self.past)


def run_demo(options: DemoOptions) -> int:
    """The demo, from data to summary; returns the exit status.

    Raises:
        StreamrecError: the data cannot be used, or a server does not come up.
    """
    console = Console()
    forget_environment()  # servers and folders of the demo are its own, whatever else is served from this shell
    if options.json is not None:
        _write_json(options.json, {})  # better now than after minutes
    torch.set_num_threads(os.cpu_count() or 1)  # training has the machine to itself
    try:
        data = _load(options, console)
        console.print(
            f"{data.source}: training on {len(data.past):,} clicks, {len(data.live):,} to come", highlight=False
        )
        model_dir = _train(data.past, data.filter_seen, options.epochs, console)
    except (DataFileError, TrainingError) as error:
        raise StreamrecError(str(error)) from error
    console.print("starting Redis, Kafka and the daemon", highlight=False)
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, EmbeddedServers() as servers:
        settings = load_settings(flags=_flags(data, servers, Path(folder)))
        prepare(settings, model_dir, data.past)
        with running_daemon(settings, DAEMON) as daemon:
            complete = _go_live(options, data, settings, Path(folder), daemon, console)
            if options.stay and complete:
                asyncio.run(_stay(f"\nThe page stays at {daemon.address} until Ctrl-C", console))
    console.print(
        f"\nThe model is in {model_dir}; serve it to your own clicks with\n"
        f"  streamrec serve --embedded --model-dir {model_dir}",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if complete else 130


def _go_live(
    options: DemoOptions, data: DemoData, settings: Settings, folder: Path, daemon: DaemonProcess, console: Console
) -> bool:
    """Replay, and say what came of it; False if it was stopped early."""
    with Retraining(settings, folder) as retraining, Screen(console, data.titles) as screen:
        live = _LiveReplay(settings, data, options.rate_per_s, screen, daemon, retraining)
        complete = asyncio.run(live.run())
    print_summary(console, live.now, data.source, complete)
    if options.json is not None:
        _write_json(options.json, _summary(live.now))
    return complete


async def _stay(text: str, console: Console) -> None:
    stop = asyncio.Event()
    with stop_signals(stop, lambda _: None):  # who reads the text may be quick
        console.print(text, highlight=False, soft_wrap=True)
        await stop.wait()


def _flags(data: DemoData, servers: EmbeddedServers, folder: Path) -> dict[str, object]:
    """What daemon and retraining are told."""
    items = folder / "items.csv"
    with items.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("item_id", "title"), *data.titles.items()])
    return {
        "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
        "redis_url": servers.redis_url,
        "registry_dir": folder / "registry",
        "archive_dir": folder / "archive",
        "sequences_max_len": KEPT_ITEMS,
        "lists_filter_seen": data.filter_seen,
        "http_port": free_port(),
        "http_titles": items,
        "log_level": "WARNING",
        "retrain_days": 36_500,
        "train_batch_size": BATCH_SIZE,
        "retrain_update_epochs": 5,
        "train_replay": 4.0,  # what is new are a few users' clicks, a few hundred windows
        "retrain_holdout_share": 0.02,  # so that most of the live clicks so far are trained on
    } | {f"model_{name}": value for name, value in asdict(SHAPE).items() if name != "num_items"}


def _load(options: DemoOptions, console: Console) -> DemoData:
    path = options.data
    if path is None and options.items is not None:
        raise StreamrecError("--items gives the titles of your own clicks: name their file with --data too")
    if path is not None:
        titles = read_titles(options.items) if options.items else {}
        everything = Interactions.from_events(read_events(path))
        newest = everything.newest(NEWEST_EVENTS)
        if len(newest) < len(everything):
            console.print(f"{path}: the newest {len(newest):,} of {len(everything):,} clicks are used", highlight=False)
        return DemoData(path.name, *newest.split_at(TRAIN_FRACTION), titles)
    try:
        file = fetch_movielens()
    except FetchError as error:
        console.print(
            f"MovieLens 100K cannot be had here ({error}); using simulated clicks instead",
            highlight=False,
            soft_wrap=True,
        )
        events, titles = simulate_clicks()
        return DemoData("simulated clicks", *Interactions.from_events(events).split_at(TRAIN_FRACTION), titles)
    past, live = Interactions.from_events(read_events(file)).split_at(TRAIN_FRACTION)
    return DemoData("MovieLens 100K", past, live, read_titles(file.with_name(TITLES)))


def _train(past: Interactions, filter_seen: bool, epochs: int, console: Console) -> Path:
    vocab = ItemVocab.from_items(past.item_ids)
    sequences, validation = Sequences.build(past, vocab).leave_last_out()
    how = TrainConfig(
        epochs=epochs,
        batch_size=BATCH_SIZE,
        patience=4,
        loss=loss_for(len(vocab)),
        skip_seen=filter_seen,
    )
    config = replace(SHAPE, num_items=len(vocab))
    deadline = time.monotonic() + TRAIN_LIMIT_S
    model, result = train(
        config, sequences, how, validation, progress=console.is_terminal, stop=lambda: time.monotonic() > deadline
    )
    judged = result.best.validation
    path = cache_folder() / "demo-model"
    version = save_model(
        path,
        model,
        vocab,
        {"trained_until_ms": int(past.timestamps_ms.max()), "validation": judged.as_dict() if judged else {}},
    )
    seconds = sum(epoch.seconds for epoch in result.epochs)
    console.print(
        f"model {version}: {len(vocab):,} items, {len(result.epochs)} epochs in {seconds:.0f} s"
        + (f", validation HR@10 {judged.hr[K]:.3f}" if judged else ""),
        highlight=False,
    )
    return path


Counts = tuple[int, int, int]


class Judge:
    """Prequential judgement: was the click in the list last published for that user, before it?

    A user without a list of his own is judged against the published popular list, as a page would show it.
    The popularity baseline is stronger than that list: the most clicked items of past and stream so far, the
    user's own seen items left out where the published lists leave them out.
    """

    RANK_EVERY = 25  # clicks between two sortings of the baseline

    def __init__(self, past: Interactions, filter_seen: bool) -> None:
        self._filter_seen = filter_seen
        self._counts = Counter(past.item_ids)
        self._seen: defaultdict[str, set[str]] = defaultdict(set)
        for user, item in zip(past.user_ids, past.item_ids, strict=True):
            self._seen[user].add(item)
        self._ranked: list[str] = []
        self.judged = self.hits = self.popularity_hits = 0

    def judge(self, event: Event, listed: list[str]) -> None:
        """Judge a click, then learn from it."""
        if self.judged % self.RANK_EVERY == 0:
            self._ranked = [item for item, _ in self._counts.most_common()]
        seen = self._seen[event.user_id]
        popular = islice((item for item in self._ranked if not self._filter_seen or item not in seen), K)
        self.judged += 1
        self.hits += event.item_id in listed[:K]
        self.popularity_hits += event.item_id in popular
        self._counts[event.item_id] += 1
        seen.add(event.item_id)

    def counts(self) -> Counts:
        """Clicks judged, hits, hits of the baseline."""
        return self.judged, self.hits, self.popularity_hits

    def rates(self, since: Counts = (0, 0, 0)) -> HitRates | None:
        """Of the clicks since there were so many; None where none came."""
        clicks, hits, popularity_hits = (now - then for now, then in zip(self.counts(), since, strict=True))
        return HitRates(clicks, hits / clicks, popularity_hits / clicks) if clicks else None


class _LiveReplay:
    """Feeds the live clicks, judges them, and draws what happens."""

    def __init__(
        self,
        settings: Settings,
        data: DemoData,
        rate_per_s: float,
        screen: Screen,
        daemon: DaemonProcess,
        retraining: Retraining,
    ) -> None:
        self._settings = settings
        self._live = data.live
        self._rate_per_s = rate_per_s
        self._screen = screen
        self._daemon = daemon
        self._retraining = retraining
        self._latencies = Latencies()
        self._version, self._swapped_s = "", math.inf
        self._at_swap = self._at_spark = (0, 0, 0)
        self._judge = Judge(data.past, settings.lists.filter_seen)
        self._clicks: defaultdict[str, list[str]] = defaultdict(list)
        self._after_swap: list[Judged] = []
        self._followed, self._followed_at_s = "", 0.0
        self.now = Snapshot(total=len(data.live))

    async def run(self) -> bool:
        """Replay until the end (True) or until a signal (False)."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        async with RedisClient(self._settings.redis) as redis, aiohttp.ClientSession() as http:
            work = asyncio.create_task(self._work(redis, http))
            asked = asyncio.create_task(stop.wait())
            await asyncio.wait((work, asked), return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            if work.done():
                await work
                return True
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            return False

    async def _work(self, redis: RedisClient, http: aiohttp.ClientSession) -> None:
        await self._daemon.wait_ready(http)
        self._screen.say(f"see it live, and click yourself: {self._daemon.address}")
        await ensure_topics(self._settings.kafka, (self._settings.kafka.topic,))
        drawing = asyncio.create_task(self._draw(redis, http))
        try:
            started = time.monotonic()
            await self._feed(redis, started)
            await self._drain(http)
            self.now.seconds = time.monotonic() - started
            self.now.events_per_s = self.now.applied / self.now.seconds
            await self._wait_for_swap(drawing)
            if self.now.swap and self._after_swap:
                self.now.swap.old_model_after = await asyncio.to_thread(
                    hit_rate_of, self._settings, self.now.swap.old_version, self._after_swap
                )
        finally:
            drawing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drawing

    async def _feed(self, redis: RedisClient, started: float) -> None:
        pacer = Pacer(self._rate_per_s)
        live = zip(self._live.user_ids, self._live.item_ids, self._live.timestamps_ms.tolist(), strict=True)
        async with click_producer(self._settings.kafka, self._settings.events) as clicks:
            for event in (Event(*row) for row in live):
                await pacer.wait()
                listed, n = await self._list_of(redis, event.user_id)
                self._judge.judge(event, listed)
                if self.now.swap:
                    history = self._clicks[event.user_id][:n][-KEPT_ITEMS:]
                    self._after_swap.append(Judged(history, event.item_id, event.item_id in listed[:K]))
                await clicks.send(event)
                self._clicks[event.user_id].append(event.item_id)
                self._follow(event.user_id)
                self.now.sent += 1
                self.now.seconds = time.monotonic() - started
                self.now.events_per_s = self.now.sent / self.now.seconds
                if self.now.sent == int(self.now.total * RETRAIN_AFTER):
                    self._retraining.start()
                    self._screen.note(f"{self.now.sent:,} clicks: retraining begins beside the daemon, on these too")

    async def _list_of(self, redis: RedisClient, user: str) -> tuple[list[str], int]:
        """What a page would show, and how many of the user's clicks it was made from."""
        own, popular = await redis.get_many([redis.keys.recommendation(user), redis.keys.popular])
        value = json.loads(own or popular or b'{"items": []}')
        return value["items"], value["n"] if own else 0

    def _follow(self, user: str) -> None:
        """The user on the screen: one who clicks now, and not another one every moment."""
        at_s = time.monotonic()
        if user == self._followed or at_s - self._followed_at_s > 3.0:
            self._followed, self._followed_at_s = user, at_s

    async def _drain(self, http: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while self.now.applied + self.now.dead_letters < self.now.sent:
            await self._scrape(http)
            if time.monotonic() > deadline:
                raise StreamrecError(
                    f"only {self.now.applied:,} of {self.now.sent:,} clicks were handled after {DRAIN_TIMEOUT_S:.0f} s"
                )
            await asyncio.sleep(0.05)

    async def _draw(self, redis: RedisClient, http: aiohttp.ClientSession) -> None:
        while True:
            await self._scrape(http)
            self._see_retraining()
            now = self.now
            if rates := self._judge.rates():
                now.hit_rate, now.popularity_hit_rate = rates.model, rates.popularity
            lately = self._judge.rates(self._at_spark)
            if lately and lately.clicks >= now.total / SPARKS:
                now.hit_rates_over_time.append(lately.model)
                self._at_spark = self._judge.counts()
            now.user_id, now.clicks = self._followed, self._clicks[self._followed]
            async for _, value in published(redis, [self._followed] if self._followed else []):
                self._show_list(value)
            self._screen.draw(now)
            await asyncio.sleep(SCREEN_EVERY_S)

    def _see_retraining(self) -> None:
        """What became of the retraining, and of the clicks since the swap."""
        now, retraining = self.now, self._retraining
        now.retraining_s = time.monotonic() - retraining.began_s if retraining.runs else None
        if now.round is None and (ended := retraining.ended()):
            now.round = ended
            if not ended.promoted:
                self._screen.note(f"{now.sent:,} clicks: no new model this time: {ended.reason}")
        if now.swap:
            now.swap.after = self._judge.rates(self._at_swap)
            phases = {
                "before": (-math.inf, retraining.began_s),
                "training": (retraining.began_s, min(retraining.ended_s, self._swapped_s)),
                "swap": (self._swapped_s - AROUND_S, self._swapped_s + AROUND_S),
            }
            now.swap.p99_ms = {name: self._latencies.p99_ms(*phase) for name, phase in phases.items()}

    def _see_version(self, version: str) -> None:
        before = self._judge.rates()
        if self._version not in ("", version) and before:
            self._swapped_s, self._at_swap = time.monotonic(), self._judge.counts()
            self.now.swap = Swap(self.now.sent, self._version, version, before, len(self.now.hit_rates_over_time))
            self._screen.note(f"{self.now.sent:,} clicks: model {version} takes over from {self._version}")
        self._version = version

    async def _wait_for_swap(self, drawing: asyncio.Task[None]) -> None:
        """A retraining may need longer than the clicks."""
        now, deadline = self.now, time.monotonic() + RETRAIN_TIMEOUT_S
        if self._retraining.runs:
            self._screen.note("all clicks were handled; waiting for the new model")
        while not drawing.done():  # it ends where the daemon does
            self._see_retraining()
            if not self._retraining.runs and (now.swap or not (now.round and now.round.promoted)):
                return
            if time.monotonic() > deadline:
                now.round = Round(False, f"it was not there {RETRAIN_TIMEOUT_S:.0f} s after the last click")
                return
            await asyncio.sleep(0.1)

    def _show_list(self, value: PublishedList | None) -> None:
        now = self.now
        now.listed = value.items if value else []
        now.listed_after = value.n if value else 0
        now.listed_ago_s = time.time() - value.published_ts_ms / 1000 if value else 0.0

    async def _scrape(self, http: aiohttp.ClientSession) -> None:
        reading = await self._daemon.read(http)
        if reading is None:
            return
        now, seen = self.now, reading.click_to_published
        now.applied, now.dead_letters, now.lag_records = reading.applied, reading.dead_letters, reading.lag_records
        if reading.version:
            self._see_version(reading.version)
        self._latencies.add(reading.at_s, seen)
        p50, p99 = quantile(seen, 0.5), quantile(seen, 0.99)
        now.p50_ms = None if p50 is None else p50 * 1000
        now.p99_ms = None if p99 is None else p99 * 1000


def _summary(now: Snapshot) -> dict[str, object]:
    return {
        "events": now.applied,
        "events_per_s": round(now.events_per_s, 1),
        "latency_ms": {"p50": now.p50_ms, "p99": now.p99_ms},
        "hit_rate_at_10": round(now.hit_rate, 5),
        "popularity_hit_rate_at_10": round(now.popularity_hit_rate, 5),
        "dead_letters": now.dead_letters,
        "swap": _swap(now.swap, now.round) if now.swap else None,
    }


def _swap(swap: Swap, ended: Round | None) -> dict[str, object]:
    return {
        "after_clicks": swap.after_clicks,
        "version": swap.version,
        "hit_rate_before": round(swap.before.model, 5),
        "hit_rate_after": round(swap.after.model, 5) if swap.after else None,
        "old_model_after": None if swap.old_model_after is None else round(swap.old_model_after, 5),
        "popularity_before": round(swap.before.popularity, 5),
        "popularity_after": round(swap.after.popularity, 5) if swap.after else None,
        "train_s": ended.train_s if ended else None,
        "p99_ms": swap.p99_ms,
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise StreamrecError(f"cannot write the summary to {path}: {error.strerror}") from None
