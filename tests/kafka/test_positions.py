"""Where partitions are read from, and what is committed: transactions, retention, compaction, groups that begin."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewPartitions, NewTopic

from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.kafka.topics import ensure_topics
from streamrec.local.apache_kafka import apache_kafka
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import stored
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import admin, delete_before, produce_clicks, produce_to, wait_caught_up
from support.servers import apache_kafka_home
from support.waiting import eventually
from support.workload import click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
ONE = {"kafka_partitions": 1}


@contextlib.asynccontextmanager
async def transactional(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    name = f"{settings.kafka.topic}-{time.monotonic_ns()}"
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers, transactional_id=name)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def send(producer: AIOKafkaProducer, settings: Settings, user: str, item: str) -> None:
    await producer.send_and_wait(settings.kafka.topic, click(user, item), key=user.encode())


async def commits(settings: Settings) -> dict[int, int]:
    async with admin(settings) as client:
        found = await client.list_consumer_group_offsets(settings.kafka.group)
    return {place.partition: commit.offset for place, commit in found.items() if commit.offset >= 0}


async def items(redis: RedisClient) -> dict[str, list[str]]:
    return {user: sequence.items async for user, sequence in stored(redis, None) if sequence}


async def lag_is(daemon: Daemon, records: float) -> None:
    async def reached() -> bool:
        _, text = await daemon.get("/metrics")
        return "streamrec_lag_records{" in text and await daemon.metric("streamrec_lag_records") == records

    await eventually(reached)


async def archived(settings: Settings, folder: Path) -> list[str]:
    archive = EventArchive(folder, settings.kafka.topic_epoch)
    await Archiver(settings.kafka, settings.events, archive, flush_s=60).run(asyncio.Event(), burst=True)
    return archive.read().item_ids


async def test_a_click_in_a_transaction_leaves_no_lag_and_a_daemon_that_lives(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    daemon = start_daemon(**ONE, serving_liveness_timeout_s=3)
    await daemon.wait_ready()
    async with transactional(settings) as producer, producer.transaction():
        await send(producer, settings, "ann", "i1")
    await daemon.wait_handled(1)
    await lag_is(daemon, 0)
    assert await commits(settings) == {0: 2}  # the click and the marker
    daemon.kill()
    again = start_daemon(**ONE, serving_liveness_timeout_s=3)
    await again.wait_ready()
    await lag_is(again, 0)
    until_s = time.monotonic() + 5  # past the liveness time-out
    while time.monotonic() < until_s:
        assert (await again.get("/livez"))[0] == 200
        await asyncio.sleep(0.2)


async def test_only_committed_transactions_are_served_and_archived(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient, tmp_path: Path
) -> None:
    apache_kafka_home()  # the embedded server may keep the records of a transaction back after its end
    settings = make_settings(**ONE)
    daemon = start_daemon(**ONE, serving_liveness_timeout_s=2)
    await daemon.wait_ready()
    async with transactional(settings) as producer:
        with contextlib.suppress(ZeroDivisionError):
            async with producer.transaction():
                await send(producer, settings, "ann", "aborted")
                raise ZeroDivisionError
        async with producer.transaction():
            await send(producer, settings, "ann", "committed")
        await daemon.wait_handled(1)
        await producer.begin_transaction()
        await send(producer, settings, "ann", "open")
        await produce_clicks(settings, [("bob", "later")])
        await lag_is(daemon, 2)  # both wait for the open transaction
        until_s = time.monotonic() + 4  # past the liveness time-out
        while time.monotonic() < until_s:
            assert (await daemon.get("/livez"))[0] == 200
            await asyncio.sleep(0.2)
        assert await items(redis) == {"ann": ["committed"]}
        await producer.commit_transaction()
    await daemon.wait_handled(3)
    assert await items(redis) == {"ann": ["committed", "open"], "bob": ["later"]}
    await lag_is(daemon, 0)
    assert await archived(settings, tmp_path / "archive") == ["committed", "open", "later"]


async def test_what_retention_has_removed_is_said_with_numbers_and_leaves_no_lag(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient, tmp_path: Path, caplog: Any
) -> None:
    settings = make_settings(**ONE)
    first = start_daemon(**ONE)
    await first.wait_ready()
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    assert await archived(settings, tmp_path / "archive") == [f"i{n}" for n in range(5)]
    await wait_caught_up(settings)
    first.kill()
    await produce_clicks(settings, [("ann", f"lost{n}") for n in range(95)])
    await delete_before(settings, 100)
    daemon = start_daemon(**ONE, serving_liveness_timeout_s=3)
    await daemon.wait_ready()
    await lag_is(daemon, 0)
    assert await commits(settings) == {0: 100}
    (line,) = [line for line in daemon.lines("WARNING") if "clicks are lost" in line]
    assert "95 records" in line and "partition=0 first=5 last=99" in line
    await produce_clicks(settings, [("ann", "new")])
    await daemon.wait_handled(1)
    assert (await items(redis))["ann"][-2:] == ["i4", "new"]
    caplog.clear()
    assert await archived(settings, tmp_path / "archive") == [*(f"i{n}" for n in range(5)), "new"]
    (record,) = [record for record in caplog.records if "clicks are lost" in record.getMessage()]
    assert (vars(record)["partition"], vars(record)["first"], vars(record)["last"]) == (0, 5, 99)


async def test_retention_that_overtakes_a_running_daemon_is_said_once(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    daemon = start_daemon(**ONE)
    await daemon.wait_ready()
    await produce_clicks(settings, [("ann", "i0")])
    await daemon.wait_handled(1)
    daemon.signal(signal.SIGSTOP)
    await produce_clicks(settings, [("ann", f"lost{n}") for n in range(9)])
    await delete_before(settings, 10)
    daemon.signal(signal.SIGCONT)
    await produce_clicks(settings, [("ann", "new")])
    await daemon.wait_handled(2)
    await lag_is(daemon, 0)
    assert len([line for line in daemon.lines("WARNING") if "clicks are lost" in line]) <= 1


async def test_compaction_is_said_once_with_both_offsets(
    start_daemon: StartDaemon, make_settings: MakeSettings, tmp_path: Path, caplog: Any
) -> None:
    kafka = apache_kafka(apache_kafka_home(), tmp_path / "kafka", {"log.cleaner.backoff.ms": "200"})
    kafka.start()
    where = {**ONE, "kafka_bootstrap_servers": f"127.0.0.1:{kafka.port}"}
    settings = make_settings(**where)
    try:
        options = {"cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.001"}
        options |= {"delete.retention.ms": "1", "max.compaction.lag.ms": "100", "min.compaction.lag.ms": "0"}
        async with admin(settings) as client:
            await client.create_topics([NewTopic(settings.kafka.topic, 1, 1, topic_configs=options)])
        for n in range(20):
            await produce_to(settings, 0, click("ann", f"i{n}"), b"ann")

        async def compacted() -> bool:
            await produce_to(settings, 0, click("bob", "rolls the segment"), b"bob")
            consumer = AIOKafkaConsumer(
                bootstrap_servers=settings.kafka.bootstrap_servers,
                auto_offset_reset="earliest",
                enable_auto_commit=False,
            )
            await consumer.start()
            try:
                place = TopicPartition(settings.kafka.topic, 0)
                consumer.assign([place])
                (records,) = (await consumer.getmany(timeout_ms=2000)).values()
                return bool(records[0].offset >= 19)
            finally:
                await consumer.stop()

        await eventually(compacted, 100, every_s=1)
        daemon = start_daemon(**where)
        await daemon.wait_ready()
        await wait_caught_up(settings)
        await lag_is(daemon, 0)
        lost = [line for line in daemon.lines("WARNING") if "clicks are lost" in line]
        assert lost and re.search(r"partition=0 first=0 last=\d+", lost[0]) and "compaction" in lost[0]
        await archived(settings, tmp_path / "archive")
        assert any("compaction" in record.getMessage() for record in caplog.records)
    finally:
        kafka.stop()


async def test_lag_counts_from_the_beginning_while_the_first_batch_of_a_new_group_waits(
    start_daemon: StartDaemon, make_settings: MakeSettings, own_redis: Any
) -> None:
    settings = make_settings(**ONE, redis_url=own_redis.redis_url)
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    daemon = start_daemon(**ONE, redis_url=own_redis.redis_url)
    await daemon.wait_ready()
    own_redis.redis.stop()
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(7)])
    await lag_is(daemon, 7)
    assert await commits(settings) == {0: 0}  # committed when the partition was assigned


async def test_latest_is_where_a_group_without_commits_begins_and_skips_nothing_afterwards(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(kafka_partitions=2)
    await produce_clicks_to(settings, 2, "before the group")
    latest = {"kafka_partitions": 2, "kafka_auto_offset_reset": "latest"}
    daemons = [start_daemon(**latest) for _ in range(2)]
    for daemon in daemons:
        await daemon.wait_ready()
    for daemon in daemons:  # nothing was handled, nothing committed but the start
        daemon.kill()
    assert await commits(settings) == {0: 1, 1: 1}
    await produce_clicks_to(settings, 2, "while none ran")
    async with admin(settings) as client:
        await client.create_partitions({settings.kafka.topic: NewPartitions(3)})
    await produce_to(settings, 2, click(f"user{2}", "in a new partition"))
    daemon = start_daemon(**latest)
    await daemon.wait_handled(3)
    assert await items(redis) == {
        "user0": ["while none ran"],
        "user1": ["while none ran"],
        "user2": ["in a new partition"],
    }


@pytest.mark.long
async def test_a_partition_that_is_added_to_a_running_group_is_read_from_its_beginning(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    daemon = start_daemon(**ONE, kafka_auto_offset_reset="latest")
    await daemon.wait_ready()
    async with admin(settings) as client:
        await client.create_partitions({settings.kafka.topic: NewPartitions(2)})
    await produce_to(settings, 1, click(f"user{1}", "first of its partition"))
    await daemon.wait_handled(1, timeout_s=90)
    assert await items(redis) == {"user1": ["first of its partition"]}


async def test_a_commit_beyond_the_end_of_the_topic_is_said_and_loses_nothing(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers, group_id=settings.kafka.group, enable_auto_commit=False
    )
    await consumer.start()
    consumer.assign([TopicPartition(settings.kafka.topic, 0)])
    await consumer.commit({TopicPartition(settings.kafka.topic, 0): 1000})
    await consumer.stop()
    await produce_clicks(settings, [("ann", "i1"), ("ann", "i2")])
    daemon = start_daemon(**ONE)
    await daemon.wait_handled(2)
    assert await items(redis) == {"ann": ["i1", "i2"]}
    (line,) = [line for line in daemon.lines("WARNING") if "topic ends before" in line]
    assert "next=1000 end=2" in line
    await lag_is(daemon, 0)


async def test_a_later_topic_epoch_begins_at_the_beginning_and_an_earlier_one_is_refused(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient
) -> None:
    settings = make_settings(**ONE)
    first = start_daemon(**ONE, kafka_topic_epoch=1)
    await first.wait_ready()
    await produce_clicks(settings, [("ann", "i1")])
    await first.wait_handled(1)
    await wait_caught_up(settings)
    first.kill()
    late = start_daemon(**ONE, kafka_topic_epoch=0)
    assert await late.wait_exit() == 1
    assert "STREAMREC_KAFKA_TOPIC_EPOCH is 0: set it to 1" in late.output and "Traceback" not in late.output
    second = start_daemon(**ONE, kafka_topic_epoch=2)
    await second.wait_handled(1)
    assert await second.metric(EVENTS, outcome="applied") == 1


async def produce_clicks_to(settings: Settings, partitions: int, item: str) -> None:
    """Produce one click to each partition."""
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    for partition in range(partitions):
        await produce_to(settings, partition, click(f"user{partition}", item))
