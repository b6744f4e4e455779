"""Read a compacted topic whole, then follow it: all partitions, without a consumer group or commits.

Compaction leaves gaps in the offsets, which are no loss here: a later record of each key is there.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import NamedTuple, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from streamrec.errors import KafkaUnavailable
from streamrec.kafka.connection import BROKER_TIMEOUT_S, connection_options, kafka_error, start_client
from streamrec.kafka.marks import check_topic, mark_of_last, topic_changed
from streamrec.kafka.records import READING, Gap, Unreadable
from streamrec.kafka.topics import topic_partitions
from streamrec.schemas import DeadLetter, RecordMark
from streamrec.setting_groups import KafkaSettings

CHECK_EVERY_S = 10.0  # for new partitions, moved brokers, and a topic that was created again


class Record(NamedTuple):
    """A record as it is; ``unreadable`` is why it cannot be read."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    unreadable: str = ""

    def letter(self, reason: str) -> DeadLetter:
        """Return the dead letter of the record."""
        return DeadLetter(self.topic, self.partition, self.offset, self.timestamp_ms, self.key, self.value, reason)


class TableReader:
    """Reads the records of a topic from its beginning.

    Args:
        kafka: the settings, with the topic to read.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._consumer: AIOKafkaConsumer | None = None
        self._marks: dict[int, RecordMark] = {}
        self._partitions: list[TopicPartition] = []
        self._first: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._checked_s = -CHECK_EVERY_S

    async def __aenter__(self) -> Self:
        """Connect. Raises KafkaUnavailable if no broker answers."""
        consumer = AIOKafkaConsumer(
            **connection_options(self._kafka), **READING, fetch_max_wait_ms=self._kafka.poll_timeout_ms
        )
        await start_client(self._kafka, consumer)
        self._consumer = consumer
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.stop()

    async def poll(self, max_records: int) -> list[Record]:
        """Return the next records of all partitions; each partition's are in order.

        Raises:
            KafkaUnavailable: Kafka does not answer. KafkaForbidden: the right to read is missing.
            TopicChanged: the topic was created again, or cut back: it must be read from its beginning.
        """
        if time.monotonic() - self._checked_s >= CHECK_EVERY_S:
            await self._check()
        try:
            polled = await self._client.getmany(timeout_ms=self._kafka.poll_timeout_ms, max_records=max_records)
        except OffsetOutOfRangeError as error:
            for place, offset in error.args[0].items():
                raise topic_changed(place, offset) from error
            return []
        except (KafkaError, OSError) as error:
            raise kafka_error(self._kafka, error) from error
        found: list[Record] = []
        for place, records in polled.items():
            mark = mark_of_last(records)
            if mark is not None:
                self._marks[place.partition] = mark
            found += [
                Record(
                    r.topic,
                    r.partition,
                    r.offset,
                    r.timestamp,
                    r.key,
                    r.value,
                    r.reason if isinstance(r, Unreadable) else "",
                )
                for r in records
                if not isinstance(r, Gap)
            ]
        return found

    async def progress(self) -> tuple[int, int]:
        """Return how many offsets were read of those that the topic had at the start, and their number."""
        read = 0
        for place, end in self._ends.items():
            try:
                async with asyncio.timeout(BROKER_TIMEOUT_S):
                    position = await self._client.position(place)
            except (KafkaError, TimeoutError) as error:
                raise kafka_error(self._kafka, error) from error
            read += min(position, end) - self._first[place]
        return read, sum(self._ends.values()) - sum(self._first[place] for place in self._ends)

    async def _check(self) -> None:
        """Assign all partitions, new ones too, and look whether the topic is still the one that was read."""
        topic = self._kafka.topic
        count = (await topic_partitions(self._kafka, (topic,), self._client))[topic]
        if not count:
            raise KafkaUnavailable(f"Kafka has no topic {topic}; is STREAMREC_ITEMS_TOPIC right?")
        if count < len(self._partitions):
            raise topic_changed(self._partitions[-1], 0)
        await check_topic(self._kafka, self._marks)
        places = [TopicPartition(topic, number) for number in range(count)]
        if places != self._partitions:
            new = places[len(self._partitions) :]
            try:
                async with asyncio.timeout(BROKER_TIMEOUT_S):
                    first = await self._client.beginning_offsets(new)
                    ends = await self._client.end_offsets(new) if not self._ends else {}
            except (KafkaError, OSError) as error:
                raise kafka_error(self._kafka, error) from error
            self._client.assign(places)
            self._first |= first
            self._ends = self._ends or ends
            for place in places:
                self._client.seek(place, self._next(place))
            self._partitions = places
        self._checked_s = time.monotonic()

    def _next(self, place: TopicPartition) -> int:
        """Return where to read a partition after a new assignment: after the last record, else from its beginning."""
        mark = self._marks.get(place.partition)
        return self._first[place] if mark is None else mark.offset + 1

    @property
    def _client(self) -> AIOKafkaConsumer:
        assert self._consumer is not None, "use it within `async with`"
        return self._consumer
