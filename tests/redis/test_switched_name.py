"""A name or relay leads to a new primary, and the former one still answers: everything follows, without a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamrec.errors import RedisUnavailable
from streamrec.local.process import ServerProcess
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.lock import take_lock
from streamrec.serving.online import OnlineCounts
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed, wait_caught_up
from support.oracle import assert_delivered
from support.redis_cluster import node
from support.relay import Relay, replicate, switch, two_servers
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]


@pytest.fixture
def pair() -> Iterator[list[ServerProcess]]:
    """A primary and a server that becomes its replica."""
    with two_servers() as servers:
        yield servers


async def is_ready(daemon: Daemon) -> bool:
    assert (await daemon.get("/livez"))[0] == 200, "a restart would not help"
    return (await daemon.get("/readyz"))[0] == 200


async def test_a_daemon_behind_a_name_that_was_switched_applies_all_clicks_soon(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, pair: list[ServerProcess]
) -> None:
    former, new = pair
    await replicate(new, former)
    async with Relay(former) as relay:
        options: dict[str, Any] = {
            "redis_url": f"redis://127.0.0.1:{relay.port}/0",
            "model_dir": model_dir,
            "lists_refresh_s": 0.1,
        }
        settings = make_settings(**options)
        daemon = start_daemon(**options)
        await daemon.wait_ready()
        for turn in range(4):
            before, after = pair if turn % 2 == 0 else pair[::-1]
            records = [Record(f"u{n}".encode(), click(f"u{n}", f"i{turn}", 100 * turn + n)) for n in range(20)]
            await feed(settings, records[:10])
            await switch(relay, before, after)
            await feed(settings, records[10:])
            await wait_caught_up(settings, timeout_s=10)
            await eventually(lambda: is_ready(daemon), timeout_s=10)
        await assert_delivered(settings)
        assert await daemon.metric("streamrec_rebalances_total") == 1
        assert "Traceback" not in daemon.output


async def test_every_use_of_redis_follows_the_name(make_settings: MakeSettings, pair: list[ServerProcess]) -> None:
    former, new = pair
    await replicate(new, former)
    async with Relay(former) as relay:
        settings = make_settings(redis_url=f"redis://127.0.0.1:{relay.port}/0")
        async with RedisClient(settings.redis) as redis:
            heard = asyncio.create_task(hear(redis, redis.keys.models_channel))
            counts = OnlineCounts(redis, Metrics())
            await asyncio.gather(*(redis.ping() for _ in range(5)))  # all connections are open
            async with in_use(redis, 3):  # so that they are busy when the first error comes
                await switch(relay, former, new)
                with pytest.raises(RedisUnavailable):
                    await redis.set("a", b"b", 60)
                await redis.set("a", b"b", 60)
            async with node(former) as client:  # a replica would forward the messages of its primary
                await client.execute_command("REPLICAOF", "127.0.0.1", 1)
            for _ in range(5):
                await asyncio.gather(*(redis.set("a", b"c", 60) for _ in range(6)))  # over all connections
            for step in (
                redis.probe,
                lambda: take_lock(redis, redis.keys.training, "me", 1000),
                lambda: flushed(counts),
                lambda: notified(redis, heard),
            ):
                await eventually(lambda step=step: succeeds(step), timeout_s=10)
            assert await heard == "m"


@contextlib.asynccontextmanager
async def in_use(redis: RedisClient, number: int) -> AsyncIterator[None]:
    """Have connections in use until the block ends."""
    pool = (await redis._nodes.client_of("")).connection_pool
    connections = [await pool.get_connection() for _ in range(number)]
    yield
    for connection in connections:
        await pool.release(connection)


async def hear(redis: RedisClient, channel: str) -> str:
    while True:
        with contextlib.suppress(RedisUnavailable):
            async for message in redis.listen(channel):
                return message


async def flushed(counts: OnlineCounts) -> None:
    counts.count("m", ["a"], ["a"], 0)
    await counts.flush()


async def notified(redis: RedisClient, heard: asyncio.Task[str]) -> None:
    await redis.notify(redis.keys.models_channel, "m")
    await asyncio.sleep(0.1)
    if not heard.done():
        raise RedisUnavailable("the listener is at the former primary")


async def succeeds(step: Callable[[], Any]) -> bool:
    with contextlib.suppress(RedisUnavailable):
        await step()
        return True
    return False
