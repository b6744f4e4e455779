"""The click topic, read whole by one process: every partition, without a group's rebalances.

Where each partition goes on is told by whoever reads. Records are decoded as the daemon does; dead letters are counted
here, and produced by the daemon alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from streamrec.errors import BadRecord, KafkaUnavailable
from streamrec.kafka.connection import connection_options, kafka_error, start_client
from streamrec.kafka.decode import EventDecoder
from streamrec.kafka.topics import topic_partitions
from streamrec.schemas import ClickEvent
from streamrec.setting_groups import EventSettings, KafkaSettings

log = logging.getLogger(__name__)

POLL_RECORDS = 10_000
NEW_PARTITIONS_EVERY_S = 30.0


@dataclass
class OffsetRange:
    """What the offsets from ``first`` to ``next`` - 1 of a partition hold."""

    first: int
    next: int
    events: list[ClickEvent] = field(default_factory=list)
    dead_letters: int = 0


class TopicReader:
    """Reads the topic on from given offsets.

    Args:
        start: the offset where each partition goes on; one that is not named is read from its beginning.
        group: under which ``commit`` commits; without one nothing is ever committed.
    """

    def __init__(
        self, kafka: KafkaSettings, events: EventSettings, start: Mapping[int, int], group: str | None = None
    ) -> None:
        self._kafka = kafka
        self._decoder = EventDecoder(events)
        self._group = group
        self._consumer: AIOKafkaConsumer | None = None
        self._assigned: set[TopicPartition] = set()
        self._looked_s = -NEW_PARTITIONS_EVERY_S
        self._ends: dict[TopicPartition, int] | None = None
        self.next_offsets = dict(start)

    async def __aenter__(self) -> Self:
        """Raises KafkaUnavailable where no broker answers."""
        consumer = self._consumer = AIOKafkaConsumer(
            **connection_options(self._kafka),
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # of what retention has removed there is nothing to wait for
            fetch_max_wait_ms=self._kafka.poll_timeout_ms,
        )
        await start_client(self._kafka, consumer)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.stop()

    async def find_partitions(self) -> None:
        """Read every partition there is; to be called often, it looks for new ones now and then.

        Raises:
            KafkaUnavailable: the brokers do not answer, or know no such topic.
        """
        if time.monotonic() - self._looked_s < NEW_PARTITIONS_EVERY_S:
            return
        topic = self._kafka.topic
        count = (await topic_partitions(self._kafka, (topic,)))[topic]
        if not count:  # without a partition the client would wait for ever
            raise KafkaUnavailable(
                f"Kafka has no topic {topic}; is STREAMREC_KAFKA_TOPIC right? streamrec serve creates it"
            )
        wanted = {TopicPartition(topic, number) for number in range(count)}
        if wanted != self._assigned:
            await self._assign(wanted)
            log.info("reading", extra={"topic": topic, "partitions": count})
        self._looked_s = time.monotonic()

    async def poll(self, timeout_ms: int | None = None) -> dict[int, OffsetRange]:
        """What has come, by partition.

        Args:
            timeout_ms: how long to wait for something [``kafka_poll_timeout_ms``].

        Raises:
            KafkaUnavailable: the brokers refuse us, or hand out what cannot be read; waiting would not help.
        """
        wait_ms = self._kafka.poll_timeout_ms if timeout_ms is None else timeout_ms
        try:
            polled = await self._client.getmany(timeout_ms=wait_ms, max_records=POLL_RECORDS)
        except KafkaError as error:
            raise kafka_error(self._kafka, error) from error
        found = {}
        for partition, records in polled.items():
            found_range = OffsetRange(records[0].offset, records[-1].offset + 1)
            for record in records:
                try:
                    event = self._decoder.decode(record.value, record.partition, record.offset, record.timestamp)
                except BadRecord:
                    found_range.dead_letters += 1
                    continue
                if event is not None:
                    found_range.events.append(event)
            found[partition.partition] = found_range
            self.next_offsets[partition.partition] = found_range.next
        return found

    async def drained(self) -> bool:
        """Whether all is read that was there at the first call; what comes meanwhile could go on for ever."""
        try:
            if self._ends is None:
                self._ends = await self._client.end_offsets(list(self._assigned))
            return all([await self._client.position(partition) >= end for partition, end in self._ends.items()])
        except KafkaError:
            return False

    async def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Commit, so that the lag can be seen from outside; what fails is left to the next time."""
        with contextlib.suppress(KafkaError):
            await self._client.commit({self._partition(number): offset for number, offset in next_offsets.items()})

    async def _assign(self, wanted: set[TopicPartition]) -> None:
        try:
            begins = await self._client.beginning_offsets(list(wanted))
        except (KafkaError, OSError) as error:
            raise kafka_error(self._kafka, error) from error
        self._client.assign(sorted(wanted))
        for partition, begin in begins.items():
            at = self.next_offsets.get(partition.partition, 0)
            if at < begin:
                log.warning(
                    "offsets that were never archived are no longer in the topic, and so their clicks are gone",
                    extra={"partition": partition.partition, "first": at, "last": begin - 1},
                )
            self.next_offsets[partition.partition] = max(at, begin)
            self._client.seek(partition, max(at, begin))
        self._assigned = wanted

    @property
    def _client(self) -> AIOKafkaConsumer:
        assert self._consumer is not None, "to be used within `async with`"
        return self._consumer

    def _partition(self, number: int) -> TopicPartition:
        return TopicPartition(self._kafka.topic, number)
