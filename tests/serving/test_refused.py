"""A user whose data Redis can never take becomes dead letters; the daemon and all other users continue."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.serving.inspection import published, stored
from streamrec.serving.online import read_figures
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import feed, read_topic, wait_caught_up
from support.redis_access import batch, event
from support.redis_cluster import cluster_settings, running
from support.redis_sentinels import watched
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
NEWER = b"2 1 1 1 0 0 0:1\0what a newer version writes"


@pytest.fixture(params=["one server", "sentinels", "cluster"])
async def where(request: pytest.FixtureRequest) -> AsyncIterator[dict[str, Any]]:
    """Settings of Redis."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "cluster":
            yield cluster_settings(stack.enter_context(running(replicas=0)))
        elif request.param == "sentinels":
            yield {"redis_url": (await stack.enter_async_context(watched(replicas=0))).redis_url}
        else:
            yield {}


async def test_a_value_of_a_later_format_stops_one_user_only(
    start_daemon: StartDaemon, make_settings: MakeSettings, where: dict[str, Any]
) -> None:
    settings, keys = make_settings(**where), Keys(make_settings().redis.key_prefix)
    async with RedisClient(settings.redis) as redis:
        await redis.set(keys.sequence("bob"), NEWER, 600)
        daemon = start_daemon(**where)
        await daemon.wait_ready()
        users = ["ann", "bob", "cid", "bob", "}x", "ann"]
        records = [Record(user.encode(), click(user, f"i{n}", n)) for n, user in enumerate(users)]
        await feed(settings, records)
        await wait_caught_up(settings)
        assert {user: s.items async for user, s in stored(redis, ["ann", "cid", "}x"]) if s} == {
            "ann": ["i0", "i5"],
            "cid": ["i2"],
            "}x": ["i4"],
        }
        assert {user: s.n async for user, s in published(redis, None) if s} == {"ann": 2, "cid": 1, "}x": 1}
        assert await redis.get_many([keys.sequence("bob")]) == [NEWER], "the newer version will need it"

        async def dead() -> list[Any]:
            return await read_topic(settings, settings.kafka.dead_letters)

        letters = await eventually(dead)
        assert sorted((letter.key, letter.value) for letter in letters) == sorted(
            (record.key, record.value) for record in records if record.key == b"bob"
        )
        reasons = {dict(letter.headers)["streamrec.reason"].decode() for letter in letters}
        (reason,) = reasons
        assert "format 2" in reason and "upgrade" in reason and "bob" in reason
        assert await daemon.metric(EVENTS, outcome="dead_letter") == 2
        assert await daemon.metric(EVENTS, outcome="replayed") == 0
        assert (await daemon.get("/readyz"))[0] == (await daemon.get("/livez"))[0] == 200
        await redis.delete(keys.sequence("bob"))
        await feed(settings, [Record(b"bob", click("bob", "i9", 9))])
        await wait_caught_up(settings)
        assert {user: s.items async for user, s in stored(redis, ["bob"]) if s} == {"bob": ["i9"]}
        assert "Traceback" not in daemon.output and not daemon.lines("ERROR")


async def test_users_whose_values_cannot_be_read_do_not_stop_a_rescoring(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    store = SequenceStore(redis, settings.sequences, 0, 8, Metrics())
    await store.append(batch(event("ann", "a", 0), event("bob", "b", 0), event("cid", "c", 0), event("dan", "d", 0)))
    await redis.set(redis.keys.sequence("bob"), NEWER, 60)
    await redis.set(redis.keys.sequence("cid"), b"damaged", 60)
    refused: dict[str, Exception] = {}
    found = await store.read(["ann", "bob", "cid", "dan"], refused.__setitem__)
    assert [sequence.user_id for sequence in found] == ["ann", "dan"]
    assert list(refused) == ["bob", "cid"]


@pytest.mark.parametrize("spoilt", ["popularity", "blocklist"])
async def test_a_shared_key_of_another_type_is_named_and_stops_neither_clicks_nor_figures(
    start_daemon: StartDaemon, make_settings: MakeSettings, spoilt: str
) -> None:
    settings, keys = make_settings(), Keys(make_settings().redis.key_prefix)
    key = {"popularity": keys.popularity, "blocklist": keys.blocklist}[spoilt]
    async with RedisClient(settings.redis) as redis:
        if spoilt == "popularity":  # also before the start
            await redis.set(key, b"by another program", 600)
        daemon = start_daemon(lists_refresh_s=0.1)
        await daemon.wait_ready()
        await redis.set(key, b"by another program", 600)
        await redis.delete(keys.popular)
        await feed(settings, [Record(b"ann", click("ann", f"i{n}", n)) for n in range(5)])
        await eventually(lambda: daemon.has_logged(f"key {key} of Redis at"))

        async def judged() -> float:
            figures = await read_figures(redis, ["popular", "small"])
            return sum(found.judged for found in figures.values())

        assert await eventually(judged) > 0
        await wait_caught_up(settings)
        await eventually(lambda: exists(redis, keys.popular))
        assert "remove or rename it" in daemon.output
        assert len(daemon.lines("WARNING", "ERROR")) == 1, daemon.output
        assert (await daemon.get("/readyz"))[0] == 200
        await redis.delete(key)

        async def counted() -> bool:
            return await redis._call("ZCARD", keys.popularity) >= 5

        await eventually(counted)
        assert "Traceback" not in daemon.output


async def exists(redis: RedisClient, key: str) -> bool:
    return await redis.get_many([key]) != [None]


async def test_a_daemon_does_not_start_with_a_blocklist_that_it_cannot_read(
    redis: RedisClient, start_daemon: StartDaemon
) -> None:
    await redis.set(redis.keys.blocklist, b"by another program", 600)
    daemon = start_daemon()
    assert await daemon.wait_exit() == 1
    assert "blocklist of Redis at" in daemon.output.splitlines()[-1]
    assert "Traceback" not in daemon.output
