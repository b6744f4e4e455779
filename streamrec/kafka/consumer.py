"""Kafka records -> EventBatch, and the commit.

The order that delivery rests on:

    1. poll        positions advance in this process only
    2. decode      here, from bytes: a deserializer that raises inside the client loses other records
    3. (the worker appends, scores and publishes)
    4. dead letters acknowledged by the broker
    5. commit      explicit offsets, and only under the assignment that the batch was read under

A crash anywhere before 5 redelivers the batch; the replay guard in Redis makes that harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Collection

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from streamrec.errors import BadRecord
from streamrec.health import Health
from streamrec.kafka.connection import (
    Producer,
    connection_options,
    explained,
    leave_for_members,
    member_name,
    pause_after_empty_fetches,
    unavailable,
)
from streamrec.kafka.decode import EventDecoder
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter, EventBatch
from streamrec.settings import Settings

log = logging.getLogger(__name__)

# The batch in hand must be done this long before the group gives us up.
REBALANCE_MARGIN_S = 5.0
WATCH_S = 2.0
MAX_HEARTBEAT_S = 3.0
BROKER_TIMEOUT_S = 5.0


class ClickConsumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of the consumer group.

    Nothing is forgotten when partitions go: a cached prefix proves itself against the window from Redis
    (sasrec/engine.py), and eager rebalancing gives most partitions back a moment later.
    """

    def __init__(self, settings: Settings, dead_letters: Producer, metrics: Metrics, health: Health) -> None:
        self._settings = settings
        self._decoder = EventDecoder(settings)
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._health = health
        self._name = member_name()
        self._consumer = AIOKafkaConsumer(
            **connection_options(settings),
            client_id=self._name,
            group_id=settings.kafka_group,
            group_instance_id=settings.kafka_group_instance_id,
            enable_auto_commit=False,
            auto_offset_reset=settings.kafka_auto_offset_reset,
            fetch_max_wait_ms=settings.poll_timeout_ms,
            session_timeout_ms=int(settings.kafka_session_timeout_s * 1000),
            # a member learns of a rebalance by its heartbeats, and all the others wait for it, whatever the time-out
            heartbeat_interval_ms=int(min(MAX_HEARTBEAT_S, settings.kafka_session_timeout_s / 3) * 1000),
            rebalance_timeout_ms=int(settings.kafka_rebalance_timeout_s * 1000),
        )
        self._assignment = 0
        self._member_id = ""
        self._idle = asyncio.Event()
        self._idle.set()
        self._committed: dict[int, int] = {}
        self._committed_ts_ms: dict[int, int] = {}
        self._end_offsets: dict[int, int] = {}
        self._watch: asyncio.Task[None] | None = None
        self._paused: frozenset[TopicPartition] = frozenset()

    @property
    def assignment(self) -> int:
        """Number of the current assignment; it changes when partitions are taken away."""
        return self._assignment

    @property
    def rebalancing(self) -> bool:
        """Whether the group waits for us to give up our partitions."""
        return self._health.rebalancing_since_s is not None

    @property
    def idle(self) -> bool:
        """Whether no batch is in hand."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        """Until no batch is in hand."""
        while not self.idle:  # the next batch may have come between the end of one and our turn
            await self._idle.wait()

    async def start(self) -> None:
        """Join the group.

        Raises:
            KafkaUnavailable: no broker answers, or it refuses us.
        """
        try:
            await self._consumer.start()
        except BaseException as error:  # Ctrl-C too, or its connections would be left open
            await self._consumer.stop()
            if isinstance(error, (KafkaError, OSError)):
                raise unavailable(self._settings, error) from error
            raise
        pause_after_empty_fetches(self._consumer)
        self._consumer.subscribe([self._settings.kafka_topic], listener=self)
        self._watch = asyncio.create_task(self._watch_broker(), name="watch-broker")

    async def stop(self) -> None:
        """Leave the group."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self.rebalancing:  # the client leaves only once its join is through, which may take longer than we have
            await self._leave_for_members()
        await self._consumer.stop()

    async def batches(self, stop: asyncio.Event, burst: bool = False) -> AsyncGenerator[EventBatch, None]:
        """Batches until asked to stop or, with ``burst``, until the assigned partitions are read to their end.

        The poll is the micro-batch: it returns at once with what is buffered. It goes on with no partition
        assigned, so that the group sees a member that polls, and is never wrapped in a time-out, which
        would cancel it in the middle. A batch that is not full was all there was: the client fetches no more until it
        is published, or the next one would hold what came at its beginning, and what came later would wait for two.

        Raises:
            KafkaUnavailable: the brokers refuse us, or hand out what cannot be read; waiting would not help.
        """
        while not stop.is_set():
            self._health.tick()
            try:
                polled = await self._consumer.getmany(
                    timeout_ms=self._settings.poll_timeout_ms, max_records=self._settings.max_batch
                )
            except KafkaError as error:
                raise unavailable(self._settings, error) from error
            if not polled:
                if burst and await self._drained():
                    return
                continue
            self._idle.clear()
            full = sum(map(len, polled.values())) >= self._settings.max_batch
            self._paused = frozenset() if full else self._consumer.assignment()
            self._consumer.pause(*self._paused)
            try:
                yield self._batch(polled)
            finally:
                self._fetch_again()
                self._idle.set()

    async def commit(self, batch: EventBatch) -> None:
        """Acknowledge dead letters, then commit.

        A commit that a rebalance has overtaken is dropped: the events will be delivered again.

        Raises:
            KafkaUnavailable: dead letters or offsets could not be written; try again.
        """
        if batch.dead_letters:
            await self._dead_letters.send_dead_letters(batch.dead_letters)
        self._fetch_again()  # the next batch is on its way while the broker answers
        if batch.assignment != self._assignment:
            log.info("commit dropped: the partitions were given to somebody else")
            return
        offsets = {self._partition(number): offset for number, offset in batch.next_offsets.items()}
        try:
            await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError):
            log.info("commit refused after a rebalance; the events will be delivered again, and skipped")
            return
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings, error) from error
        self._committed |= batch.next_offsets
        self._health.progressed()
        self._update_lag()

    def _fetch_again(self) -> None:
        self._consumer.resume(*(self._paused & self._consumer.assignment()))
        self._paused = frozenset()

    async def keep_alive(self) -> None:
        """Stay in the group while a batch is held: poll, but read nothing."""
        assigned = self._consumer.assignment()
        self._consumer.pause(*assigned)
        try:
            polled = await self._consumer.getmany(timeout_ms=0)
            for partition, records in polled.items():  # assigned while we looked away
                self._consumer.seek(partition, records[0].offset)
        finally:
            self._consumer.resume(*(assigned & self._consumer.assignment()))
        self._health.tick()

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Let the batch in hand finish and commit, or abandon it while the group still waits for us."""
        self._health.rebalancing_since_s = self._health.now_s()
        limit_s = max(1.0, self._settings.kafka_rebalance_timeout_s - REBALANCE_MARGIN_S)
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("rebalance: the batch in hand is abandoned", extra={"waited_s": limit_s})
        self._assignment += 1
        self._committed, self._end_offsets = {}, {}
        for partition in revoked:
            for gauge in (self._metrics.lag_records, self._metrics.lag_seconds):
                with contextlib.suppress(KeyError):
                    gauge.remove(str(partition.partition))
        self._health.lag_records = 0
        if revoked:
            log.info("partitions given up", extra={"partitions": sorted(p.partition for p in revoked)})
        coordinator = self._consumer._coordinator
        if not coordinator.member_id and self._member_id:
            # the client forgets who it is when a commit comes too late; the group does not, and would wait for a ghost
            coordinator.member_id, self._member_id = self._member_id, ""
        elif not coordinator.member_id:  # at the start, or when the group has forgotten us too
            dead = await self._leave_for_members()
            if dead:
                log.info("members that died without leaving the group were dismissed", extra={"members": dead})

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Note the new assignment."""
        self._member_id = self._consumer._coordinator.member_id
        self._health.rebalancing_since_s = None
        self._health.joined = True
        self._health.progressed()
        self._metrics.rebalances.inc()
        log.info("partitions assigned", extra={"partitions": sorted(p.partition for p in assigned)})

    async def _leave_for_members(self) -> int:
        # a static member keeps its place, and takes it again by itself
        return await leave_for_members(self._settings, self._name) if not self._settings.kafka_group_instance_id else 0

    def _batch(self, polled: dict[TopicPartition, list[ConsumerRecord]]) -> EventBatch:
        batch = EventBatch(assignment=self._assignment)
        ignored = 0
        for partition, records in polled.items():
            for record in records:
                try:
                    event = self._decoder.decode(record.value, record.partition, record.offset, record.timestamp)
                except BadRecord as error:
                    batch.dead_letters.append(_dead_letter(record, str(error)))
                    continue
                if event is None:
                    ignored += 1
                else:
                    batch.events.append(event)
            batch.next_offsets[partition.partition] = records[-1].offset + 1
            self._committed_ts_ms[partition.partition] = records[-1].timestamp
        self._metrics.batch_events.observe(len(batch.events))
        self._metrics.events.labels("ignored").inc(ignored)
        self._metrics.events.labels("dead_letter").inc(len(batch.dead_letters))
        self._metrics.dead_letters.inc(len(batch.dead_letters))
        for letter in batch.dead_letters[:1]:
            log.warning("dead letter: %s", letter.reason, extra={
                "partition": letter.partition, "offset": letter.offset, "in_batch": len(batch.dead_letters)
            })  # fmt: skip
        return batch

    async def _drained(self) -> bool:
        """Joined, and every assigned partition read to its end."""
        assigned = list(self._consumer.assignment())
        if not self._health.joined or self._health.rebalancing_since_s is not None:
            return False
        try:
            async with asyncio.timeout(BROKER_TIMEOUT_S):
                ends = await self._consumer.end_offsets(assigned) if assigned else {}
                return all([await self._consumer.position(partition) >= ends[partition] for partition in assigned])
        except (KafkaError, TimeoutError, OSError):  # away, or a rebalance began: ask again after the next poll
            return False

    async def _watch_broker(self) -> None:
        """Ask for the ends of the partitions now and then: the lag, and whether Kafka answers."""
        while True:
            settled = not self.rebalancing
            try:
                async with asyncio.timeout(BROKER_TIMEOUT_S):
                    await self._ask_for_ends()
                self._update_lag()
                if not self._health.kafka_answers:
                    log.info("Kafka is back")
                    self._health.tick()  # the loop needs a moment before it comes round and commits again
                    self._health.progressed()
                self._health.kafka_answers = True
            except (KafkaError, TimeoutError, OSError) as error:
                if settled and self.rebalancing:
                    continue  # a join holds the coordinator's answers back: ask again, for metadata
                was_there, self._health.kafka_answers = self._health.kafka_answers, False
                if was_there:
                    log.warning("Kafka is away, waiting for it: %s", await explained(self._settings, error))
            await asyncio.sleep(WATCH_S)

    async def _ask_for_ends(self) -> None:
        assigned = list(self._consumer.assignment())
        if not assigned or self.rebalancing:  # the coordinator is busy; the metadata tell whether a broker answers
            await self._consumer.topics()
            return
        assignment, begins = self._assignment, {}
        ends = await self._consumer.end_offsets(assigned)
        for partition in assigned:
            if partition.partition not in self._committed:
                committed = await self._consumer.committed(partition)
                begins[partition.partition] = (
                    await self._consumer.position(partition) if committed is None else committed
                )
        if assignment == self._assignment:  # none was taken away meanwhile
            self._committed = begins | self._committed
            self._end_offsets = {partition.partition: end for partition, end in ends.items()}

    def _update_lag(self) -> None:
        now_ms = time.time() * 1000
        total = 0
        for partition, committed in self._committed.items():
            lag = max(0, self._end_offsets.get(partition, committed) - committed)
            total += lag
            age_s = max(0.0, (now_ms - self._committed_ts_ms.get(partition, now_ms)) / 1000) if lag else 0.0
            self._metrics.lag_records.labels(str(partition)).set(lag)
            self._metrics.lag_seconds.labels(str(partition)).set(age_s)
        self._health.lag_records = total
        if not total:
            self._health.progressed()

    def _partition(self, number: int) -> TopicPartition:
        return TopicPartition(self._settings.kafka_topic, number)


def _dead_letter(record: ConsumerRecord, reason: str) -> DeadLetter:
    return DeadLetter(record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, reason)
