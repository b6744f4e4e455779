"""What open pages cost a daemon: clicks a second without one, with one, and with ten of them, in turn.

A page takes the server-sent events, as a browser does, and asks for a user and why once a second. All runs on one
machine, so what the pages themselves compute is part of the cost. `make viewers` runs it, for some three minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from sasrec import save_model
from streamrec.bench.daemon import Load, _measured
from streamrec.bench.engine import SHAPES, random_model
from streamrec.bench.users import fill_windows
from streamrec.kafka.topics import ensure_topics
from streamrec.local.servers import EmbeddedServers, free_port
from streamrec.redis.client import RedisClient
from streamrec.settings_sources import load_settings

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.study, pytest.mark.timeout(900)]

PAGES = (0, 1, 10)
EVENTS, ROUNDS = 20_000, 5


@contextlib.asynccontextmanager
async def open_pages(address: str, number: int) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
        tasks = [asyncio.create_task(call(http, address)) for call in (watch, look_up) for _ in range(number)]
        yield
        for task in tasks:
            assert not task.done(), "a page was sent away"
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def watch(http: aiohttp.ClientSession, address: str) -> None:
    async with http.get(f"{address}/api/live") as answer:
        assert answer.status == 200
        async for _ in answer.content:
            pass


async def look_up(http: aiohttp.ClientSession, address: str) -> None:
    while True:
        for path in ("user", "why"):  # why may be refused: clicks go first
            async with http.get(f"{address}/api/{path}?id=user1") as answer:
                await answer.read()
        await asyncio.sleep(1.0)


async def test_open_pages_cost_nothing_that_can_be_measured(tmp_path: Path) -> None:
    subject, load = random_model(SHAPES[1]), Load()
    save_model(tmp_path / "model", subject.model, subject.vocab)
    rates: dict[int, list[float]] = {pages: [] for pages in PAGES}
    with EmbeddedServers() as servers:
        settings = load_settings(
            flags={
                "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
                "redis_url": servers.redis_url,
                "model_dir": tmp_path / "model",
                "log_level": "WARNING",
                "http_port": free_port(),
            }
        )
        await ensure_topics(settings.kafka, (settings.kafka.topic,))
        async with RedisClient(settings.redis) as redis:
            await fill_windows(redis, settings, subject, load.users)
        async with _measured([settings], load.users) as bench:
            await bench.worked_off(EVENTS)  # to warm up
            for _ in range(ROUNDS):
                for pages in PAGES:
                    async with open_pages(f"http://{settings.http.host}:{settings.http.port}", pages):
                        rates[pages].append(await bench.worked_off(EVENTS))
    medians = {pages: statistics.median(found) for pages, found in rates.items()}
    for pages, found in rates.items():
        log.info(
            "%2d pages open: %s clicks a second, median %.0f (%.1f %% of without)",
            pages,
            " ".join(f"{rate:.0f}" for rate in sorted(found)),
            medians[pages],
            100 * medians[pages] / medians[0],
        )
    assert medians[1] > 0.9 * medians[0]
