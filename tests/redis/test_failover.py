"""Every user of Redis follows a failover of real servers and sentinels, and no click is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from streamrec.commands.check import check
from streamrec.errors import RedisUnavailable
from streamrec.local.process import ServerProcess
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.lock import take_lock
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feeding, wait_caught_up
from support.oracle import assert_delivered
from support.redis_access import batch, event
from support.redis_cluster import node
from support.redis_sentinels import watched
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
log = logging.getLogger(__name__)


def store_of(redis: RedisClient, settings: Settings) -> SequenceStore:
    return SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, Metrics())


async def is_ready(daemon: Daemon) -> bool:
    assert (await daemon.get("/livez"))[0] == 200, "a restart would not help"
    return (await daemon.get("/readyz"))[0] == 200


async def make_replica(server: ServerProcess, primary: ServerProcess) -> None:
    """Do at once what the sentinels do some 10 s after a former primary has returned."""
    async with node(server) as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", primary.port)


async def test_a_primary_that_is_killed_under_a_stream_of_clicks_loses_nothing(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    async with watched(replicas=1) as servers:
        options = {
            "redis_url": servers.redis_url,
            "redis_wait_replicas": 1,
            "redis_timeout_s": 0.5,
            "model_dir": model_dir,
            "kafka_max_batch": 16,
        }
        settings = make_settings(**options)
        async with feeding(settings, seed=41, per_s=200):
            daemon = start_daemon(**options)
            await daemon.wait_handled(200)
            former, replica = servers.servers
            replica.pause()  # from here on the primary has writes that its replica never gets
            async with node(former) as client:
                await client.execute_command("CLIENT KILL", "TYPE", "replica")
            await eventually(lambda: daemon.has_logged("of redis_wait_replicas=1 have the writes"))
            former.kill()
            replica.resume()
            primary = await servers.wait_failed_over(former)
            former.start()  # with its data, and as a primary
            await make_replica(former, primary)
            await eventually(lambda: is_ready(daemon))
            await daemon.wait_more(200)
        await wait_caught_up(settings)
        await assert_delivered(settings)
        assert await daemon.metric("streamrec_rebalances_total") == 1, "it remained in its group"
        assert "Traceback" not in daemon.output


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_daemon_does_not_write_to_a_former_primary_that_still_takes_itself_for_the_primary(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    async with watched(replicas=1) as servers:
        options = {
            "redis_url": servers.redis_url,
            "redis_wait_replicas": 1,
            "model_dir": model_dir,
            "kafka_max_batch": 16,
        }
        settings = make_settings(**options)
        async with feeding(settings, seed=42, per_s=200):
            daemon = start_daemon(**options)
            await daemon.wait_handled(200)
            former = servers.servers[0]
            daemon.signal(signal.SIGSTOP)  # so that its connections to the former primary remain
            former.pause()
            await servers.wait_failed_over(former)
            former.resume()
            daemon.signal(signal.SIGCONT)
            await eventually(lambda: daemon.has_logged("of redis_wait_replicas=1 have the writes"))
            await eventually(lambda: is_replica(former))  # the sentinels have seen it
            await eventually(lambda: is_ready(daemon))
            await daemon.wait_more(200)
        await wait_caught_up(settings)
        await assert_delivered(settings)
        assert "Traceback" not in daemon.output


async def is_replica(server: ServerProcess) -> bool:
    async with node(server) as client:
        return bool((await client.info("replication"))["role"] == "slave")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("down_after_ms", [1_000, 5_000])
async def test_how_long_lists_are_stale_after_a_primary_is_killed(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, down_after_ms: int
) -> None:
    """Report the time until the first new list: primary, two replicas, and a WAIT for one of them.

    One of two does not make sure that every click survives, so this test does not compare sequences.
    """
    found_s = []
    async with watched(replicas=2, down_after_ms=down_after_ms) as servers:
        options = {
            "redis_url": servers.redis_url,
            "redis_wait_replicas": 1,
            "model_dir": model_dir,
            "serving_liveness_timeout_s": 60,
        }
        settings = make_settings(**options)
        async with feeding(settings, seed=43, per_s=100):
            daemon = start_daemon(**options)
            await daemon.wait_handled(200)
            for _ in range(5):
                former = await servers.primary()
                found_s.append(await stale_s(daemon, former))
                await servers.wait_failed_over(former)
                former.start()
                await eventually(lambda former=former: is_synced(former), timeout_s=60)
                await servers.wait_watched()
        await wait_caught_up(settings)
    log.info("down-after-milliseconds %d: lists are fresh after %s s", down_after_ms, [f"{s:.1f}" for s in found_s])


async def is_synced(server: ServerProcess) -> bool:
    async with node(server) as client:
        return bool((await client.info("replication")).get("master_link_status") == "up")


async def stale_s(daemon: Daemon, primary: ServerProcess) -> float:
    """Kill the primary; return the time until the first new list."""
    primary.kill()
    killed_at = time.monotonic()
    await asyncio.sleep(0.2)  # lists that are counted until now were published before: no failover is so fast
    before = await published(daemon)

    async def is_fresh() -> bool:
        return await published(daemon) > before

    await eventually(is_fresh, timeout_s=60, every_s=0.02)
    return time.monotonic() - killed_at


async def published(daemon: Daemon) -> float:
    return await daemon.metric("streamrec_recommendations_total", outcome="published")


@pytest.mark.parametrize("how", ["ordered", "frozen"])
async def test_every_use_of_redis_follows_a_failover(make_settings: MakeSettings, how: str) -> None:
    async with watched(replicas=1) as servers:
        settings = make_settings(redis_url=servers.redis_url, redis_timeout_s=0.3)
        former = servers.servers[0]
        async with RedisClient(settings.redis) as redis:
            keys, store = redis.keys, store_of(redis, settings)
            heard = asyncio.create_task(hear(redis, keys.models_channel))
            await store.append(batch(event("ann", "i", 0)))
            if how == "ordered":
                await servers.order_failover()
            else:
                former.pause()
            primary = await servers.wait_failed_over(former)

            async def is_followed() -> bool:
                with contextlib.suppress(RedisUnavailable):
                    await redis.ping()
                    await store.append(batch(event("ann", "i", 1)))
                    await take_lock(redis, keys.training, "me", 60_000)
                    await redis.notify(keys.models_channel, "m")
                    return heard.done()
                return False

            await eventually(is_followed)
            assert await heard == "m"
            assert [key async for key in redis.scan(keys.sequence("").removesuffix("}"))] == [keys.sequence("ann")]
            former.resume()
            async with node(primary) as client:
                (sequence,) = await store.read(["ann"])
                assert (await client.get(keys.sequence("ann"))).startswith(b"1 2 ")
                assert sequence.n == 2
                assert await client.get(keys.training) == b"me"
            (finding,) = [found async for found in check(settings) if found.part == "Redis"]
            assert finding.ok, finding.detail


async def hear(redis: RedisClient, channel: str) -> str:
    """Return the first message, and listen again after each error, as the daemon does."""
    while True:
        with contextlib.suppress(RedisUnavailable):
            async for message in redis.listen(channel):
                return message


async def test_a_former_primary_that_still_answers_is_left_at_the_next_ping(make_settings: MakeSettings) -> None:
    async with watched(replicas=1) as servers:
        settings = make_settings(redis_url=servers.redis_url)
        former = servers.servers[0]
        async with RedisClient(settings.redis) as redis:
            store = store_of(redis, settings)
            await store.append(batch(event("ann", "i", 0)))
            former.pause()
            await servers.wait_failed_over(former)
            former.resume()  # the connections to it work, and it takes itself for the primary for some seconds
            await redis.ping()
            await store.append(batch(event("ann", "i", 1)))
            async with node(former) as client:
                assert (await client.info("replication"))["role"] == "master", "else the test shows nothing"
                assert (await client.get(redis.keys.sequence("ann"))).startswith(b"1 1 ")


# --- one server behind a name that leads to another one after a failover


@contextlib.asynccontextmanager
async def name_of(server: list[ServerProcess]) -> AsyncIterator[int]:
    """Forward a port to the server that the list holds now, as a name leads to the address that it has now."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs = await asyncio.open_connection("127.0.0.1", server[0].port)
        await asyncio.gather(copied(reader, theirs[1]), copied(theirs[0], writer))

    async def copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    front = await asyncio.start_server(forward, "127.0.0.1", 0)
    yield front.sockets[0].getsockname()[1]
    front.close()


async def test_a_connection_that_answers_readonly_is_closed(make_settings: MakeSettings) -> None:
    async with watched(replicas=1) as servers:
        for sentinel in servers.sentinels:
            sentinel.kill()  # they would close the connections
        former, primary = servers.servers
        named = [former]
        async with name_of(named) as port:
            settings = make_settings(redis_url=f"redis://127.0.0.1:{port}/0")
            async with RedisClient(settings.redis) as redis:
                store = store_of(redis, settings)
                await store.append(batch(event("ann", "i", 0)))
                async with node(primary) as client:
                    await client.execute_command("REPLICAOF NO ONE")
                await make_replica(former, primary)
                named[0] = primary
                with pytest.raises(RedisUnavailable, match="read only"):
                    await store.append(batch(event("ann", "i", 1)))
                assert [s.n for s in await store.append(batch(event("ann", "i", 1)))] == [2]
