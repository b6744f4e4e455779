"""Read batches of events from Kafka, and commit their offsets.

Delivery rests on this order:

    1. poll           positions advance in this process only
    2. decode         from bytes, here: a deserializer that raises inside the client loses other records
    3. worker         appends, scores and publishes
    4. dead letters   are acknowledged by the broker
    5. commit         explicit offsets, only if the partitions were not revoked since the poll

A crash before 5 redelivers the batch; the replay guard in Redis makes that harmless.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from itertools import chain

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from streamrec.health import Health
from streamrec.kafka.connection import (
    FencedInstanceIdError,
    connection_options,
    kafka_error,
    start_client,
)
from streamrec.kafka.decode import EventDecoder
from streamrec.kafka.lag import Lag
from streamrec.kafka.members import StaticPlace, member_name, remove_members
from streamrec.kafka.polled import Decoded, dead_letter
from streamrec.kafka.positions import Marks, Positions, begin_at_end
from streamrec.kafka.producer import Producer
from streamrec.kafka.records import READING
from streamrec.kafka.watch import BrokerWatch
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter, EventBatch
from streamrec.setting_groups import EventSettings, KafkaSettings
from streamrec.waiting import pause

log = logging.getLogger(__name__)

# The current batch must end this time before the rebalance time-out, at which the group would drop this member.
REBALANCE_MARGIN_S = 5.0
MAX_HEARTBEAT_S = 3.0
HELD_PAUSE_S = 1.0

DeadLetterListener = Callable[[Sequence[DeadLetter]], None]
Polled = dict[TopicPartition, list[ConsumerRecord]]


class ClickConsumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of the consumer group.

    Caches survive a rebalance: sasrec compares each cached prefix with the window from Redis before using it.

    Args:
        marks: tells whether the topic is the one that was read before.
        on_dead_letters: called with the dead letters that the broker has acknowledged.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        events: EventSettings,
        dead_letters: Producer,
        marks: Marks,
        metrics: Metrics,
        health: Health,
        on_dead_letters: DeadLetterListener = lambda _: None,
    ) -> None:
        self._kafka = kafka
        self._decoder = EventDecoder(events)
        self._dead_letters = dead_letters
        self._marks = marks
        self._metrics = metrics
        self._health = health
        self._on_dead_letters = on_dead_letters
        self._name = member_name()
        self._consumer = AIOKafkaConsumer(
            **connection_options(kafka),
            client_id=self._name,
            group_id=kafka.group,
            group_instance_id=kafka.group_instance_id,
            **READING,
            fetch_max_wait_ms=kafka.poll_timeout_ms,
            session_timeout_ms=int(kafka.session_timeout_s * 1000),
            # a member learns of a rebalance from its heartbeats, and the others wait for it
            heartbeat_interval_ms=int(min(MAX_HEARTBEAT_S, kafka.session_timeout_s / 3) * 1000),
            rebalance_timeout_ms=int(kafka.rebalance_timeout_s * 1000),
        )
        self._assignment = 0
        self._place = StaticPlace(kafka)
        self._idle = asyncio.Event()
        self._idle.set()
        self.rebalance = asyncio.Event()  # set while the group waits for this member to release its partitions
        self._lag = Lag(metrics, health)
        self._positions = Positions(kafka, self._consumer, marks, self._lag, health)
        self.watch = BrokerWatch(kafka, self._consumer, self._lag, health)
        self._paused: frozenset[TopicPartition] = frozenset()
        self._in_hand, self._held = Polled(), Polled()  # the records of the current batch; those that wait for a schema

    @property
    def assignment(self) -> int:
        """Number of the current assignment; it changes when partitions are revoked."""
        return self._assignment

    @property
    def rebalancing(self) -> bool:
        """Whether the group waits for this member to release its partitions."""
        return self.rebalance.is_set()

    @property
    def idle(self) -> bool:
        """Whether no batch is being processed."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        """Wait until no batch is being processed."""
        while not self.idle:  # the next batch may have begun before this task ran
            await self._idle.wait()

    async def start(self) -> None:
        """Join the group.

        Raises:
            KafkaUnavailable: no broker answers, or it refuses the connection. KafkaForbidden: a right is missing.
        """
        if self._kafka.auto_offset_reset == "latest":
            await begin_at_end(self._kafka)
        await start_client(self._kafka, self._consumer)
        self._consumer.subscribe([self._kafka.topic], listener=self)

    async def stop(self) -> None:
        """Leave the group."""
        # The client leaves only after its join has ended, which may take longer than the shutdown.
        # A static member does not leave: it resumes its place.
        if self.rebalancing and not self._kafka.group_instance_id:
            await remove_members(self._kafka, lambda client_id: client_id == self._name)
        await self._consumer.stop()

    async def batches(self, stop: asyncio.Event, burst: bool = False) -> AsyncGenerator[EventBatch, None]:
        """Yield batches until ``stop`` is set or, with ``burst``, until the assigned partitions are read to their end.

        The poll is the micro-batch: it returns at once with the buffered records. It continues without assigned
        partitions, so that the group sees a member that polls, and is never wrapped in a time-out, which would cancel
        it midway. A batch that is not full contains every available record: fetching then pauses until the batch is
        published. Otherwise the next batch would contain only the records of that moment, and later ones would wait
        for two batches.

        Raises:
            KafkaUnavailable: the brokers return unreadable records. KafkaForbidden: the right to read is missing.
        """
        while not stop.is_set():
            self._health.tick()
            self._place.check()
            await self._positions.settle()
            polled = await self._take()
            if polled is None or not self._positions.settled:  # newly assigned partitions are read again
                continue
            if not polled:
                drained = burst and not self.rebalancing and await self._positions.drained()
                if not self.rebalancing:
                    await self._positions.commit_passed(at_once=drained)
                if drained:
                    return
                continue
            self._idle.clear()
            self._in_hand = polled
            full = sum(map(len, polled.values())) >= self._kafka.max_batch
            self._paused = frozenset() if full else self._consumer.assignment()
            self._consumer.pause(*self._paused)
            try:
                yield await self._batch(polled)
            finally:
                self._resume_fetching()
                self._in_hand = {}
                self._idle.set()

    async def _take(self) -> Polled | None:
        """Poll for a batch; None if its records wait for a schema, or were assigned anew while they did."""
        polled = self._held or await self._poll(self._kafka.poll_timeout_ms, self._kafka.max_batch)
        assignment = self._assignment
        known = self._health.schemas_known = await self._decoder.prepare(chain(*polled.values()))
        if assignment != self._assignment:
            return None
        self._held = {} if known else polled
        if known:
            return polled
        await self.keep_alive()
        await pause(self.rebalance, HELD_PAUSE_S)
        return None

    def refuse(self, batch: EventBatch, reasons: Mapping[str, object]) -> None:
        """Make dead letters of the records of users whose events can never be applied; ``reasons`` are by user id."""
        places = {(e.partition, e.offset): str(reasons[e.user_id]) for e in batch.events if e.user_id in reasons}
        for record in (record for records in self._in_hand.values() for record in records):
            reason = places.get((record.partition, record.offset))
            if reason is not None:
                batch.dead_letters.append(dead_letter(record, reason))

    async def commit(self, batch: EventBatch) -> None:
        """Send dead letters until they are acknowledged, then commit.

        A commit that a rebalance has overtaken is dropped: the events will be redelivered.

        Raises:
            KafkaUnavailable: dead letters or offsets were not written; try again. KafkaForbidden: a right is missing.
        """
        if batch.dead_letters:
            await self._dead_letters.send_dead_letters(batch.dead_letters)
            # counter and details change together, or a page would show one without the other
            self._metrics.events.labels("dead_letter").inc(len(batch.dead_letters))
            self._metrics.dead_letters.inc(len(batch.dead_letters))
            self._on_dead_letters(batch.dead_letters)
            batch.dead_letters.clear()  # a retry of the commit does not send them again
        self._resume_fetching()  # the next batch is fetched while the broker answers
        if batch.assignment != self._assignment:
            log.info("commit dropped: the partitions were assigned to another member")
            return
        await self._positions.commit(batch.next_offsets)
        self._marks.note(batch.marks)

    def _resume_fetching(self) -> None:
        self._consumer.resume(*(self._paused & self._consumer.assignment()))
        self._paused = frozenset()

    async def keep_alive(self) -> None:
        """Stay in the group while a batch waits: poll, but read nothing. Raises as ``batches`` does."""
        assigned = self._consumer.assignment()
        self._consumer.pause(*assigned)
        try:
            await self._poll(timeout_ms=0)  # partitions that are assigned meanwhile are placed before the next batch
        finally:
            self._consumer.resume(*(assigned & self._consumer.assignment()))
        self._health.tick()

    async def _poll(self, timeout_ms: int, max_records: int | None = None) -> Polled:
        try:
            polled: Polled = await self._consumer.getmany(timeout_ms=timeout_ms, max_records=max_records)
            return polled
        except NoOffsetForPartitionError:  # not settled yet
            return {}
        except OffsetOutOfRangeError as error:
            if self._positions.settled:
                await self._positions.move_into_range(error)
            return {}
        except KafkaError as error:
            raise kafka_error(self._kafka, error) from error

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Wait until the current batch ends, or abandon it before the group drops this member."""
        self._health.rebalancing_since_s = self._health.now_s()
        self.rebalance.set()
        if self._health.joined and vars(self._consumer)["_coordinator"].generation < 0:
            self._place.lost(self._health.now_s())
        limit_s = max(1.0, self._kafka.rebalance_timeout_s - REBALANCE_MARGIN_S)
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("rebalance: the current batch is abandoned", extra={"waited_s": limit_s})
        self._assignment += 1
        self._positions.assigned(())
        self._held = {}
        self._lag.revoked(revoked)
        if revoked:
            log.info("partitions revoked", extra={"partitions": sorted(p.partition for p in revoked)})
        if self._place.is_taken:  # end, and join no more: that would take the name from the other daemon
            vars(self._consumer)["_subscription"].abort_waiters(FencedInstanceIdError())
            await asyncio.Event().wait()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Note the new assignment; the loop settles it, since heartbeats begin only after this."""
        self._positions.assigned(assigned)
        self._health.rebalancing_since_s = None
        self.rebalance.clear()
        self._health.joined = True
        self._health.progressed()
        self._metrics.rebalances.inc()
        log.info("partitions assigned", extra={"partitions": sorted(p.partition for p in assigned)})

    async def _batch(self, polled: Polled) -> EventBatch:
        decoded = Decoded()
        batch = EventBatch(decoded.events, decoded.dead_letters, assignment=self._assignment, marks=decoded.marks)
        for partition, records in polled.items():
            decoded.add(self._decoder, records)
            batch.next_offsets[partition.partition] = await self._positions.after(partition, records)
            self._lag.read(partition.partition, records[-1].timestamp)
        self._metrics.batch_events.observe(len(batch.events))
        self._metrics.events.labels("ignored").inc(decoded.ignored)
        for letter in batch.dead_letters[:1]:
            where = {"partition": letter.partition, "offset": letter.offset, "in_batch": len(batch.dead_letters)}
            log.warning("dead letter: %s", letter.reason, extra=where)
        return batch
