"""The serving path, step by step, and the retries when a step fails.

    batch            Kafka records      -> EventBatch
    append           EventBatch         -> [UserSequence]      Redis, atomic, replays skipped
    predict          [UserSequence]     -> [Recommendation]    the model, on this thread
    publish          [Recommendation]   -> Redis               compare-and-set; returns the previous lists
    evaluate         new clicks against the previous lists; counters only
    refuse           users whose data Redis can never take: their records become dead letters
    commit           offsets -> Kafka; last, so that Kafka redelivers the batch after a crash
    shadow           after the commit: a shadow model scores while the daemon is idle

If Redis or Kafka is unreachable, the step is retried with growing pauses, and the consumer remains in its group;
nothing is skipped. If the group rebalances meanwhile, the batch is abandoned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from typing import TypeVar

from streamrec.errors import BatchAbandoned, KafkaUnavailable, RedisUnavailable, StreamrecError
from streamrec.kafka.consumer import ClickConsumer
from streamrec.schemas import EventBatch
from streamrec.serving.judge import OnlineJudge
from streamrec.serving.parts import ServingParts
from streamrec.serving.sequences import OnRefused
from streamrec.waiting import pause

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
A = TypeVar("A")
R = TypeVar("R")


class Worker:
    """Processes batches, one after another."""

    def __init__(self, consumer: ClickConsumer, parts: ServingParts, judge: OnlineJudge) -> None:
        self._consumer = consumer
        self._parts = parts
        self._judge = judge
        self._health = parts.health
        self.handled_events = 0

    @property
    def idle(self) -> bool:
        """Whether no batch is being processed."""
        return self._consumer.idle

    async def run(self, stop: asyncio.Event, burst: bool = False) -> None:
        """Serve until ``stop`` is set or, with ``burst``, the topic is drained."""
        async with contextlib.aclosing(self._consumer.batches(stop, burst)) as batches:
            async for batch in batches:
                try:
                    await self.handle(batch)
                    self.handled_events += len(batch.events)
                except BatchAbandoned:
                    log.warning("batch abandoned; its events will be redelivered")

    async def handle(self, batch: EventBatch) -> None:
        """Process one batch, from events to the commit."""
        parts = self._parts
        sequences, refused = await self._retried(batch, lambda: _refusals(parts.store.append, batch))
        parts.lists.count(sequences)
        recommendations = await parts.predictor.predict(sequences)
        previous, unpublished = await self._retried(batch, lambda: _refusals(parts.publisher.publish, recommendations))
        evaluated = self._judge.evaluate(sequences, previous)
        if refused or unpublished:
            self._refuse(batch, refused | unpublished)
        await self._retried(batch, lambda: self._consumer.commit(batch))
        parts.shadow.follow(sequences, evaluated)

    def _refuse(self, batch: EventBatch, refused: Mapping[str, StreamrecError]) -> None:
        """Make dead letters of all events of users whose data Redis can never take."""
        self._consumer.refuse(batch, refused)
        for error in islice(refused.values(), 1):
            log.warning("dead letters, since Redis can never take them: %s", error, extra={"users": len(refused)})

    async def _retried(self, batch: EventBatch, step: Callable[[], Awaitable[R]]) -> R:
        """Run a step until it succeeds.

        Raises:
            BatchAbandoned: the group rebalances while Redis or Kafka is unreachable.
        """
        watch, pause_s = self._parts.watch, FIRST_PAUSE_S
        last: StreamrecError | None = None
        try:
            while True:
                try:
                    result = await step()
                except (RedisUnavailable, KafkaUnavailable) as error:
                    if last is None:
                        log.warning("%s; the batch waits and is retried", error, extra={"events": len(batch.events)})
                    last = error
                    if isinstance(error, RedisUnavailable):
                        watch.batch_waits(error)
                    if self._consumer.rebalancing or batch.assignment != self._consumer.assignment:
                        raise BatchAbandoned from error  # otherwise the whole group would wait too
                    await self._consumer.keep_alive()
                    await pause(self._consumer.rebalance, pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    continue
                if isinstance(last, RedisUnavailable):
                    watch.batch_continues()
                elif last is not None:
                    log.info("reachable again; the batch continues")
                    self._health.progressed()
                return result
        finally:
            watch.batch_abandoned()  # if it was


async def _refusals(step: Callable[[A, OnRefused], Awaitable[R]], argument: A) -> tuple[R, dict[str, StreamrecError]]:
    """Run a step; return its result, and the users that it refused, with the reason."""
    refused: dict[str, StreamrecError] = {}
    return await step(argument, refused.__setitem__), refused
