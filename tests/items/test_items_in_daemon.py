"""A daemon with a table of items: its lists have available items only, and as many as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamrec.kafka.topics import COMPACTED, ensure_topics
from streamrec.local.servers import LocalServers
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import PublishedList
from streamrec.serving.inspection import published
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed, raw_producer, read_topic
from support.redis_access import raw_redis
from support.waiting import eventually
from support.workload import Record, click

MakeSettings = Callable[..., Settings]
StartDaemon = Callable[..., Daemon]
CATALOGUE = [f"i{n}" for n in range(50)]


def value(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


async def put(settings: Settings, *items: tuple[str, bytes | None]) -> None:
    async with raw_producer(settings) as producer:
        for item, fields in items:
            await producer.send_and_wait(settings.items.topic, fields, key=item.encode())


async def list_of(redis: RedisClient, user: str) -> PublishedList | None:
    (found,) = [shown async for _, shown in published(redis, [user])]
    return found


async def wait_items(daemon: Daemon, count: int) -> None:
    async def has_them() -> bool:
        return await daemon.metric("streamrec_items") == count

    await eventually(has_them)


@pytest.fixture
def settings(make_settings: MakeSettings, model_dir: Path) -> Settings:
    topic = f"{make_settings().kafka.topic}-items"
    return make_settings(items_topic=topic, model_dir=model_dir, lists_refresh_s=0.1)


async def test_lists_have_available_items_only_and_are_full(
    settings: Settings, start_daemon: StartDaemon, redis: RedisClient
) -> None:
    first = start_daemon(**settings.given)
    await first.wait_ready()
    assert "until it has an item, no item is refused" in first.output
    await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
    before = await eventually(lambda: list_of(redis, "ann"))
    gone = before.items[0]
    await put(settings, *((item, value(available=item != gone)) for item in CATALOGUE if item != "i2"))
    await put(settings, ("bad", b"{"))

    async def without_it() -> bool:
        await feed(settings, [Record(b"ann", click("ann", "i1", 2)), Record(b"bob", click("bob", "unknown", 2))])
        ann, bob = await list_of(redis, "ann"), await list_of(redis, "bob")
        return ann is not None and bob is not None and not {gone, "i2"} & {*ann.items, *bob.items}

    await eventually(without_it)
    ann, bob = await list_of(redis, "ann"), await list_of(redis, "bob")
    assert ann is not None and bob is not None and (len(ann.items), len(bob.items)) == (20, 20)
    assert bob.model == "popular"

    async def bad_is_a_dead_letter() -> bool:
        return [record.key for record in await read_topic(settings, settings.kafka.dead_letters)] == [b"bad"]

    await eventually(bad_is_a_dead_letter)
    first.kill()
    second = start_daemon("--burst", **settings.given)  # it has read the table before it serves
    await feed(settings, [Record(b"cid", click("cid", "i1", 1))])
    assert await second.wait_exit() == 0
    cid = await list_of(redis, "cid")
    assert cid is not None and len(cid.items) == 20 and not {gone, "i2"} & set(cid.items)


async def test_a_file_is_followed(
    make_settings: MakeSettings, model_dir: Path, tmp_path: Path, start_daemon: StartDaemon, redis: RedisClient
) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(f'{{"item_id": "{item}"}}\n' for item in CATALOGUE))
    settings = make_settings(items_file=path, model_dir=model_dir)
    daemon = start_daemon(**settings.given)
    await daemon.wait_ready()
    new = tmp_path / "new"
    new.write_text("".join(f'{{"item_id": "{item}"}}\n' for item in CATALOGUE[:25]))
    new.rename(path)

    async def only_these() -> bool:
        await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
        found = await list_of(redis, "ann")
        return found is not None and set(found.items) < set(CATALOGUE[:25]) and len(found.items) == 20

    await eventually(only_these)


# --- published lists


async def fill(settings: Settings, users: int) -> None:
    """Publish a list of all items for each of many users."""
    value = msgspec.json.encode(PublishedList(CATALOGUE, [1.0] * len(CATALOGUE), "m", 1, 2, 1))
    keys = Keys(settings.redis.key_prefix)
    async with raw_redis(settings) as raw:
        for begin in range(0, users, 5_000):
            pipeline = raw.pipeline(transaction=False)
            for user in range(begin, min(users, begin + 5_000)):
                pipeline.set(keys.recommendation(f"old{user}"), value, ex=600)
            await pipeline.execute()


async def holders(redis: RedisClient, users: int, item: str) -> int:
    """Count the lists that have an item."""
    needle = json.dumps(item).encode()
    values = await redis.get_many([redis.keys.recommendation(f"old{user}") for user in range(users)])
    return sum(value is not None and needle in value for value in values)


async def test_published_lists_lose_an_item_that_goes_and_one_on_the_blocklist(
    settings: Settings, start_daemon: StartDaemon, redis: RedisClient
) -> None:
    daemon = start_daemon(**settings.given)
    await daemon.wait_ready()
    await put(settings, *((item, value()) for item in CATALOGUE))
    await wait_items(daemon, 50)
    await fill(settings, 1_000)
    await put(settings, ("i3", value(available=False)), ("i4", None))
    await redis._call("SADD", redis.keys.blocklist, "i5")
    for item in ("i3", "i4", "i5"):
        await eventually(lambda item=item: _none(redis, 1_000, item))  # type: ignore[misc]
    assert await holders(redis, 1_000, "i6") == 1_000
    await redis._call("DEL", redis.keys.blocklist)


async def _none(redis: RedisClient, users: int, item: str) -> bool:
    return not await holders(redis, users, item)


async def test_another_daemon_sweeps_when_the_one_that_does_is_killed(
    settings: Settings, start_daemon: StartDaemon, redis: RedisClient
) -> None:
    daemons = [start_daemon(**settings.given) for _ in range(2)]
    await put(settings, *((item, value()) for item in CATALOGUE))
    for daemon in daemons:
        await daemon.wait_ready()
        await wait_items(daemon, 50)
    await fill(settings, 60_000)
    await put(settings, ("i3", None))

    async def sweeping() -> str | None:
        (holder,) = await redis.get_many([redis.keys.sweep_lock])
        return holder.decode().split(":")[1] if holder else None

    pid = await eventually(sweeping, every_s=0.001)
    (killed,) = [daemon for daemon in daemons if str(daemon.process.pid) == pid]
    killed.kill()
    assert await holders(redis, 60_000, "i3")
    await eventually(lambda: _none(redis, 60_000, "i3"))
    assert killed.process.poll() is not None


async def test_a_daemon_that_was_killed_while_it_swept_sweeps_at_its_next_start(
    settings: Settings, start_daemon: StartDaemon, redis: RedisClient
) -> None:
    daemon = start_daemon(**settings.given)
    await put(settings, *((item, value()) for item in CATALOGUE))
    await daemon.wait_ready()
    await wait_items(daemon, 50)
    await fill(settings, 60_000)
    await put(settings, ("i3", None))
    await eventually(lambda: redis.get_many([redis.keys.sweep_lock]), every_s=0.001)
    daemon.kill()
    assert await holders(redis, 60_000, "i3")
    again = start_daemon(**settings.given)
    await again.wait_ready()
    await eventually(lambda: _none(redis, 60_000, "i3"))


async def test_an_outage_of_kafka_leaves_the_table_and_is_reported_once(
    own: LocalServers, make_settings: MakeSettings, model_dir: Path, start_daemon: StartDaemon
) -> None:
    servers = {"kafka_bootstrap_servers": own.kafka_bootstrap_servers, "redis_url": own.redis_url}
    topic = f"{make_settings().kafka.topic}-items"
    settings = make_settings(**servers, items_topic=topic, model_dir=model_dir)
    await ensure_topics(settings.kafka, (topic,), COMPACTED)
    await put(settings, *((item, value(available=item != "i3")) for item in CATALOGUE))
    daemon = start_daemon(**settings.given)
    await daemon.wait_ready()
    own.kafka.kill()

    async def has_said_so() -> bool:
        return "items are not followed, the table remains as it is" in daemon.output

    await eventually(has_said_so, 60)
    own.kafka.start()  # not in a thread, whose end would end the server
    await put(settings, ("i4", None))
    await wait_items(daemon, 49)
    assert daemon.output.count("items are not followed") == 1
