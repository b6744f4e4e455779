"""A topic that was deleted and created again is noticed, said in one line with the remedy, and the remedy works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.errors import TopicChanged
from streamrec.kafka.topics import ensure_topics
from streamrec.rebuild.rebuild import rebuild
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import stored
from streamrec.settings import Settings

from support.archives import CENTURY_S
from support.daemon_process import EVENTS, Daemon
from support.kafka_client import admin, delete_before, produce_clicks, read_topic, wait_caught_up
from support.servers import apache_kafka_home
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
ONE = {"kafka_partitions": 1}
REMEDY = "raise STREAMREC_KAFKA_TOPIC_EPOCH by one"


@pytest.fixture(autouse=True)
def on_apache_kafka() -> None:
    apache_kafka_home()  # the embedded server keeps the commits of a deleted topic


async def create_again(settings: Settings, clicks: int) -> None:
    async with admin(settings) as client:
        await client.delete_topics([settings.kafka.topic])

    async def is_new() -> bool:  # a client may have created it at once, by its request for metadata
        await ensure_topics(settings.kafka, (settings.kafka.topic,))
        return not await read_topic(settings, settings.kafka.topic)

    await eventually(is_new)
    await produce_clicks(settings, [("ann", f"new{n}") for n in range(clicks)])


async def has_stored_marks(redis: RedisClient, settings: Settings, offset: int) -> bool:
    (value,) = await redis.get_many([redis.keys.topic_mark(0)])
    return value is not None and value.split(b" ")[1] == str(offset).encode()


async def apply_five_and_stop(settings: Settings, start_daemon: StartDaemon, redis: RedisClient) -> None:
    first = start_daemon(**ONE)
    await first.wait_ready()
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    await wait_caught_up(settings)
    await eventually(lambda: has_stored_marks(redis, settings, 4))
    first.kill()


@pytest.mark.parametrize("clicks", [2, 9])
async def test_while_no_daemon_runs(
    clicks: int, start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    await apply_five_and_stop(settings, start_daemon, redis)
    await create_again(settings, clicks)
    again = start_daemon(**ONE)
    assert await again.wait_exit() == 1
    assert REMEDY in again.output.splitlines()[-1] and "Traceback" not in again.output
    second = start_daemon(**ONE, kafka_topic_epoch=1)
    await second.wait_handled(clicks)
    assert await second.metric(EVENTS, outcome="applied") == clicks
    (ann,) = [sequence async for user, sequence in stored(redis, ["ann"]) if sequence]
    assert ann.n == 5 + clicks
    second.kill()
    late = start_daemon(**ONE)
    assert await late.wait_exit() == 1
    assert "STREAMREC_KAFKA_TOPIC_EPOCH is 0: set it to 1" in late.output


async def test_while_a_daemon_runs(start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient) -> None:
    settings = make_settings(**ONE)
    daemon = start_daemon(**ONE)
    await daemon.wait_ready()
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    await daemon.wait_handled(5)
    await eventually(lambda: has_stored_marks(redis, settings, 4))
    await create_again(settings, 9)
    assert await daemon.wait_exit(120) == 1
    assert REMEDY in daemon.output.splitlines()[-1] and "Traceback" not in daemon.output


@pytest.mark.parametrize("clicks", [2, 9])
async def test_archive_and_rebuild_notice_it_too(
    clicks: int, make_settings: MakeSettings, model_dir: Path, tmp_path: Path
) -> None:
    settings = make_settings(**ONE, model_dir=model_dir, archive_dir=tmp_path, sequences_ttl_s=CENTURY_S)
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    await archive_topic(settings)
    await create_again(settings, clicks)
    for work in (archive_topic(settings), rebuild(settings)):
        with pytest.raises(TopicChanged, match=REMEDY):
            await work
    raised = settings.but(kafka_topic_epoch=1)
    await archive_topic(raised)
    assert EventArchive(tmp_path, 1).next_offsets() == {0: clicks}
    assert EventArchive(tmp_path).next_offsets() == {0: 5}
    assert (await rebuild(raised)).rebuilt == 1


async def test_an_archive_that_is_followed_while_the_topic_is_created_again(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamrec.kafka.reader.NEW_PARTITIONS_EVERY_S", 0.2)
    settings = make_settings(**ONE, archive_dir=tmp_path, archive_flush_s=0.1)
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    archiver = Archiver(settings.kafka, settings.events, EventArchive(tmp_path), 0.1)
    following = asyncio.create_task(archiver.run(asyncio.Event()))

    async def archived() -> bool:
        return EventArchive(tmp_path).next_offsets() == {0: 5}

    await eventually(archived)
    await create_again(settings, 9)
    with pytest.raises(TopicChanged, match=REMEDY):
        await asyncio.wait_for(following, 60)


async def archive_topic(settings: Settings) -> None:
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir, settings.kafka.topic_epoch)
    await Archiver(settings.kafka, settings.events, archive, settings.archive.flush_s).run(asyncio.Event(), burst=True)


async def test_expired_or_compacted_marks_prove_nothing(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    await apply_five_and_stop(settings, start_daemon, redis)
    await produce_clicks(settings, [("ann", "i5")])
    await delete_before(settings, 5)
    second = start_daemon(**ONE)
    await second.wait_handled(1)
    await redis.set(redis.keys.topic_mark(0), b"damaged \xff", 60)
    second.kill()
    third = start_daemon(**ONE)
    await third.wait_ready()
