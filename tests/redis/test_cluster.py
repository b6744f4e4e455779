"""A real Redis Cluster of three nodes answers like one server; a mix-up of the two is explained."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from streamrec.commands.check import check
from streamrec.errors import RedisUnavailable, SettingsError
from streamrec.local.cluster import EmbeddedCluster
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.redis.lock import take_lock
from streamrec.registry import Registry
from streamrec.schemas import EXCLUDE, EventBatch, Recommendation, UserSequence
from streamrec.serving.online import ONLINE
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support import redis_rights as security
from support.daemon_process import Daemon, models, serves
from support.kafka_client import feed, wait_caught_up
from support.oracle import assert_delivered
from support.preloaded import run_command
from support.redis_access import batch, clicks, event
from support.redis_cluster import MovingSlot, cluster_settings, node, owner_of, running, slot_of
from support.registry import publish as publish_model
from support.servers import own_redis_server
from support.waiting import eventually
from support.workload import workload

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with running(replicas=0) as found:
        yield found


def store_of(redis: RedisClient, settings: Settings) -> SequenceStore:
    return SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 50, Metrics())


def lists_of(sequences: list[UserSequence]) -> list[Recommendation]:
    return [Recommendation(s.user_id, s.items[-1:], [1.0], "m", s.last_event_ts_ms, s.n, ()) for s in sequences]


async def test_a_cluster_answers_like_one_server(make_settings: MakeSettings, cluster: EmbeddedCluster) -> None:
    one, many = make_settings(), make_settings(**cluster_settings(cluster))
    answers = []
    for settings in (one, many):
        async with RedisClient(settings.redis) as redis:
            store, publisher, keys = (
                store_of(redis, settings),
                Publisher(redis, settings.lists.ttl_s, Metrics()),
                Keys("p"),
            )
            first = await store.append(batch(*(event(f"u{k % 60}", f"i{k}", k, partition=k % 3) for k in range(200))))
            again = await store.append(batch(*(event(f"u{k % 90}", f"i{k}", k, partition=k % 3) for k in range(90))))
            found: list[Any] = [first, again]
            found.append([value is not None for value in await publisher.publish(lists_of(first))])
            found.append([value is not None for value in await publisher.publish(lists_of(again))])
            names = [Keys(settings.redis.key_prefix).sequence(f"u{k}") for k in range(100)]
            found.append(await redis.get_many(names))
            found.append(
                sorted([key.removeprefix(settings.redis.key_prefix) async for key in redis.scan(names[0][:-5])])
            )
            found.append(
                [await take_lock(redis, keys.training, "a", 60_000), await take_lock(redis, keys.training, "b", 60_000)]
            )
            found.append(await take_lock(redis, keys.training, "a", 0))
            await redis.run(ONLINE, [f"{settings.redis.key_prefix}:online:v"], [60, "hits", 3])
            found.append(await redis.hash(f"{settings.redis.key_prefix}:online:v"))
            found.append(await redis.members(f"{settings.redis.key_prefix}:blocklist"))
            found.append(await redis.memory_bytes() > 0)
            answers.append(found)
    assert answers[0] == answers[1]
    assert len(answers[0][5]) == 90


async def test_exclusions_on_a_cluster_are_those_on_one_server(
    make_settings: MakeSettings, cluster: EmbeddedCluster
) -> None:
    answers = []
    for settings in (make_settings(), make_settings(**cluster_settings(cluster))):
        async with RedisClient(settings.redis) as redis:
            store = SequenceStore(redis, settings.sequences, 0, 50, Metrics(), exclude_ttl_s=100 * 365 * 86_400)
            publisher = Publisher(redis, settings.lists.ttl_s, Metrics(), excludes=True)
            before = await store.append(batch(*(event(f"u{k}", f"i{k}", k) for k in range(40))))
            after = await store.append(batch(*(event(f"u{k}", f"x{k}", 50 + k, role=EXCLUDE) for k in range(40))))
            late = [replace(r, exclusions=1) for r in lists_of(after)]
            published = [await publisher.publish(lists) for lists in (late, lists_of(before), late)]
            found = [[value is not None for value in values] for values in published]
            answers.append([after, await store.read([f"u{k}" for k in range(60)]), found])
            assert [s.excluded.items for s in after] == [(f"x{k}",) for k in range(40)]
    assert answers[0] == answers[1]


async def test_a_message_reaches_a_listener_on_another_connection(
    make_settings: MakeSettings, cluster: EmbeddedCluster
) -> None:
    async with (
        RedisClient(make_settings(**cluster_settings(cluster)).redis) as one,
        RedisClient(make_settings(**cluster_settings(cluster)).redis) as two,
    ):
        messages = one.listen("a channel")
        heard = asyncio.ensure_future(anext(messages))

        async def heard_it() -> bool:
            await two.notify("a channel", "hello")
            return heard.done()

        await eventually(heard_it)
        assert await heard == "hello"
        await messages.aclose()  # type: ignore[attr-defined]


async def test_scripts_are_loaded_again_on_nodes_that_lost_them(
    make_settings: MakeSettings, cluster: EmbeddedCluster
) -> None:
    settings = make_settings(**cluster_settings(cluster))
    async with RedisClient(settings.redis) as redis:
        store = store_of(redis, settings)
        for round_ in range(2):
            found = await store.append(batch(*(event(f"u{k}", "i", round_) for k in range(30))))
            assert [sequence.n for sequence in found] == [round_ + 1] * 30
            for server in cluster.nodes:
                async with node(server) as client:
                    await client.script_flush()


async def test_a_batch_is_one_round_trip_to_each_node(make_settings: MakeSettings, cluster: EmbeddedCluster) -> None:
    settings = make_settings(**cluster_settings(cluster))

    async def packets() -> int:
        total = 0
        for server in cluster.nodes:
            async with node(server) as client:
                total += (await client.info("stats"))["total_reads_processed"]
        return total

    async with RedisClient(settings.redis) as redis:
        store = store_of(redis, settings)
        await store.append(batch(*(event(f"u{k}", "i", 0) for k in range(60))))
        before = await packets()
        own = await packets() - before
        await store.append(batch(*(event(f"u{k}", "i", 1) for k in range(60))))
        assert await packets() - before - 2 * own < 20  # the nodes also talk to each other, but no node got 60 requests


@pytest.mark.parametrize("connections", [1, 3])
async def test_keys_of_a_moving_slot_are_found_on_either_node(
    make_settings: MakeSettings, cluster: EmbeddedCluster, connections: int
) -> None:
    settings = make_settings(**cluster_settings(cluster))
    keys = Keys(settings.redis.key_prefix)
    slot = slot_of(keys.sequence("ann"))
    source = await owner_of(cluster, slot)
    async with RedisClient(settings.redis) as redis:
        store, publisher = (
            store_of(redis, settings),
            Publisher(redis, settings.lists.ttl_s, Metrics()),
        )
        await asyncio.gather(*(store.append(clicks(f"u{k}", ["i"] * 50)) for k in range(30 * connections)))
        move = MovingSlot(cluster, slot, source, (source + 1) % 3)
        await move.begin()
        (found,) = await store.append(clicks("ann", ["a"]))  # a new key is on the target
        assert (found.n, found.applied) == (1, 1)
        with pytest.raises(RedisUnavailable, match="Multiple keys"):  # the list is on neither node, the sequence on one
            await publisher.publish(lists_of([found]))
        assert await redis.get_many([keys.sequence("ann"), keys.sequence("bob")]) == [
            b"1 1 1 1 1700000000000 0 0:0\0a\0",
            None,
        ]
        await move.move_keys()
        await move.end()
        assert await publisher.publish(lists_of([found])) == [None]
        (found,) = await store.append(clicks("ann", ["b"], 1))
        assert found.items == ["a", "b"]


async def test_a_plain_connection_to_a_cluster_gets_an_error_with_the_setting(
    make_settings: MakeSettings, cluster: EmbeddedCluster
) -> None:
    settings = make_settings(redis_url=cluster.redis_url)
    async with RedisClient(settings.redis) as redis:
        acts: list[Callable[[], Any]] = [
            redis.ping,
            lambda: store_of(redis, settings).append(batch(*(event(f"u{k}", "i", 0) for k in range(9)))),
            lambda: redis.get_many([f"k{k}" for k in range(9)]),
            lambda: read_one_by_one(redis),
        ]
        for act in acts:
            with pytest.raises(RedisUnavailable, match=r"a Redis Cluster; set STREAMREC_REDIS_CLUSTER=true$"):
                await act()
    (finding,) = [found async for found in check(settings) if found.part == "Redis"]
    assert not finding.ok and "STREAMREC_REDIS_CLUSTER=true" in finding.detail


async def read_one_by_one(redis: RedisClient) -> None:
    for number in range(30):
        await redis.members(f"k{number}")


async def test_a_cluster_connection_to_one_server_gets_an_error_with_the_setting(make_settings: MakeSettings) -> None:
    with own_redis_server() as own:
        async with RedisClient(make_settings(redis_url=own.redis_url, redis_cluster=True).redis) as redis:
            for act in (redis.ping, lambda: redis.get_many(["k"])):
                with pytest.raises(RedisUnavailable, match=r"no Redis Cluster; set STREAMREC_REDIS_CLUSTER=false$"):
                    await act()


async def test_the_rights_of_the_page_are_enough_on_a_cluster(
    make_settings: MakeSettings, cluster: EmbeddedCluster, model_dir: Path
) -> None:
    found = re.search(r"On a Redis Cluster: `([^`]*)` for all users but `pages`", " ".join(security.PAGE.split()))
    assert found
    password = {"redis_password": security.PASSWORD, "redis_key_prefix": "streamrec", "lists_popular_half_life_s": 0.01}
    for user, does in security.DONE_BY.items():
        rights = security.RIGHTS[user].replace("PASSWORD", security.PASSWORD).split() + found[1].split()
        for server in cluster.nodes:
            async with node(server) as client:
                await client.execute_command("ACL", "SETUSER", user, *rights)
        await does(make_settings(**cluster_settings(cluster), redis_username=user, **password), model_dir)
        for server in cluster.nodes:
            async with node(server) as client:
                assert await client.execute_command("ACL", "LOG") == []
                await client.flushall()


@pytest.mark.parametrize("url", ["redis://h:1/2", "redis://h:1/0?db=3", "unix:///run/redis.sock"])
def test_a_cluster_has_no_database_but_0_and_no_socket(url: str) -> None:
    with pytest.raises(SettingsError, match="no database but 0"):
        load_settings(flags={"redis_url": url, "redis_cluster": True})
    assert load_settings(flags={"redis_url": "redis://h:1/0?db=0", "redis_cluster": True}).redis.cluster


async def test_a_cluster_without_an_answering_node_is_reported_soon(
    make_settings: MakeSettings, unused_tcp_port: int
) -> None:
    settings = make_settings(redis_url=f"redis://u:s3cr3t@127.0.0.1:{unused_tcp_port}", redis_cluster=True)
    async with RedisClient(settings.redis) as redis, asyncio.timeout(5):
        for _ in range(2):
            with pytest.raises(RedisUnavailable, match="is STREAMREC_REDIS_URL right, and the server up") as told:
                await redis.ping()
            assert "s3cr3t" not in str(told.value)


async def test_readiness_fails_if_one_node_hangs_and_no_call_waits_long_for_it(make_settings: MakeSettings) -> None:
    with running(replicas=0) as cluster:
        settings = make_settings(**cluster_settings(cluster), redis_timeout_s=0.2)
        async with RedisClient(settings.redis) as redis:
            store, users = store_of(redis, settings), [f"u{k}" for k in range(30)]
            await store.append(batch(*(event(user, "i", 0) for user in users)))
            cluster.nodes[0].pause()  # the one that the URL names, too
            for act in (redis.ping, lambda: store.append(batch(*(event(user, "i", 1) for user in users)))):
                async with asyncio.timeout(5):
                    with pytest.raises(RedisUnavailable):
                        await act()
            cluster.nodes[0].resume()
            found = await eventually(lambda: appended(store, batch(*(event(user, "i", 1) for user in users))))
            assert [sequence.n for sequence in found] == [2] * 30
            await redis.ping()


async def appended(store: SequenceStore, events: EventBatch) -> list[UserSequence]:
    with contextlib.suppress(RedisUnavailable):  # a node needs a moment to see the others again
        return await store.append(events)
    return []


async def test_a_daemon_on_a_cluster_serves_swaps_and_shows(
    start_daemon: StartDaemon, make_settings: MakeSettings, cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    old, new = publish_model(registry, seed=1), publish_model(registry, seed=2)
    registry.promote(old, "first")
    more = {
        **cluster_settings(cluster),
        "model_dir": None,
        "registry_dir": registry.place,
        "registry_poll_s": 3600,
        "lists_refresh_s": 0.1,
    }
    settings = make_settings(**more)
    daemon = start_daemon(**more)
    await daemon.wait_ready()
    await feed(settings, islice(workload(21), 600))
    await daemon.wait_handled(500)
    promoted = models(settings, "promote", new)  # only the message can notify the daemon
    assert (promoted.returncode, promoted.stderr) == (0, "")
    await eventually(lambda: serves(daemon, new))
    await feed(settings, islice(workload(22), 600))
    await wait_caught_up(settings)
    users = await assert_delivered(settings.but(model_dir=registry.place / "versions" / new, registry_dir=None))
    shown = json.loads((await daemon.get("/api/user?id=u1"))[1])
    assert shown["n"] == shown["list"]["n"] == users["u1"].n
    lines = command(settings, "recs", "--all", "--json")
    assert {line["user_id"] for line in lines} == users.keys()
    async with RedisClient(settings.redis) as redis:

        async def popular_counts_all() -> bool:
            (value,) = await redis.get_many([Keys(settings.redis.key_prefix).popular])
            return value is not None and json.loads(value)["event_ts_ms"] == max(
                u.last_event_ts_ms for u in users.values()
            )

        await eventually(popular_counts_all)


def command(settings: Settings, *arguments: str) -> list[Any]:
    ran = run_command(settings, *arguments)
    ran.check_returncode()
    return [json.loads(line) for line in ran.stdout.splitlines()]
