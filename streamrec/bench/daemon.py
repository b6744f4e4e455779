"""Throughput and latency of a real daemon between a real Kafka and a real Redis.

Feeder, servers and daemon are processes on this machine. Every user has a full window in Redis from the start.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasrec import save_model
from streamrec.bench.engine import Subject
from streamrec.bench.meter import Meter, metered
from streamrec.bench.users import fill_windows
from streamrec.kafka.topics import ensure_topics
from streamrec.local.apache_kafka import kafka_home
from streamrec.local.cluster import EmbeddedCluster
from streamrec.local.process import free_port
from streamrec.local.servers import LocalServers
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

SHARES = (0.25, 0.5, 0.8)  # of the highest throughput


@dataclass(frozen=True)
class Load:
    """The amount of measuring. ``several``: also measure two daemons, and a Redis Cluster."""

    users: int = 2_000
    capacity_events: int = 60_000  # sent as fast as possible, to measure the throughput
    naive_events: int = 6_000  # the same without a cache
    repeats: int = 3
    seconds_per_rate: float = 20.0
    several: bool = True


QUICK = Load(users=300, capacity_events=6_000, naive_events=300, repeats=1, seconds_per_rate=1.0, several=False)


def measure_daemon(
    subject: Subject, load: Load, cache_bytes: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure throughput and latency of the daemon, with and without a cache.

    Kafka is the Apache Kafka that KAFKA_HOME names, else the embedded server.

    Returns:
        ``broker``: name and version of the Kafka server.
        ``hidden``, ``blocks``, ``max_len``, ``items``: the model. ``users``. Rates are clicks per second, medians:
        ``events_per_s``: cached users, sent as fast as possible; ``spread``: (max - min) / median of these rates.
        ``cold_events_per_s``: the first click of each user, so that no window is cached.
        ``naive_events_per_s``: without a cache, so that every window is encoded.
        ``two_daemons_per_s``: two daemons on one topic; ``cluster_events_per_s``: one daemon on a Redis Cluster with
        three nodes; both only if ``load.several``.
        ``latency_ms``: for 25, 50 and 80 % of ``events_per_s``, from the record's timestamp to the list in Redis:
        p50, p95, p99, p999, interpolated in a histogram; ``events_per_s``; ``lag``: waiting clicks at the end.
    """
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, LocalServers(kafka_home(os.environ)) as servers:
        model_dir = Path(folder) / "model"
        save_model(model_dir, subject.model, subject.vocab)
        items = Path(folder) / "items.json"
        items.write_text(json.dumps(subject.vocab.ids), "utf-8")
        flags = {
            "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
            "redis_url": servers.redis_url,
            "model_dir": model_dir,
            "log_level": "WARNING",
            "inference_cache_bytes": cache_bytes,
        }
        return asyncio.run(_DaemonBench(subject, load, flags, servers, items, progress).run())


@dataclass(frozen=True)
class _DaemonBench:
    """The measurements of a daemon, one after another."""

    subject: Subject
    load: Load
    flags: dict[str, Any]
    servers: LocalServers
    items: Path
    progress: Callable[[str], None]

    async def run(self) -> dict[str, Any]:
        """Return all figures."""
        config, load, one = self.subject.model.config, self.load, self._settings()
        broker = self.servers.kafka_name
        self.progress(f"daemon: on {broker}; filling Redis with the windows of {load.users:,} users")
        await ensure_topics(one.kafka, (one.kafka.topic,))
        await self._fill(one)
        report: dict[str, Any] = {
            "broker": broker,
            "hidden": config.hidden_units,
            "blocks": config.num_blocks,
            "max_len": config.max_len,
            "items": config.num_items,
            "users": load.users,
        }
        report |= await self._one_daemon(one)
        events = load.capacity_events
        if load.several:
            two = [self._settings(), self._settings()]
            report["two_daemons_per_s"] = await self._median_rate("two daemons", two, events, load.users)
            with EmbeddedCluster() as cluster:
                clustered = self._settings(redis_url=cluster.redis_url, redis_cluster=True)
                await self._fill(clustered)
                rate = await self._median_rate("on a Redis Cluster", [clustered], events, load.users)
                report["cluster_events_per_s"] = rate
        uncached, few = self._settings(inference_cache_bytes=0), load.naive_events
        report["naive_events_per_s"] = await self._median_rate("without a cache", [uncached], few, few // 5)
        return report

    def _settings(self, **changes: Any) -> Settings:
        return load_settings(flags={**self.flags, "http_port": free_port(), **changes})

    async def _fill(self, settings: Settings) -> None:
        async with RedisClient(settings.redis) as redis:
            await fill_windows(redis, settings, self.subject, self.load.users)

    async def _one_daemon(self, settings: Settings) -> dict[str, Any]:
        """Measure cold users, the highest throughput, and latencies below it."""
        load = self.load
        async with metered([settings], self.servers.program, load.users, self.items) as meter:
            self.progress("daemon: cold users")
            cold = await meter.throughput(load.users)
            self.progress("daemon: as fast as possible")
            rates = [await meter.throughput(load.capacity_events) for _ in range(load.repeats)]
            median = statistics.median(rates)
            return {
                "cold_events_per_s": cold,
                "events_per_s": median,
                "spread": (max(rates) - min(rates)) / median,
                "latency_ms": {
                    f"{share:.0%}".rstrip("%"): await self._latencies(meter, share * median) for share in SHARES
                },
            }

    async def _latencies(self, meter: Meter, rate_per_s: float) -> dict[str, float]:
        self.progress(f"daemon: {rate_per_s:,.0f} clicks per second")
        return await meter.latencies_ms(rate_per_s, round(rate_per_s * self.load.seconds_per_rate))

    async def _median_rate(self, name: str, daemons: list[Settings], events: int, warm_up_events: int) -> float:
        """Return the median throughput of daemons that share the topic."""
        async with metered(daemons, self.servers.program, self.load.users, self.items) as meter:
            self.progress(f"daemon: {name}")
            await meter.throughput(warm_up_events)
            return statistics.median([await meter.throughput(events) for _ in range(self.load.repeats)])
