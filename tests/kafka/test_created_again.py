"""A topic that was deleted and created again is noticed, said in one line with the remedy, and the remedy works."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from streamrec.kafka.topics import ensure_topics, topic_partitions
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import stored
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import admin, delete_before, produce_clicks, wait_caught_up
from support.servers import apache_kafka_home
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
ONE = {"kafka_partitions": 1}
REMEDY = "Raise STREAMREC_KAFKA_TOPIC_EPOCH by one"


@pytest.fixture(autouse=True)
def on_apache_kafka() -> None:
    apache_kafka_home()  # the embedded server keeps the commits of a deleted topic


async def create_again(settings: Settings, clicks: int) -> None:
    async with admin(settings) as client:
        await client.delete_topics([settings.kafka.topic])

    async def gone() -> bool:
        return not (await topic_partitions(settings.kafka, [settings.kafka.topic]))[settings.kafka.topic]

    await eventually(gone)
    await ensure_topics(settings.kafka, (settings.kafka.topic,))
    await produce_clicks(settings, [("ann", f"new{n}") for n in range(clicks)])


async def has_stored_marks(redis: RedisClient, settings: Settings, offset: int) -> bool:
    (value,) = await redis.get_many([redis.keys.topic_mark(0)])
    return value is not None and value.split(b" ")[1] == str(offset).encode()


@pytest.mark.parametrize("clicks", [2, 9])
async def test_while_no_daemon_runs(
    clicks: int, start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    first = start_daemon(**ONE)
    await first.wait_ready()
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    await wait_caught_up(settings)
    await eventually(lambda: has_stored_marks(redis, settings, 4))
    first.kill()
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


async def test_expired_or_compacted_marks_prove_nothing(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    first = start_daemon(**ONE)
    await first.wait_ready()
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    await wait_caught_up(settings)
    await eventually(lambda: has_stored_marks(redis, settings, 4))
    first.kill()
    await produce_clicks(settings, [("ann", "i5")])
    await delete_before(settings, 5)
    second = start_daemon(**ONE)
    await second.wait_handled(1)
    await redis.set(redis.keys.topic_mark(0), b"damaged \xff", 60)
    second.kill()
    third = start_daemon(**ONE)
    await third.wait_ready()
