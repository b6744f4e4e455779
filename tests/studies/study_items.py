"""The table of items and the sweep of published lists, measured.

`make items KAFKA_HOME=...` takes about 5 minutes. ITEMS is the size of the table [1000000], LISTS the number of
published lists [100000], PER_S the clicks per second during the sweeps [3500: half of what one daemon takes], SECONDS
the time in which items go, one after another [150].
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from sasrec import ItemVocab, save_model
from streamrec.bench.engine import SHAPES, random_model
from streamrec.bench.meter import metered
from streamrec.bench.users import fill_windows
from streamrec.items.source import item_source, refusals_of
from streamrec.kafka.producer import Producer
from streamrec.kafka.topics import COMPACTED, ensure_topics
from streamrec.local.apache_kafka import kafka_home
from streamrec.local.daemon import environment
from streamrec.local.process import free_port
from streamrec.local.servers import LocalServers
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.schemas import PublishedList
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.study, pytest.mark.timeout(1_500)]

ITEMS, LISTS = int(os.environ.get("ITEMS", "1000000")), int(os.environ.get("LISTS", "100000"))
PER_S, SECONDS = float(os.environ.get("PER_S", "3500")), float(os.environ.get("SECONDS", "150"))
USERS, TOP_K = 2_000, 20
IN_FLIGHT = 20_000
FOLLOWED = 200  # lists of each item that are read again and again, until they are without it
CATEGORIES = [f"category {n}" for n in range(200)]


def value_of(number: int) -> bytes:
    """Return an item of about 120 bytes."""
    generator = random.Random(number)
    categories = generator.sample(CATEGORIES, 2)
    return msgspec.json.encode(
        {
            "title": f"Item number {number}, {generator.choice(CATEGORIES)}",
            "categories": categories,
            "available": number % 10 > 0,
            "price": round(generator.uniform(1, 100), 2),
        }
    )


async def send_items(settings: Settings, ids: list[str]) -> int:
    """Produce an item for each id; return the bytes of keys and values."""
    producer, sent, size = Producer(settings.kafka), [], 0
    await ensure_topics(settings.kafka, (settings.items.topic,), COMPACTED)
    await producer.start()
    try:
        for number, item in enumerate(ids):
            key, value = item.encode(), value_of(number)
            size += len(key) + len(value)
            sent.append(await producer.send(settings.items.topic, key, value))
            if len(sent) >= IN_FLIGHT:
                await producer.settle(sent)
                sent = []
        await producer.settle(sent)
    finally:
        await producer.stop()
    return size


async def measure_reading() -> None:
    """Read the table as a daemon does; print seconds and bytes."""
    settings, process = load_settings(), psutil.Process()
    refusals = refusals_of(settings.items)
    source = item_source(settings.items, settings.kafka, refusals, Metrics())
    assert source is not None
    gc.collect()
    before = process.memory_info().rss
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    await source.read()
    read_s, read_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    gc.collect()
    memory = process.memory_info().rss - before
    vocab = ItemVocab(f"item{n:08}" for n in range(ITEMS))
    started_cpu_s = time.process_time()
    await refusals.prepare(vocab)
    mask_cpu_s = time.process_time() - started_cpu_s
    found = {
        "items": len(refusals.table or ()),
        "read_s": read_s,
        "read_cpu_s": read_cpu_s,
        "bytes": memory,
        "mask_cpu_s": mask_cpu_s,
    }
    assert refusals.of(vocab).count == len(range(0, ITEMS, 10))
    await source.aclose()
    sys.stdout.write(json.dumps(found) + "\n")


async def test_a_table_of_many_items() -> None:
    with LocalServers(kafka_home(os.environ)) as servers:
        flags = {"kafka_bootstrap_servers": servers.kafka_bootstrap_servers, "items_topic": "items"}
        settings = load_settings(flags=flags)
        size = await send_items(settings, [f"item{n:08}" for n in range(ITEMS)])
        reading = await asyncio.create_subprocess_exec(
            sys.executable, __file__, env=environment(settings), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await reading.communicate()
        found = json.loads(output)
        log.info(
            "%s: %d items, read in %.1f s (CPU %.1f s), %.0f bytes an item (%.0f of them key and value), "
            "mask CPU %.2f s",
            servers.kafka_name,
            found["items"],
            found["read_s"],
            found["read_cpu_s"],
            found["bytes"] / ITEMS,
            size / ITEMS,
            found["mask_cpu_s"],
        )
        assert found["items"] == ITEMS


async def test_reach_of_sweeps_under_clicks() -> None:
    subject = random_model(SHAPES[1])
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, LocalServers(kafka_home(os.environ)) as servers:
        save_model(Path(folder) / "model", subject.model, subject.vocab)
        ids = Path(folder) / "items.json"
        ids.write_text(json.dumps(subject.vocab.ids))
        flags = {
            "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
            "redis_url": servers.redis_url,
            "model_dir": Path(folder) / "model",
            "items_topic": "items",
            "log_level": "WARNING",
            "http_port": free_port(),
        }
        settings = load_settings(flags=flags)
        await ensure_topics(settings.kafka, (settings.kafka.topic,))
        await send_items(settings, list(subject.vocab.ids))
        async with RedisClient(settings.redis) as redis:
            await fill_windows(redis, settings, subject, USERS)
            holders = await fill_lists(redis, [item for n, item in enumerate(subject.vocab.ids) if n % 10])
            for server in await redis.primaries():
                await server.config_set("slowlog-log-slower-than", 500)
                await server.config_set("slowlog-max-len", 100_000)
            async with metered([settings], servers.program, USERS, ids) as meter:
                await log_cost(redis, settings, holders)
                await meter.throughput(5 * USERS)  # the users are in the cache
                clicks = asyncio.create_task(meter.latencies_ms(PER_S, round(PER_S * SECONDS)))
                await asyncio.sleep(3.0)
                reach_s = await let_items_go(redis, settings, holders, until=clicks.done)
                latencies = await clicks
            took_us = [
                entry["duration"]
                for server in await redis.primaries()
                for entry in await server.slowlog_get(100_000)
                if entry["command"].startswith(b"EVALSHA") and b":recs:*" in entry["command"]
            ]
        last_s, each_s = [times[-1] for times in reach_s], np.concatenate(reach_s)
        log.info(
            "%s: %d lists, %d items gone: until the last list is without it p50 %.2f, p99 %.2f, max %.2f s; a list "
            "p99 %.2f s; %d slices over 0.5 ms: p50 %.2f, p99 %.2f, max %.2f ms; clicks at %.0f per second p50 %.1f, "
            "p99 %.1f ms",
            servers.kafka_name,
            LISTS,
            len(last_s),
            *np.quantile(last_s, (0.5, 0.99, 1.0)),
            np.quantile(each_s, 0.99),
            len(took_us),
            *np.quantile(np.array(took_us) / 1000, (0.5, 0.99, 1.0)),
            PER_S,
            latencies["p50"],
            latencies["p99"],
        )


async def log_cost(redis: RedisClient, settings: Settings, holders: dict[str, list[str]]) -> None:
    """Log what sweeps cost while nobody clicks: the processor time of the server."""
    (server,) = await redis.primaries()
    ends = iter((False, True))
    await let_items_go(redis, settings, holders, lambda: next(ends))  # then the sweep of the daemon's start has ended
    before, until_s = await server.info("cpu"), time.monotonic() + 10.0
    reach_s = await let_items_go(redis, settings, holders, lambda: time.monotonic() > until_s, read_every_s=0.5)
    after = await server.info("cpu")
    cpu_s = sum(after[name] - before[name] for name in ("used_cpu_user", "used_cpu_sys")) / len(reach_s)
    log.info("%d lists, no clicks: a sweep costs the server %.2f s of a core (%d sweeps)", LISTS, cpu_s, len(reach_s))


async def fill_lists(redis: RedisClient, ids: list[str]) -> dict[str, list[str]]:
    """Publish lists of random items; return the keys of the lists that have an item."""
    generator, holders = random.Random(0), dict[str, list[str]]()
    (server,) = await redis.primaries()
    for begin in range(0, LISTS, 2_000):
        pipeline = server.pipeline(transaction=False)
        for number in range(begin, min(LISTS, begin + 2_000)):
            items, key = generator.sample(ids, TOP_K), redis.keys.recommendation(f"reader{number}")
            for item in items:
                holders.setdefault(item, []).append(key)
            scores = [round(generator.uniform(0, 9), 5) for _ in items]
            pipeline.set(key, msgspec.json.encode(PublishedList(items, scores, "20260101-1", 1, 2, 3)), ex=86_400)
        await pipeline.execute()
    return holders


async def let_items_go(
    redis: RedisClient,
    settings: Settings,
    holders: dict[str, list[str]],
    until: Callable[[], bool],
    read_every_s: float = 0.02,
) -> list[list[float]]:
    """Make items unavailable one after another; return for each the times in s until its lists are without it."""
    producer, found = Producer(settings.kafka), []
    await producer.start()
    try:
        for item in random.sample(sorted(holders), len(holders)):
            if until():
                break
            waiting, needle, times = holders.pop(item)[:FOLLOWED], json.dumps(item).encode(), list[float]()
            sent = await producer.send(settings.items.topic, item.encode(), b'{"available": false}')
            await producer.settle([sent])
            gone_s = time.monotonic()
            while waiting:
                values = await redis.get_many(waiting)
                now_s = time.monotonic() - gone_s
                left = [key for key, value in zip(waiting, values, strict=True) if value and needle in value]
                times += [now_s] * (len(waiting) - len(left))
                waiting = left
                assert now_s < 60, f"{len(left)} lists still have {item}"
                await asyncio.sleep(read_every_s)
            found.append(times)
            await asyncio.sleep(random.uniform(0.2, 0.6))
    finally:
        await producer.stop()
    return found


if __name__ == "__main__":
    asyncio.run(measure_reading())
