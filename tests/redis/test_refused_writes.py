"""A Redis that answers reads and refuses writes: the daemon waits, is not ready in any sample, and heals by itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from streamrec.commands.check import check
from streamrec.local.process import ServerProcess
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed, wait_caught_up
from support.oracle import assert_delivered
from support.redis_cluster import cluster_settings, node, running
from support.redis_sentinels import watched
from support.servers import own_redis_server
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
SAMPLE_EVERY_S = 0.05
LIVENESS_TIMEOUT_S = 2


@contextlib.asynccontextmanager
async def full(client: redis.Redis) -> AsyncIterator[None]:
    await client.config_set("maxmemory", 1)
    yield
    await client.config_set("maxmemory", 0)


@contextlib.asynccontextmanager
async def cannot_save(client: redis.Redis) -> AsyncIterator[None]:
    """MISCONF: a snapshot has failed, since a folder is where its file should be."""
    dump = Path((await client.config_get("dir"))["dir"]) / "dump.rdb"
    await client.config_set("save", "3600 1")
    dump.mkdir()
    await client.bgsave()
    await eventually(lambda: has_saved(client, "err"))
    yield
    dump.rmdir()
    await client.bgsave()
    await eventually(lambda: has_saved(client, "ok"))


async def has_saved(client: redis.Redis, outcome: str) -> bool:
    return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == outcome)


@contextlib.asynccontextmanager
async def without_replicas(client: redis.Redis) -> AsyncIterator[None]:
    await client.config_set("min-replicas-to-write", 1)
    yield
    await client.config_set("min-replicas-to-write", 0)


@contextlib.asynccontextmanager
async def read_only(client: redis.Redis) -> AsyncIterator[None]:
    await client.execute_command("REPLICAOF", "127.0.0.1", 1)
    yield
    await client.execute_command("REPLICAOF NO ONE")


async def assert_waits(daemon: Daemon, seconds: float) -> None:
    """Assert that /readyz is red and /livez green in every sample, and that nobody says that Redis is back."""
    samples, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        samples.append(((await daemon.get("/readyz"))[0], (await daemon.get("/livez"))[0]))
        await asyncio.sleep(SAMPLE_EVERY_S)
    assert set(samples) == {(503, 200)}, samples
    assert "reachable again" not in daemon.output


async def is_ready(daemon: Daemon, wanted: int = 200) -> bool:
    return (await daemon.get("/readyz"))[0] == wanted


def some_clicks(first: int) -> list[Record]:
    users = [f"u{n % 7}" for n in range(first, first + 30)]
    return [Record(user.encode(), click(user, f"i{n}", first + n)) for n, user in enumerate(users)]


@contextlib.asynccontextmanager
async def one_server() -> AsyncIterator[tuple[str, ServerProcess]]:
    with own_redis_server() as server:
        yield server.redis_url, server.redis


@contextlib.asynccontextmanager
async def behind_sentinels() -> AsyncIterator[tuple[str, ServerProcess]]:
    async with watched(replicas=0) as servers:
        yield servers.redis_url, servers.servers[0]


@pytest.mark.parametrize(
    ("refusing", "place"),
    [
        *((refusing, one_server) for refusing in (full, cannot_save, without_replicas, read_only)),
        *(
            pytest.param(refusing, behind_sentinels, marks=pytest.mark.long)
            for refusing in (full, cannot_save, without_replicas)
        ),
    ],
)
async def test_while_writes_are_refused_the_daemon_is_not_ready_and_alive(
    start_daemon: StartDaemon,
    make_settings: MakeSettings,
    model_dir: Path,
    refusing: Callable[[redis.Redis], contextlib.AbstractAsyncContextManager[None]],
    place: Callable[[], contextlib.AbstractAsyncContextManager[tuple[str, ServerProcess]]],
) -> None:
    async with place() as (url, server):
        options: dict[str, Any] = {
            "redis_url": url,
            "model_dir": model_dir,
            "serving_liveness_timeout_s": LIVENESS_TIMEOUT_S,
        }
        settings = make_settings(**options)
        daemon = start_daemon(**options)
        await daemon.wait_ready()
        await feed(settings, some_clicks(0))
        await wait_caught_up(settings)
        async with node(server) as client, refusing(client):
            await eventually(lambda: is_ready(daemon, 503), timeout_s=5)
            assert (await daemon.get("/readyz"))[1].startswith("Redis takes no writes")
            await assert_waits(daemon, seconds=2)
            await feed(settings, some_clicks(30))
            await eventually(lambda: daemon.has_logged("the batch waits"))
            await assert_waits(daemon, seconds=2 * LIVENESS_TIMEOUT_S)
        await eventually(lambda: is_ready(daemon), timeout_s=10)
        await wait_caught_up(settings, timeout_s=10)
        await assert_delivered(settings)
        assert daemon.output.count("reachable again") == 1
        assert "Traceback" not in daemon.output


async def test_one_primary_of_a_cluster_that_refuses_writes_is_enough(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    with running(replicas=0) as cluster:
        options = {
            **cluster_settings(cluster),
            "model_dir": model_dir,
            "serving_liveness_timeout_s": LIVENESS_TIMEOUT_S,
        }
        daemon = start_daemon(**options)
        await daemon.wait_ready()
        for number in range(3):
            async with node(cluster.nodes[number]) as client, without_replicas(client):
                await eventually(lambda: is_ready(daemon, 503), timeout_s=5)
                await assert_no_word_of_return(daemon, number)
            await eventually(lambda: is_ready(daemon), timeout_s=5)
        await feed(settings := make_settings(**options), some_clicks(0))
        await wait_caught_up(settings)
        await assert_delivered(settings)


async def assert_no_word_of_return(daemon: Daemon, earlier: int) -> None:
    for _ in range(40):
        assert not await is_ready(daemon)
        await asyncio.sleep(SAMPLE_EVERY_S)
    assert daemon.output.count("reachable again") == earlier


@pytest.mark.parametrize("refusing", [full, without_replicas, read_only])
async def test_check_does_not_call_a_redis_good_that_refuses_writes(
    make_settings: MakeSettings,
    model_dir: Path,
    refusing: Callable[[redis.Redis], contextlib.AbstractAsyncContextManager[None]],
) -> None:
    with own_redis_server() as server:
        settings = make_settings(redis_url=server.redis_url, model_dir=model_dir)
        async with node(server.redis) as client:
            async with refusing(client):
                (finding,) = [found async for found in check(settings) if found.part == "Redis"]
                assert not finding.ok, finding.detail
            (finding,) = [found async for found in check(settings) if found.part == "Redis"]
            assert finding.ok, finding.detail
