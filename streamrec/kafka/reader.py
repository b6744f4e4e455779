"""Read all partitions of the click topic in one process, without a consumer group's rebalances.

The caller knows the offset at which each partition continues. Events are decoded as the daemon does. Dead letters are
only counted here; the daemon produces them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from streamrec.errors import KafkaUnavailable
from streamrec.kafka.connection import (
    BROKER_TIMEOUT_S,
    NO_RIGHT,
    connection_options,
    kafka_error,
    start_client,
)
from streamrec.kafka.decode import EventDecoder
from streamrec.kafka.marks import check_topic, topic_changed
from streamrec.kafka.polled import Decoded, warn_of_lost
from streamrec.kafka.positions import move_into_range
from streamrec.kafka.records import READING
from streamrec.kafka.topics import topic_partitions
from streamrec.schemas import ClickEvent, RecordMark
from streamrec.setting_groups import EventSettings, KafkaSettings

log = logging.getLogger(__name__)

POLL_RECORDS = 10_000
NEW_PARTITIONS_EVERY_S = 30.0
HELD_PAUSE_S = 1.0


@dataclass
class OffsetRange:
    """The events and the number of dead letters at the offsets from ``first`` to ``next`` - 1 of a partition."""

    first: int
    next: int
    events: list[ClickEvent] = field(default_factory=list)
    dead_letters: int = 0
    mark: RecordMark | None = None  # of the last record


class TopicReader:
    """Reads the topic from given offsets on.

    Args:
        start: the first offset to read, by partition; other partitions are read from their beginning.
        marks: of the records before these, by partition, as far as known: the topic must have them.
        group: the consumer group for which ``commit`` commits; None: nothing is committed.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        events: EventSettings,
        start: Mapping[int, int],
        marks: Mapping[int, RecordMark],
        group: str | None = None,
    ) -> None:
        self._kafka = kafka
        self._decoder = EventDecoder(events)
        self._marks = dict(marks)
        self._is_checked = False
        self._group = group
        self._consumer: AIOKafkaConsumer | None = None
        self._assigned: set[TopicPartition] = set()
        self._checked_s = -NEW_PARTITIONS_EVERY_S
        self._ends: dict[TopicPartition, int] | None = None
        self._held: dict[TopicPartition, list[ConsumerRecord]] = {}  # they wait for a schema
        self.next_offsets = dict(start)

    async def __aenter__(self) -> Self:
        """Connect. Raises KafkaUnavailable if no broker answers."""
        consumer = self._consumer = AIOKafkaConsumer(
            **connection_options(self._kafka),
            group_id=self._group,
            **READING,
            fetch_max_wait_ms=self._kafka.poll_timeout_ms,
        )
        await start_client(self._kafka, consumer)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.stop()

    async def find_partitions(self) -> None:
        """Assign all partitions of the topic to this reader; look for new ones every ``NEW_PARTITIONS_EVERY_S``.

        Raises:
            KafkaUnavailable: the brokers do not answer, or the topic does not exist.
            KafkaForbidden: the right to describe the topic is missing.
            TopicChanged: the topic is not the one that was read before.
        """
        if time.monotonic() - self._checked_s < NEW_PARTITIONS_EVERY_S:
            return
        topic = self._kafka.topic
        count = (await topic_partitions(self._kafka, (topic,), self._client))[topic]
        if not count:  # without a partition the client would wait forever
            self._is_checked = False
            raise KafkaUnavailable(
                f"Kafka has no topic {topic}; is STREAMREC_KAFKA_TOPIC right? streamrec serve creates it"
            )
        if not self._is_checked:  # the topic is new to this reader, or was missing for a while
            await check_topic(self._kafka, self._marks)
            self._is_checked = True
        wanted = {TopicPartition(topic, number) for number in range(count)}
        if wanted != self._assigned:
            await self._assign(wanted)
            log.info("reading", extra={"topic": topic, "partitions": count})
        self._checked_s = time.monotonic()

    async def poll(self, timeout_ms: int | None = None) -> dict[int, OffsetRange]:
        """Return the next records, by partition.

        Args:
            timeout_ms: longest time to wait for records [``kafka_poll_timeout_ms``].

        Raises:
            KafkaUnavailable: the brokers return unreadable records; waiting would not help.
            KafkaForbidden: the right to read is missing.
        """
        wait_ms = self._kafka.poll_timeout_ms if timeout_ms is None else timeout_ms
        try:
            polled = self._held or await self._client.getmany(timeout_ms=wait_ms, max_records=POLL_RECORDS)
        except OffsetOutOfRangeError as error:
            await self._move_into_range(error)
            return {}
        except KafkaError as error:
            raise kafka_error(self._kafka, error) from error
        self._held = {} if await self._decoder.prepare(chain(*polled.values())) else polled
        if self._held:
            await asyncio.sleep(HELD_PAUSE_S)
            return {}
        ranges = {}
        for place in self._assigned:
            next_offset = await self._client.position(place)
            if next_offset > self.next_offsets[place.partition]:
                ranges[place.partition] = self._decode(polled.get(place, []), place.partition, next_offset)
                self.next_offsets[place.partition] = next_offset
        return ranges

    async def drained(self) -> bool:
        """Return whether everything is read that was in the topic at the first call; later records do not count."""
        if self._held:
            return False
        try:
            if self._ends is None:
                self._ends = await self._client.end_offsets(list(self._assigned))
            return all([await self._client.position(partition) >= end for partition, end in self._ends.items()])
        except KafkaError:
            return False

    async def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Commit, to show the lag to other tools; a commit that fails is left to the next call.

        Raises:
            KafkaForbidden: the right to commit is missing.
        """
        topic = self._kafka.topic
        offsets = {TopicPartition(topic, number): offset for number, offset in next_offsets.items()}
        try:
            async with asyncio.timeout(BROKER_TIMEOUT_S):  # the client would try again without end
                await self._client.commit(offsets)
        except NO_RIGHT as error:
            raise kafka_error(self._kafka, error) from error
        except (KafkaError, TimeoutError):
            pass

    def _decode(self, records: list[ConsumerRecord], partition: int, next_offset: int) -> OffsetRange:
        """Return the events of the offsets that were read of a partition; control records have none."""
        decoded = Decoded()
        decoded.add(self._decoder, records)
        self._marks |= decoded.marks
        first, letters = self.next_offsets[partition], len(decoded.dead_letters)
        return OffsetRange(first, next_offset, decoded.events, letters, decoded.marks.get(partition))

    async def _move_into_range(self, error: OffsetOutOfRangeError) -> None:
        """Continue after what retention has removed.

        Raises:
            KafkaUnavailable: Kafka does not answer. TopicChanged: the topic ends before the next offset.
        """
        try:
            await move_into_range(self._client, error)
            moved = {place: await self._client.position(place) for place in error.args[0]}
        except (KafkaError, OSError) as failed:
            raise kafka_error(self._kafka, failed) from failed
        for place, position in moved.items():
            if position < self.next_offsets[place.partition]:
                raise topic_changed(place, self.next_offsets[place.partition] - 1)
            self.next_offsets[place.partition] = position

    async def _assign(self, wanted: set[TopicPartition]) -> None:
        try:
            begins = await self._client.beginning_offsets(list(wanted))
        except (KafkaError, OSError) as error:
            raise kafka_error(self._kafka, error) from error
        self._client.assign(sorted(wanted))
        self._held = {}  # they are read again
        for place, begin in begins.items():
            next_offset = self.next_offsets.get(place.partition, 0)
            if next_offset < begin:
                warn_of_lost(
                    place, next_offset, begin - 1, begin - next_offset, "retention or a deletion has removed them"
                )
            self.next_offsets[place.partition] = max(next_offset, begin)
            self._client.seek(place, max(next_offset, begin))
        self._assigned = wanted

    @property
    def _client(self) -> AIOKafkaConsumer:
        assert self._consumer is not None, "use it within `async with`"
        return self._consumer
