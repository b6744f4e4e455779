"""Identify a topic by one record of each partition.

aiokafka knows no topic ids. But a topic that was created again, or a log that was cut back, does not have the same
record at the same offset: its time and its bytes differ.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping, Sequence

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from streamrec.errors import SettingsError, TopicChanged
from streamrec.kafka.connection import BROKER_TIMEOUT_S, connection_options, kafka_error, start_client
from streamrec.kafka.records import READING, Gap
from streamrec.schemas import RecordMark
from streamrec.setting_groups import KafkaSettings


def mark_of(record: ConsumerRecord) -> RecordMark:
    """Return the mark of a record."""
    checksum = zlib.crc32(record.value or b"", zlib.crc32(record.key or b""))
    return RecordMark(record.offset, record.timestamp, checksum)


def mark_of_last(records: Sequence[ConsumerRecord]) -> RecordMark | None:
    """Return the mark of the last of several records; None if there is none."""
    last = next((record for record in reversed(records) if not isinstance(record, Gap)), None)
    return None if last is None else mark_of(last)


async def check_topic(kafka: KafkaSettings, marks: Mapping[int, RecordMark]) -> None:
    """Check that the topic still has the marked records, by partition; those that retention has removed prove nothing.

    Raises:
        TopicChanged: it does not.
        KafkaUnavailable: Kafka does not answer. KafkaForbidden: a right is missing.
    """
    if not marks:
        return
    consumer = AIOKafkaConsumer(**connection_options(kafka), **READING)
    await start_client(kafka, consumer)
    try:
        async with asyncio.timeout(BROKER_TIMEOUT_S):
            await _check(kafka, consumer, {TopicPartition(kafka.topic, number): mark for number, mark in marks.items()})
    except (KafkaError, OSError) as error:
        raise kafka_error(kafka, error) from error
    finally:
        await consumer.stop()


async def _check(kafka: KafkaSettings, consumer: AIOKafkaConsumer, marks: dict[TopicPartition, RecordMark]) -> None:
    begins, ends = await consumer.beginning_offsets(list(marks)), await consumer.end_offsets(list(marks))
    for place, mark in marks.items():
        if mark.offset >= ends[place]:
            raise topic_changed(place, mark.offset)
    pending = {place: mark for place, mark in marks.items() if mark.offset >= begins[place]}
    consumer.assign(list(pending))
    for place, mark in pending.items():
        consumer.seek(place, mark.offset)
    while pending:
        for place, records in (await consumer.getmany(timeout_ms=kafka.poll_timeout_ms)).items():
            if place not in pending:
                continue
            mark, found = pending.pop(place), mark_of(records[0])
            # another offset: compaction has removed the record
            if found != mark and found.offset == mark.offset and not isinstance(records[0], Gap):
                raise topic_changed(place, mark.offset)


def topic_changed(place: TopicPartition, offset: int) -> TopicChanged:
    """Return the error for a topic that does not have the record that was read at an offset."""
    return TopicChanged(
        f"topic {place.topic} is not the one that was read before: at offset {offset} of partition {place.partition} "
        "it has another record, or none. If it was created again or cut back, raise STREAMREC_KAFKA_TOPIC_EPOCH by one "
        "for daemons and retraining (deploy/UPGRADES.md); else correct STREAMREC_KAFKA_TOPIC, or the brokers"
    )


def later_epoch(kafka: KafkaSettings, data: str, epoch: int) -> SettingsError:
    """Return the error for data of a daemon with a later topic epoch."""
    return SettingsError(
        f"{data} have topic epoch {epoch}, but STREAMREC_KAFKA_TOPIC_EPOCH is {kafka.topic_epoch}: set it to {epoch}, "
        "as the other daemons do"
    )
