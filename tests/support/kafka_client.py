"""Produce records, read topics, and join the group, beside the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from streamrec.kafka.topics import ensure_topics, topic_partitions
from streamrec.settings import Settings

from support.waiting import eventually
from support.workload import ORDERS, Record, click, workload


@contextlib.asynccontextmanager
async def raw_producer(settings: Settings, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        enable_idempotence=True,
        max_request_size=20_000_000,
        **options,
    )
    await producer.start()
    try:
        yield producer
    finally:
        # with a time-out: if the broker is unreachable, queued records are never sent
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(producer.stop(), 30)


async def produce_clicks(settings: Settings, clicks: list[tuple[str, str]], base_ms: int = 1_700_000_000_000) -> None:
    """Produce (user, item) clicks, keyed by user, a second apart; return when all are acknowledged."""
    async with raw_producer(settings) as producer:
        sent = [
            await producer.send(settings.kafka.topic, click(user, item, base_ms + 1000 * i), key=user.encode())
            for i, (user, item) in enumerate(clicks)
        ]
        await producer.flush()
        for acknowledgement in sent:
            await acknowledgement


async def feed(settings: Settings, records: Iterable[Record]) -> None:
    """Produce records; return when all are acknowledged."""
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    async with raw_producer(settings) as producer:
        sent = [await _send(producer, settings, record) for record in records]
        await producer.flush()
        for acknowledgement in sent:
            await acknowledgement


async def produce_to(settings: Settings, partition: int, value: bytes, key: bytes | None = None) -> None:
    """Produce a record to a partition, without idempotence: its batch leaves no trace for compaction to keep."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers)
    await producer.start()
    try:
        await producer.send_and_wait(settings.kafka.topic, value, key, partition)
    finally:
        await producer.stop()


async def delete_before(settings: Settings, offset: int, partition: int = 0) -> None:
    """Remove the records of a partition before an offset, as retention does."""
    async with admin(settings) as client:
        await client.delete_records({TopicPartition(settings.kafka.topic, partition): RecordsToDelete(offset)})


@contextlib.asynccontextmanager
async def admin(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def feeding(
    settings: Settings, seed: int, per_s: float, at_least: int = 0, **options: Any
) -> AsyncIterator[None]:
    """Produce the workload of a seed while the block runs, and at least ``at_least`` records.

    Args:
        options: of the producer.
    """
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    left = asyncio.Event()

    async def stream(producer: AIOKafkaProducer) -> None:
        started, sent = time.monotonic(), []
        order_share = 0.3 if settings.events.item_id == ORDERS["events_item_id"] else 0.0
        for place, record in enumerate(workload(seed, order_share=order_share, typed=bool(settings.events.roles))):
            if left.is_set() and place >= at_least:
                break
            await asyncio.sleep(max(0.0, started + place / per_s - time.monotonic()))
            sent.append(await _send(producer, settings, record))
        await producer.flush()
        for acknowledgement in sent:
            await acknowledgement

    async with raw_producer(settings, **options) as producer, asyncio.TaskGroup() as group:
        group.create_task(stream(producer))
        yield
        left.set()


async def _send(producer: AIOKafkaProducer, settings: Settings, record: Record) -> asyncio.Future[Any]:
    return await producer.send(settings.kafka.topic, record.value, key=record.key, headers=record.headers)


@contextlib.asynccontextmanager
async def member(settings: Settings, listener: ConsumerRebalanceListener | None = None) -> AsyncIterator[None]:
    """Have another member in the group, with its own partitions, while the block runs; it commits nothing."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        group_id=settings.kafka.group,
        enable_auto_commit=False,
        heartbeat_interval_ms=200,
    )
    await consumer.start()
    try:
        consumer.subscribe([settings.kafka.topic], listener=listener)
        await eventually(lambda: _has_partitions(consumer))
        yield
    finally:
        await consumer.stop()


async def _has_partitions(consumer: AIOKafkaConsumer) -> bool:
    await consumer.getmany(timeout_ms=10)
    return bool(consumer.assignment())


async def wait_caught_up(settings: Settings, timeout_s: float = 60.0) -> None:
    """Wait until the group has committed every partition to its end."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers, group_id=settings.kafka.group, enable_auto_commit=False
    )
    await consumer.start()
    try:
        partitions = await _partitions(settings, settings.kafka.topic)

        async def caught_up() -> bool:
            ends = await consumer.end_offsets(partitions)
            return all([(await consumer.committed(p) or 0) >= ends[p] for p in partitions])

        await eventually(caught_up, timeout_s, every_s=0.1)
    finally:
        await consumer.stop()


async def read_topic(settings: Settings, topic: str) -> list[Any]:
    """Return every record of a topic, in partition and offset order."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=50,
    )
    await consumer.start()
    try:
        partitions = await _partitions(settings, topic)
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        records: list[Any] = []
        while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
            for found in (await consumer.getmany(timeout_ms=200)).values():
                records += found
        return sorted(records, key=lambda record: (record.partition, record.offset))
    finally:
        await consumer.stop()


async def _partitions(settings: Settings, topic: str) -> list[TopicPartition]:
    """Return the partitions of a topic, once it exists."""

    async def count() -> int:
        return (await topic_partitions(settings.kafka, [topic]))[topic]

    return [TopicPartition(topic, number) for number in range(await eventually(count))]
