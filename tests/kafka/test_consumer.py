"""Batches of the consumer: their records, and when it is idle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiokafka.cluster import ClusterMetadata

from streamrec.health import Health
from streamrec.kafka.consumer import ClickConsumer
from streamrec.kafka.producer import Producer
from streamrec.kafka.topics import ensure_topics
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.serving.topic_marks import TopicMarks
from streamrec.settings import Settings

from support.kafka_client import produce_clicks
from support.waiting import eventually

MakeSettings = Callable[..., Settings]


@contextlib.asynccontextmanager
async def consuming(settings: Settings) -> AsyncIterator[ClickConsumer]:
    dead_letters = Producer(settings.kafka, idempotent=False)
    redis = RedisClient(settings.redis)
    marks = TopicMarks(settings.kafka, redis, 60)
    consumer = ClickConsumer(settings.kafka, settings.events, dead_letters, marks, Metrics(), Health(60, 60))
    await consumer.wait_idle()
    async with redis, contextlib.AsyncExitStack() as parts:
        await dead_letters.start()
        parts.push_async_callback(dead_letters.stop)
        await consumer.start()
        parts.push_async_callback(consumer.stop)
        yield consumer


async def test_the_consumer_is_not_idle_between_waiting_batches(make_settings: MakeSettings) -> None:
    settings = make_settings(kafka_partitions=1, kafka_max_batch=1)
    await ensure_topics(settings.kafka, (settings.kafka.topic,))
    await produce_clicks(settings, [("ann", f"i{n}") for n in range(5)])
    async with consuming(settings) as consumer:
        handled = 0
        waiting = asyncio.create_task(asyncio.sleep(0))
        async for _ in consumer.batches(asyncio.Event(), burst=True):
            if not handled:
                waiting = asyncio.create_task(consumer.wait_idle())
            for _ in range(5):  # turns of the event loop in which it could have ended
                await asyncio.sleep(0)
            assert not waiting.done(), f"after {handled} of 5 batches"
            handled += 1
        assert handled == 5
        await asyncio.wait_for(waiting, 10)


async def test_records_that_arrive_during_a_batch_form_the_next_one(make_settings: MakeSettings) -> None:
    settings = make_settings(kafka_partitions=1)
    await ensure_topics(settings.kafka, (settings.kafka.topic,))
    await produce_clicks(settings, [("ann", "first")])
    async with consuming(settings) as consumer, contextlib.aclosing(consumer.batches(asyncio.Event())) as batches:
        assert [event.item_id for event in (await anext(batches)).events] == ["first"]
        for n in range(3):  # each acknowledged before the next is sent
            await produce_clicks(settings, [("ann", f"i{n}")])
        assert [event.item_id for event in (await anext(batches)).events] == ["i0", "i1", "i2"]


async def test_a_group_gets_its_partitions_soon_after_a_broker_that_did_not_know_the_topic_yet(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a broker does for a moment after its start: the leader of the group then has nothing to assign."""
    settings = make_settings(kafka_session_timeout_s=6)
    await ensure_topics(settings.kafka, (settings.kafka.topic,))
    await produce_clicks(settings, [("ann", "i1")])
    knows_topics, complete = asyncio.Event(), ClusterMetadata.update_metadata

    def update(cluster: ClusterMetadata, metadata: Any) -> None:
        if not knows_topics.is_set():
            metadata.topics = []
        complete(cluster, metadata)

    monkeypatch.setattr(ClusterMetadata, "update_metadata", update)
    async with consuming(settings) as consumer, contextlib.aclosing(consumer.batches(asyncio.Event())) as batches:
        watching, first = asyncio.create_task(consumer.watch.run()), asyncio.ensure_future(anext(batches))

        async def has_joined() -> bool:
            return consumer.assignment > 0 and not consumer.rebalancing

        await eventually(has_joined)
        assert not first.done()
        knows_topics.set()
        assert [event.item_id for event in (await asyncio.wait_for(first, 15)).events] == ["i1"]
        watching.cancel()
