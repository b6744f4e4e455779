"""The click topic -> the event archive.

All partitions are read by one process, without a group's rebalances: where each goes on is told by the archive
alone. Offsets are committed only so that the lag can be seen from outside.

    1. poll and decode, as the daemon does; dead letters are counted here, and produced by the daemon alone
    2. write a segment: after so many events, or so many seconds, and at the end
    3. commit
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from streamrec.archive import EventArchive
from streamrec.decode import EventDecoder
from streamrec.errors import BadRecord, KafkaUnavailable
from streamrec.kafka import (
    connection_options,
    ensure_topics,
    pause_after_empty_fetches,
    topic_partitions,
    unavailable,
)
from streamrec.schemas import ClickEvent
from streamrec.settings import Settings

log = logging.getLogger(__name__)

SEGMENT_EVENTS = 50_000
POLL_RECORDS = 10_000
NEW_PARTITIONS_EVERY_S = 30.0
AWAY_PAUSE_S = 1.0


@dataclass
class _Pending:
    """What was read of a partition and is not in the archive yet."""

    first: int
    next: int
    events: list[ClickEvent] = field(default_factory=list)
    dead_letters: int = 0


class Archiver:
    """Follows the click topic and writes what it reads into an archive."""

    def __init__(self, settings: Settings, archive: EventArchive) -> None:
        self._settings = settings
        self._archive = archive
        self._decoder = EventDecoder(settings)
        self._pending: dict[int, _Pending] = {}
        self._flushed_s = time.monotonic()
        self._assigned: set[TopicPartition] = set()
        self._looked_s = -NEW_PARTITIONS_EVERY_S
        self._ends: dict[TopicPartition, int] | None = None
        self.archived = 0  # events

    async def run(self, stop: asyncio.Event, burst: bool = False) -> None:
        """Follow until ``stop`` is set or, with ``burst``, until the topic is read to where it ended at the start.

        Raises:
            KafkaUnavailable: no broker answers at the start, or one refuses us.
            ArchiveError: the archive cannot be written, or another process does so.
        """
        with self._archive.following():
            await self._follow(stop, burst)

    async def _follow(self, stop: asyncio.Event, burst: bool) -> None:
        for topic in await ensure_topics(self._settings, (self._settings.kafka_topic,)):
            log.info("topic created", extra={"topic": topic, "partitions": self._settings.kafka_partitions})
        async with self._consumer() as consumer:
            while not stop.is_set():
                try:
                    await self._assign(consumer)
                    polled = await consumer.getmany(timeout_ms=self._settings.poll_timeout_ms, max_records=POLL_RECORDS)
                except KafkaUnavailable as error:
                    log.warning("Kafka is away, waiting for it: %s", error)
                    await asyncio.sleep(AWAY_PAUSE_S)
                    continue
                except KafkaError as error:
                    raise unavailable(self._settings, error) from error
                for partition, records in polled.items():
                    self._take(partition.partition, records)
                drained = burst and await self._drained(consumer)
                if drained or self._is_due():
                    await self._flush(consumer)
                if drained:
                    return
            await self._flush(consumer)

    @contextlib.asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            **connection_options(self._settings),
            group_id=f"{self._settings.kafka_group}-archive",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # of what retention has removed there is nothing to wait for
            fetch_max_wait_ms=self._settings.poll_timeout_ms,
        )
        try:
            await consumer.start()
            pause_after_empty_fetches(consumer)
        except (KafkaError, OSError) as error:
            await consumer.stop()
            raise unavailable(self._settings, error) from error
        try:
            yield consumer
        finally:
            await consumer.stop()

    async def _assign(self, consumer: AIOKafkaConsumer) -> None:
        """Read every partition there is, each from where the archive ends; look for new ones now and then."""
        if time.monotonic() - self._looked_s < NEW_PARTITIONS_EVERY_S:
            return
        topic = self._settings.kafka_topic
        count = (await topic_partitions(self._settings, (topic,)))[topic]
        self._looked_s = time.monotonic()
        wanted = {TopicPartition(topic, number) for number in range(count)}
        if wanted == self._assigned:
            return
        ends = await asyncio.to_thread(self._archive.next_offsets)
        consumer.assign(sorted(wanted))
        for partition in wanted:
            pending = self._pending.get(partition.partition)
            at = pending.next if pending else ends.get(partition.partition)
            if at is None:
                await consumer.seek_to_beginning(partition)
            else:
                consumer.seek(partition, at)
        self._assigned = wanted
        log.info("archiving", extra={"topic": topic, "partitions": count, "archive": self._archive.folder})

    def _take(self, partition: int, records: list[ConsumerRecord]) -> None:
        pending = self._pending.setdefault(partition, _Pending(records[0].offset, records[0].offset))
        for record in records:
            try:
                event = self._decoder.decode(record.value, record.partition, record.offset, record.timestamp)
            except BadRecord:
                pending.dead_letters += 1
                continue
            if event is not None:
                pending.events.append(event)
        pending.next = records[-1].offset + 1

    def _is_due(self) -> bool:
        waiting = sum(len(pending.events) for pending in self._pending.values())
        return waiting >= SEGMENT_EVENTS or time.monotonic() - self._flushed_s >= self._settings.archive_flush_s

    async def _flush(self, consumer: AIOKafkaConsumer) -> None:
        self._flushed_s = time.monotonic()
        offsets = {}
        for number, pending in sorted(self._pending.items()):
            await asyncio.to_thread(
                self._archive.append, number, pending.first, pending.next, pending.events, pending.dead_letters
            )
            await asyncio.to_thread(self._archive.merge, number)
            del self._pending[number]
            self.archived += len(pending.events)
            offsets[TopicPartition(self._settings.kafka_topic, number)] = pending.next
        if offsets:
            with contextlib.suppress(KafkaError):  # for the eye alone
                await consumer.commit(offsets)
            log.info("segments written", extra={"partitions": len(offsets), "events": self.archived})

    async def _drained(self, consumer: AIOKafkaConsumer) -> bool:
        """Whether all is read that was there at the first call; what comes meanwhile could go on for ever."""
        try:
            if self._ends is None:
                self._ends = await consumer.end_offsets(list(self._assigned)) if self._assigned else {}
            return all([await consumer.position(partition) >= end for partition, end in self._ends.items()])
        except KafkaError:
            return False
