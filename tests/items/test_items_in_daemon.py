"""A daemon with a table of items: its lists have available items only, and as many as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamrec.redis.client import RedisClient
from streamrec.schemas import PublishedList
from streamrec.serving.inspection import published
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed, raw_producer, read_topic
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
