"""While slots move and primaries die, no click is lost or counted twice; writes wait for replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamrec.errors import EmbeddedError, RedisUnavailable
from streamrec.local.cluster import EmbeddedCluster
from streamrec.local.process import ServerProcess
from streamrec.local.servers import answers_ping, redis_command
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import Recommendation
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feeding, wait_caught_up
from support.oracle import assert_delivered
from support.redis_access import batch, event
from support.redis_cluster import MovingSlot, cluster_settings, node, owner_of, running, slot_of
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
REBALANCES = "streamrec_rebalances_total"


async def test_slots_that_move_in_mid_stream_lose_nothing(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    with running(replicas=0) as cluster:
        options = {**cluster_settings(cluster), "model_dir": model_dir, "kafka_max_batch": 16, "lists_refresh_s": 0.2}
        settings, keys = make_settings(**options), Keys(make_settings().redis.key_prefix)
        users = [f"u{n}" for n in range(40)] + [str(n) for n in range(1000, 1020)]
        names = [keys.popular, keys.popularity, *map(keys.sequence, users)]
        async with feeding(settings, seed=31, per_s=300, at_least=2_000):
            daemon = start_daemon(**options)
            await daemon.wait_handled(1)  # most users are new while their slots move
            for number, slot in enumerate(dict.fromkeys(map(slot_of, names))):
                source = await owner_of(cluster, slot)
                move = MovingSlot(cluster, slot, source, (source + 1) % 3)
                await move.begin()
                await asyncio.sleep(0.02)  # some clicks while it is half moved
                await move.move_keys(at_once=1 + number % 2)
                await move.end()
            await daemon.wait_more(100)
        await wait_caught_up(settings)
        await assert_delivered(settings)
        assert await daemon.metric(REBALANCES) == 1
        assert not daemon.lines("ERROR"), daemon.output


async def test_slots_that_move_all_at_once_lose_nothing(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    with running(replicas=0) as cluster:
        options = {**cluster_settings(cluster), "model_dir": model_dir, "kafka_max_batch": 16}
        settings = make_settings(**options)
        async with feeding(settings, seed=32, per_s=300, at_least=1_000), node(cluster.nodes[0]) as first:
            if not (await first.info("server")).get("valkey_version", "0").startswith("9."):
                pytest.skip("the server moves slots one by one only")
            daemon = start_daemon(**options)
            await daemon.wait_handled(300)
            low, high = cluster.slots[0][0], cluster.slots[0][-1]
            await first.execute_command("CLUSTER MIGRATESLOTS", "SLOTSRANGE", low, high, "NODE", cluster.node_id(1))
            await eventually(lambda: has_slot(cluster, low, 1))
            await daemon.wait_more(100)
        await wait_caught_up(settings)
        await assert_delivered(settings)


async def has_slot(cluster: EmbeddedCluster, slot: int, number: int) -> bool:
    return await owner_of(cluster, slot, queried=2) == number


async def test_a_primary_that_is_killed_loses_nothing_though_its_replica_lagged(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    with running(replicas=1) as cluster:
        options = {
            **cluster_settings(cluster),
            "model_dir": model_dir,
            "kafka_max_batch": 16,
            "redis_wait_replicas": 1,
            "redis_timeout_s": 0.5,
        }
        settings = make_settings(**options)
        async with feeding(settings, seed=33, per_s=200):
            daemon = start_daemon(**options)
            await daemon.wait_handled(200)
            for primary in (1, 0):  # the second is the one that the URL names
                (replica,) = cluster.replicas_of(primary)
                if primary == 0:  # from here on it has writes that its replica never gets
                    replica.pause()
                    async with node(cluster.nodes[primary]) as client:
                        await client.execute_command("CLIENT KILL", "TYPE", "replica")
                    before = daemon.output.count("the batch waits")
                    await eventually(lambda before=before: logs_more_often(daemon, "the batch waits", before))
                cluster.nodes[primary].kill()
                replica.resume()
                await eventually(lambda replica=replica: is_primary(replica))
                cluster.nodes[primary].start()  # it returns as the replica to wait for
                await eventually(lambda: is_ready(daemon))
                await daemon.wait_more(100)
        await wait_caught_up(settings)
        await assert_delivered(settings)
        assert await daemon.metric(REBALANCES) == 1, "it remained in its group"
        assert "Traceback" not in daemon.output


async def test_a_call_while_a_primary_dies_raises_only_redis_unavailable(
    make_settings: MakeSettings,
) -> None:
    with running(replicas=1) as cluster:
        settings = make_settings(**cluster_settings(cluster), redis_timeout_s=0.3)
        async with RedisClient(settings.redis) as redis:
            store, done = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, Metrics()), 0

            async def call(task: int) -> None:
                nonlocal done
                for number in itertools.count():
                    with contextlib.suppress(RedisUnavailable):
                        await store.append(batch(*(event(f"u{task}-{k}", "i", number) for k in range(20))))
                        await redis.get_many([f"k{k}" for k in range(20)])
                        await redis.ping()
                        done += 1
                    await asyncio.sleep(0.01)

            async def fifty_more(start: int) -> bool:
                return done >= start + 50 or any(caller.done() for caller in callers)

            callers = [asyncio.create_task(call(task)) for task in range(8)]
            await eventually(lambda: fifty_more(0))
            cluster.nodes[0].pause()
            await eventually(lambda: is_primary(cluster.replicas_of(0)[0]))
            await eventually(lambda start=done: fifty_more(start))
            cluster.nodes[1].kill()
            await eventually(lambda: is_primary(cluster.replicas_of(1)[0]))
            await eventually(lambda start=done: fifty_more(start))
            assert not [caller.exception() for caller in callers if caller.done()]
            for caller in callers:
                caller.cancel()
            await asyncio.wait(callers)


async def logs_more_often(daemon: Daemon, text: str, count: int) -> bool:
    return daemon.output.count(text) > count


async def is_primary(server: ServerProcess) -> bool:
    async with node(server) as client:
        return (await client.info("replication"))["role"] == "master"


async def is_ready(daemon: Daemon) -> bool:
    assert (await daemon.get("/livez"))[0] == 200, "a restart would not help"
    return (await daemon.get("/readyz"))[0] == 200


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """A single server and its replica."""
    servers = []
    with contextlib.ExitStack() as stack:
        for name in ("primary", "replica"):
            folder = tmp_path / name
            folder.mkdir()
            server = ServerProcess(
                "Redis", tmp_path / f"{name}.log", lambda port, folder=folder: redis_command(port, folder), answers_ping
            )
            try:
                server.start()
            except EmbeddedError as error:
                pytest.skip(f"needs a replica to pause: {error}")
            stack.callback(server.kill)
            servers.append(server)
        yield servers[0], servers[1]


@contextlib.asynccontextmanager
async def replicating(primary: ServerProcess, replica: ServerProcess) -> AsyncIterator[None]:
    async with node(replica) as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", primary.port)

        async def linked() -> bool:
            return (await client.info("replication"))["master_link_status"] == "up"

        await eventually(linked)
        yield


async def test_appends_and_lists_wait_for_replicas_also_in_a_retry(
    make_settings: MakeSettings, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    primary, replica = pair
    settings = make_settings(redis_url=f"redis://127.0.0.1:{primary.port}", redis_wait_replicas=1)
    events = batch(*(event(f"u{k}", "i", 0) for k in range(20)))
    lists = [Recommendation("u1", ["j"], [1.0], "m", 0, 1, ())]
    async with replicating(primary, replica), RedisClient(settings.redis) as redis:
        store, publisher = (
            SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, Metrics()),
            Publisher(redis, settings.lists.ttl_s, Metrics()),
        )
        assert [s.applied for s in await store.append(events)] == [1] * 20
        assert await publisher.publish(lists) == [None]
        replica.pause()
        later = batch(*(event(f"u{k}", "i", 1) for k in range(20)))
        for _ in range(3):  # the first one writes; its writes have not reached the replica when the others run
            async with asyncio.timeout(5):
                with pytest.raises(RedisUnavailable, match="0 of redis_wait_replicas=1 have the writes"):
                    await store.append(later)
        for _ in range(2):
            with pytest.raises(RedisUnavailable, match="redis_wait_replicas"):
                await publisher.publish(lists)
        assert await redis.get_many(["nothing"]) == [None]  # a read does not wait for replicas
        replica.resume()
        assert [s.n for s in await store.append(later)] == [2] * 20
        assert len(await publisher.publish(lists)) == 1


async def test_a_retry_over_a_new_connection_waits_for_replicas_too(
    make_settings: MakeSettings, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    primary, replica = pair
    settings = make_settings(redis_url=f"redis://127.0.0.1:{primary.port}", redis_wait_replicas=1)
    async with replicating(primary, replica):
        replica.pause()
        for _ in range(2):
            async with RedisClient(settings.redis) as redis:
                with pytest.raises(RedisUnavailable):
                    await SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, Metrics()).append(
                        batch(event("ann", "i", 0))
                    )
        replica.resume()
        async with RedisClient(settings.redis) as redis:
            (found,) = await SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, Metrics()).append(
                batch(event("ann", "i", 0))
            )
        assert (found.n, found.applied) == (1, 0)


async def test_a_server_without_the_required_replicas_is_not_ready(
    make_settings: MakeSettings, pair: tuple[ServerProcess, ServerProcess]
) -> None:
    settings: Any = make_settings(redis_url=f"redis://127.0.0.1:{pair[0].port}", redis_wait_replicas=1)
    async with RedisClient(settings.redis) as redis, asyncio.timeout(3):
        for act in (
            redis.ping,
            lambda: SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, Metrics()).append(
                batch(event("a", "i", 0))
            ),
        ):
            with pytest.raises(RedisUnavailable, match="0 of redis_wait_replicas=1"):
                await act()
