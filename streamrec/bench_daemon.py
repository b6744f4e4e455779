"""Clicks a second and milliseconds from click to list, of a real daemon between a real Kafka and a real Redis.

Feeder, servers and daemon are processes of this machine. Users have full windows in Redis from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from sasrec import Event, load_model, save_model
from streamrec.bench_engine import Subject
from streamrec.daemon_process import DaemonProcess, Reading, environment, running_daemon
from streamrec.embedded import EmbeddedServers, free_port
from streamrec.errors import StreamrecError
from streamrec.kafka import ensure_topics
from streamrec.metrics import Metrics, quantile
from streamrec.redis_client import RedisClient
from streamrec.replay import Pacer, click_producer
from streamrec.schemas import ClickEvent, EventBatch
from streamrec.sequences import SequenceStore
from streamrec.settings import Settings, load_settings

SHARES = (0.25, 0.5, 0.8)
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999}
NO_PARTITION = 1_000_000  # of what stands in Redis beforehand: no click comes from there
FILL_USERS = 200
POLL_S = 0.05
STUCK_S = 60.0
SCRIPT = "from streamrec.bench_daemon import feed; feed()"


@dataclass(frozen=True)
class Load:
    """How much is measured."""

    users: int = 2_000
    capacity_events: int = 60_000  # at once, for the rate at which they are worked off
    naive_events: int = 6_000
    seconds_a_rate: float = 15.0


QUICK = Load(users=300, capacity_events=6_000, naive_events=600, seconds_a_rate=2.0)


def measure_daemon(
    subject: Subject, load: Load, cache_bytes: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Throughput and latency of the daemon, with the same daemon without a cache beside it.

    Returns:
        ``events_per_s``, clicks of warm users worked off while more wait; ``latency_ms``, from the record's timestamp
        to the list in Redis at 25, 50 and 80 % of that rate: p50, p95, p99, p999, interpolated in a histogram, and
        ``lag``, clicks that waited in the end; ``cold_events_per_s``, each click of a user of whom nothing is cached;
        ``naive_events_per_s``, every window re-encoded; ``users``; the shape.
    """
    config = subject.model.config
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, EmbeddedServers() as servers:
        save_model(Path(folder) / "model", subject.model, subject.vocab)
        flags = {
            "kafka_bootstrap_servers": servers.kafka_bootstrap_servers, "redis_url": servers.redis_url,
            "model_dir": Path(folder) / "model", "log_level": "WARNING", "cache_bytes": cache_bytes,
        }  # fmt: skip

        async def run() -> dict[str, Any]:
            settings = load_settings(flags=flags | {"http_port": free_port()})
            progress(f"daemon: filling Redis with {load.users:,} users' windows")
            await ensure_topics(settings, (settings.kafka_topic,))
            await _fill(settings, subject, load.users)
            report: dict[str, Any] = {
                "hidden": config.hidden_units, "blocks": config.num_blocks, "max_len": config.max_len,
                "items": config.num_items, "users": load.users,
            }  # fmt: skip
            async with _measured(settings, load.users) as bench:
                progress("daemon: cold users")
                report["cold_events_per_s"] = await bench.worked_off(load.users)
                progress("daemon: as fast as possible")
                report["events_per_s"] = await bench.worked_off(load.capacity_events)
                report["latency_ms"] = {}
                for share in SHARES:
                    rate = share * report["events_per_s"]
                    progress(f"daemon: {rate:,.0f} clicks a second")
                    report["latency_ms"][f"{share:.0%}".rstrip("%")] = await bench.latencies_ms(
                        rate, round(rate * load.seconds_a_rate)
                    )
            naive = load_settings(flags=flags | {"http_port": free_port(), "cache_bytes": 0})
            async with _measured(naive, load.users) as bench:
                progress("daemon: without a cache")
                await bench.worked_off(load.naive_events // 5)
                report["naive_events_per_s"] = await bench.worked_off(load.naive_events)
            return report

        return asyncio.run(run())


class _Bench:
    """One daemon under measurement."""

    def __init__(self, settings: Settings, daemon: DaemonProcess, http: aiohttp.ClientSession, users: int) -> None:
        self._settings, self._daemon, self._http, self._users = settings, daemon, http, users

    async def worked_off(self, events: int) -> float:
        """Clicks a second, from the first that is handled to the last, fed as fast as possible."""
        idle = now = await self._read()
        end = now.applied + events
        async with self._feeding(0.0, events) as feeder:
            while now.applied == idle.applied and feeder.returncode is None:  # it needs a while to start
                idle = now
                await asyncio.sleep(POLL_S)
                now = await self._read()
            last = await self._reach(end)
        return events / (last.at_s - idle.at_s)

    async def latencies_ms(self, rate_per_s: float, events: int) -> dict[str, float]:
        """Quantiles of click to list, and the lag when the feeder had ended."""
        before = await self._read()
        async with self._feeding(rate_per_s, events) as feeder:
            await feeder.wait()
            waiting = before.applied + events - (await self._read()).applied
            after = await self._reach(before.applied + events)
        counts = [
            (bound, now - then)
            for (bound, now), (_, then) in zip(after.click_to_published, before.click_to_published, strict=True)
        ]
        found = {name: quantile(counts, q) for name, q in QUANTILES.items()}
        return {name: seconds * 1000 for name, seconds in found.items() if seconds is not None} | {"lag": waiting}

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

    async def _reach(self, applied: int) -> Reading:
        seen, since_s = -1, time.monotonic()
        while True:
            reading = await self._read()
            if reading.applied >= applied:
                return reading
            if reading.applied > seen:
                seen, since_s = reading.applied, time.monotonic()
            if time.monotonic() - since_s > STUCK_S:
                raise StreamrecError(f"the daemon handled no click for {STUCK_S:.0f} s; {applied - seen} wait")
            await asyncio.sleep(POLL_S)

    async def _read(self) -> Reading:
        while (reading := await self._daemon.read(self._http)) is None:
            await asyncio.sleep(POLL_S)
        return reading


@contextlib.asynccontextmanager
async def _measured(settings: Settings, users: int) -> AsyncIterator[_Bench]:
    with running_daemon(settings) as daemon:
        async with aiohttp.ClientSession() as http:
            await daemon.wait_ready(http)
            yield _Bench(settings, daemon, http, users)


async def _fill(settings: Settings, subject: Subject, users: int) -> None:
    """Full windows in Redis, as if the users had clicked."""
    max_len, ids = subject.model.config.max_len, subject.vocab.ids
    drawn = random.Random(0)
    async with RedisClient(settings) as redis:
        store = SequenceStore(redis, settings, max_len, Metrics())
        for start in range(0, users, FILL_USERS):
            events = [
                ClickEvent(f"user{user}", drawn.choice(ids), _now_ms(), NO_PARTITION, user * max_len + step, _now_ms())
                for user in range(start, min(users, start + FILL_USERS))
                for step in range(max_len)
            ]
            await store.append(EventBatch(events))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def feed() -> None:
    """What the feeder does: clicks of all users in turn, at a rate, or as fast as possible where it is 0."""
    rate, events, users = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    settings = load_settings()
    assert settings.model_dir is not None
    ids = load_model(settings.model_dir).vocab.ids

    async def run() -> None:
        pacer = Pacer(rate)
        async with click_producer(settings) as clicks:
            for event in _clicks(events, users, ids):
                await pacer.wait()
                await clicks.send(event)

    asyncio.run(run())


def _clicks(events: int, users: int, ids: Sequence[str]) -> Iterator[Event]:
    drawn = random.Random()
    order: Sequence[int] = drawn.sample(range(users), users)
    for number in range(events):
        yield Event(f"user{order[number % users]}", drawn.choice(ids), None)
