"""The cost of open pages: throughput of a daemon with no page, one page, and ten pages, in turn.

A page receives the server-sent events as a browser does, and once a second requests a user and an explanation.
Everything runs on one machine, so the cost includes the work of the pages. `make viewers` runs it in about 3 minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from sasrec import save_model
from streamrec.bench.daemon import Load
from streamrec.bench.engine import SHAPES, random_model
from streamrec.bench.meter import metered
from streamrec.bench.users import fill_windows
from streamrec.kafka.topics import ensure_topics
from streamrec.local.apache_kafka import kafka_home
from streamrec.local.process import free_port
from streamrec.local.servers import LocalServers
from streamrec.redis.client import RedisClient
from streamrec.settings_sources import load_settings

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.study, pytest.mark.timeout(900)]

PAGES = (0, 1, 10)
EVENTS, ROUNDS = 20_000, 5


@contextlib.asynccontextmanager
async def open_pages(address: str, number: int) -> AsyncIterator[None]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http:
        tasks = [
            asyncio.create_task(call(http, address)) for call in (receive_updates, request_user) for _ in range(number)
        ]
        yield
        for task in tasks:
            assert not task.done(), "a page was refused"
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def receive_updates(http: aiohttp.ClientSession, address: str) -> None:
    async with http.get(f"{address}/api/live") as answer:
        assert answer.status == 200
        async for _ in answer.content:
            pass


async def request_user(http: aiohttp.ClientSession, address: str) -> None:
    while True:
        for path in ("user", "why"):  # an explanation may be refused: clicks go first
            async with http.get(f"{address}/api/{path}?id=user1") as answer:
                await answer.read()
        await asyncio.sleep(1.0)


async def test_an_open_page_costs_less_than_a_tenth_of_the_throughput(tmp_path: Path) -> None:
    subject, load = random_model(SHAPES[1]), Load()
    save_model(tmp_path / "model", subject.model, subject.vocab)
    rates: dict[int, list[float]] = {pages: [] for pages in PAGES}
    items = tmp_path / "items.json"
    items.write_text(json.dumps(subject.vocab.ids))
    with LocalServers(kafka_home(os.environ)) as servers:
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
        async with metered([settings], servers.program, load.users, items) as meter:
            await meter.throughput(EVENTS)  # to warm up
            for _ in range(ROUNDS):
                for pages in PAGES:
                    async with open_pages(f"http://{settings.http.host}:{settings.http.port}", pages):
                        rates[pages].append(await meter.throughput(EVENTS))
    medians = {pages: statistics.median(found) for pages, found in rates.items()}
    for pages, found in rates.items():
        log.info(
            "%2d open pages: %s clicks per second, median %.0f (%.1f %% of the rate without a page)",
            pages,
            " ".join(f"{rate:.0f}" for rate in sorted(found)),
            medians[pages],
            100 * medians[pages] / medians[0],
        )
    assert medians[1] > 0.9 * medians[0]
