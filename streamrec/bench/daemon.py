"""Clicks a second and milliseconds from click to list, of a real daemon between a real Kafka and a real Redis.

Feeder, servers and daemon are processes of this machine. Users have full windows in Redis from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from sasrec import Event, load_model, save_model
from streamrec.bench.engine import Subject
from streamrec.bench.users import fill_windows
from streamrec.errors import StreamrecError
from streamrec.kafka.replay import Pacer, click_producer
from streamrec.kafka.topics import ensure_topics
from streamrec.local.cluster import EmbeddedCluster
from streamrec.local.daemon import DaemonProcess, Reading, environment, running_daemon
from streamrec.local.servers import EmbeddedServers, free_port
from streamrec.metrics import quantile
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

SHARES = (0.25, 0.5, 0.8)
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999}
POLL_S, LONGEST_POLL_S = 0.1, 1.0
STUCK_S = 60.0
FIRST_S = 1.0
SCRIPT = "from streamrec.bench.daemon import feed; feed()"


@dataclass(frozen=True)
class Load:
    """How much is measured."""

    users: int = 2_000
    capacity_events: int = 60_000  # at once, for the rate at which they are worked off
    naive_events: int = 6_000
    repeats: int = 3  # of these rates
    seconds_a_rate: float = 20.0
    several: bool = True  # also two daemons, and a Redis Cluster


QUICK = Load(users=300, capacity_events=6_000, naive_events=300, repeats=1, seconds_a_rate=1.0, several=False)


def measure_daemon(
    subject: Subject, load: Load, cache_bytes: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Throughput and latency of the daemon, with the same daemon without a cache beside it.

    Returns:
        ``events_per_s``, clicks of warm users worked off while more wait; ``spread``, (most - least) by median of
        that; ``latency_ms``, from the record's timestamp to the list in Redis at 25, 50 and 80 % of that rate: p50,
        p95, p99, p999, interpolated in a histogram, ``events_per_s``, and ``lag``, clicks that waited in the end;
        ``cold_events_per_s``, each click of a user of whom nothing is cached; ``two_daemons_per_s``, two that share
        the topic, and ``cluster_events_per_s``, one on a Redis Cluster of three nodes, unless the load is without;
        ``naive_events_per_s``, every window re-encoded; ``users``; the shape. Rates are medians.
    """
    config = subject.model.config
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, EmbeddedServers() as servers:
        save_model(Path(folder) / "model", subject.model, subject.vocab)

        def settings(**flags: Any) -> Settings:
            return load_settings(
                flags={
                    "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
                    "redis_url": servers.redis_url,
                    "model_dir": Path(folder) / "model",
                    "log_level": "WARNING",
                    "inference_cache_bytes": cache_bytes,
                    "http_port": free_port(),
                    **flags,
                }
            )

        async def run() -> dict[str, Any]:
            progress(f"daemon: filling Redis with {load.users:,} users' windows")
            one = settings()
            await ensure_topics(one.kafka, (one.kafka.topic,))
            async with RedisClient(one.redis) as redis:
                await fill_windows(redis, one, subject, load.users)
            report: dict[str, Any] = {
                "hidden": config.hidden_units,
                "blocks": config.num_blocks,
                "max_len": config.max_len,
                "items": config.num_items,
                "users": load.users,
            }
            async with _measured([one], load.users) as bench:
                progress("daemon: cold users")
                report["cold_events_per_s"] = await bench.worked_off(load.users)
                progress("daemon: as fast as possible")
                rates = [await bench.worked_off(load.capacity_events) for _ in range(load.repeats)]
                report["events_per_s"] = statistics.median(rates)
                report["spread"] = (max(rates) - min(rates)) / report["events_per_s"]
                report["latency_ms"] = {}
                for share in SHARES:
                    rate = share * report["events_per_s"]
                    progress(f"daemon: {rate:,.0f} clicks a second")
                    report["latency_ms"][f"{share:.0%}".rstrip("%")] = await bench.latencies_ms(
                        rate, round(rate * load.seconds_a_rate)
                    )

            async def median(what: str, several: list[Settings], events: int, first: int) -> float:
                async with _measured(several, load.users) as bench:
                    progress(f"daemon: {what}")
                    await bench.worked_off(first)  # to warm up
                    return statistics.median([await bench.worked_off(events) for _ in range(load.repeats)])

            many, few = load.capacity_events, load.naive_events
            if load.several:
                report["two_daemons_per_s"] = await median("two of them", [settings(), settings()], many, load.users)
                with EmbeddedCluster() as cluster:
                    spread = settings(redis_url=cluster.redis_url, redis_cluster=True)
                    async with RedisClient(spread.redis) as redis:
                        await fill_windows(redis, spread, subject, load.users)
                    report["cluster_events_per_s"] = await median("on a Redis Cluster", [spread], many, load.users)
            report["naive_events_per_s"] = await median(
                "without a cache", [settings(inference_cache_bytes=0)], few, few // 5
            )
            return report

        return asyncio.run(run())


class _Bench:
    """Daemons under measurement, which share one topic."""

    def __init__(
        self, settings: Settings, daemons: Sequence[DaemonProcess], http: aiohttp.ClientSession, users: int
    ) -> None:
        self._settings, self._daemons, self._http, self._users = settings, daemons, http, users

    async def worked_off(self, events: int) -> float:
        """Clicks a second, from the first that is handled to the last, fed as fast as possible."""
        idle = now = await self._read()
        end = now.published + events
        async with self._feeding(0.0, events) as feeder:
            while now.published == idle.published and feeder.returncode is None:  # it needs a while to start
                idle = now
                await asyncio.sleep(POLL_S)
                now = await self._read()
            last = await self._reach(end)
        return events / (last.at_s - idle.at_s)

    async def latencies_ms(self, rate_per_s: float, events: int) -> dict[str, float]:
        """Quantiles of click to list, the rate, and the lag when the feeder had ended; once the stream flows."""
        first = round(rate_per_s * FIRST_S)  # producer and broker stall once for a tenth of a second
        end = (await self._read()).published + first + events
        async with self._feeding(rate_per_s, first + events) as feeder:
            before = await self._reach(end - events)
            await feeder.wait()
            waiting = end - (await self._read()).published
            after = await self._reach(end)
        counts = [
            (bound, now - then)
            for (bound, now), (_, then) in zip(after.click_to_published, before.click_to_published, strict=True)
        ]
        found = {name: quantile(counts, q) for name, q in QUANTILES.items()}
        latencies = {name: seconds * 1000 for name, seconds in found.items() if seconds is not None}
        return {"events_per_s": rate_per_s} | latencies | {"lag": waiting}

    @contextlib.asynccontextmanager
    async def _feeding(self, rate_per_s: float, events: int) -> AsyncIterator[asyncio.subprocess.Process]:
        arguments = map(str, (rate_per_s, events, self._users))
        feeder = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SCRIPT, *arguments, env=environment(self._settings), stdin=subprocess.DEVNULL
        )
        try:
            yield feeder
            if await feeder.wait():
                raise StreamrecError("the feeder failed; its last words are above")
        finally:
            if feeder.returncode is None:
                feeder.kill()
                await feeder.wait()

    async def _reach(self, published: int) -> Reading:
        """Wait for so many; ask seldom until it is near, for every answer takes milliseconds of what is measured."""
        first = seen = await self._read()
        while seen.published < published:
            rate_per_s = (seen.published - first.published) / max(seen.at_s - first.at_s, POLL_S)
            left_s = (published - seen.published) / rate_per_s if rate_per_s else POLL_S
            await asyncio.sleep(min(max(left_s / 2, POLL_S), LONGEST_POLL_S))
            reading = await self._read()
            if reading.published > seen.published:
                seen = reading
            elif reading.at_s - seen.at_s > STUCK_S:
                raise StreamrecError(
                    f"the daemon handled no click for {STUCK_S:.0f} s; {published - seen.published} wait"
                )
        return seen

    async def _read(self) -> Reading:
        """Of all daemons together."""
        readings = [await self._read_one(daemon) for daemon in self._daemons]
        histograms = zip(*(reading.click_to_published for reading in readings), strict=True)
        return Reading(
            readings[-1].at_s,
            click_to_published=[(same[0][0], sum(count for _, count in same)) for same in histograms],
        )

    async def _read_one(self, daemon: DaemonProcess) -> Reading:
        while (reading := await daemon.read(self._http)) is None:
            await asyncio.sleep(POLL_S)
        return reading


@contextlib.asynccontextmanager
async def _measured(several: Sequence[Settings], users: int) -> AsyncIterator[_Bench]:
    with contextlib.ExitStack() as running:
        daemons = [running.enter_context(running_daemon(settings)) for settings in several]
        async with aiohttp.ClientSession() as http:
            for daemon in daemons:
                await daemon.wait_ready(http)
            yield _Bench(several[0], daemons, http, users)


def feed() -> None:
    """What the feeder does: clicks of all users in turn, at a rate, or as fast as possible where it is 0."""
    rate, events, users = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    settings = load_settings()
    assert settings.model.dir is not None
    ids = load_model(settings.model.dir).vocab.ids
    gc.freeze()  # or clicks would wait here, stamped already, while PyTorch is searched for garbage

    async def run() -> None:
        async with click_producer(settings.kafka, settings.events) as clicks:
            pacer = Pacer(rate)
            for event in _clicks(events, users, ids):
                await pacer.wait()
                await clicks.send(event)

    asyncio.run(run())


def _clicks(events: int, users: int, ids: Sequence[str]) -> Iterator[Event]:
    drawn = random.Random()
    order: Sequence[int] = drawn.sample(range(users), users)
    for number in range(events):
        yield Event(f"user{order[number % users]}", drawn.choice(ids), None)
