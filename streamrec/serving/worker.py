"""The serving path, spelled out once, and what happens when a step cannot be done.

    batch            Kafka records      -> EventBatch
    append           EventBatch         -> [UserSequence]      Redis, atomic, replays skipped
    predict          [UserSequence]     -> [Recommendation]    the model, on this thread
    publish          [Recommendation]   -> Redis               compare-and-set; returns the lists before
    judge            the new clicks against these              counters only
    commit           last: at least once in, effectively once in state
    shadow           once all that is done: a challenger is told, and scores when nothing else is to do

A step that fails because Redis or Kafka is away is tried again with growing pauses, while the consumer
stays in its group; nothing is skipped. When the group rebalances meanwhile, the batch is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from streamrec.errors import BatchAbandoned, KafkaUnavailable, RedisUnavailable
from streamrec.health import Health
from streamrec.kafka.consumer import ClickConsumer
from streamrec.schemas import EventBatch
from streamrec.serving.judge import OnlineJudge
from streamrec.serving.lists import SharedLists
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.serving.shadow import Shadow

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
R = TypeVar("R")


class Worker:
    """The loop of one daemon."""

    def __init__(
        self,
        consumer: ClickConsumer,
        store: SequenceStore,
        predictor: Predictor,
        publisher: Publisher,
        lists: SharedLists,
        judge: OnlineJudge,
        shadow: Shadow,
        health: Health,
    ) -> None:
        self._consumer = consumer
        self._store = store
        self._predictor = predictor
        self._publisher = publisher
        self._lists = lists
        self._judge = judge
        self._shadow = shadow
        self._health = health
        self.handled = 0  # events

    @property
    def idle(self) -> bool:
        """Whether no batch is in hand."""
        return self._consumer.idle

    async def run(self, stop: asyncio.Event, burst: bool = False) -> None:
        """Serve until ``stop`` is set or, with ``burst``, the topic is drained."""
        async with contextlib.aclosing(self._consumer.batches(stop, burst)) as batches:
            async for batch in batches:
                try:
                    await self.handle(batch)
                    self.handled += len(batch.events)
                except BatchAbandoned:
                    log.warning("batch let go; its events will be delivered again")

    async def handle(self, batch: EventBatch) -> None:
        """One batch, from events to the commit."""
        sequences = await self._until_done(batch, lambda: self._store.append(batch))
        self._lists.count(sequences)
        recommendations = await self._predictor.predict(sequences)
        before = await self._until_done(batch, lambda: self._publisher.publish(recommendations))
        judged = self._judge.judge(sequences, before)
        await self._until_done(batch, lambda: self._consumer.commit(batch))
        self._shadow.follow(sequences, judged)

    async def _until_done(self, batch: EventBatch, step: Callable[[], Awaitable[R]]) -> R:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = await step()
            except (RedisUnavailable, KafkaUnavailable) as error:
                if self._consumer.rebalancing or batch.assignment != self._consumer.assignment:
                    raise BatchAbandoned from error  # rather than let the whole group wait with us
                if pause_s == FIRST_PAUSE_S:
                    log.warning("%s; holding the batch and trying again", error, extra={"events": len(batch.events)})
                if isinstance(error, RedisUnavailable):
                    self._health.redis_answers = False
                await self._consumer.keep_alive()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            if pause_s > FIRST_PAUSE_S:
                log.info("back again; going on where we were")
                self._health.redis_answers = True
                self._health.progressed()
            return result
