"""Read the records of a fetch. No bytes of a record stop this.

aiokafka decodes header names, which a click does not need. An error there ends `getmany`, and loses the records around
it. Here a batch that aiokafka cannot decode is decoded again without its headers. What remains unreadable is returned
as ``Unreadable``, to become a dead letter; offsets that are missing are returned as ``Gap``.

aiokafka has no setting for this: consumers with ``key_deserializer=any_bytes`` read in this way.

Source: "Record Batch" in the documentation of the protocol, https://kafka.apache.org/documentation/#recordbatch
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.legacy_records import LegacyRecordBatch
from aiokafka.record.memory_records import MemoryRecords

from streamrec.kafka.compression import uncompressed

FRAME = struct.Struct(">qi")  # of a batch of any format: offset, and the bytes that follow
SHORTEST_BATCH_BYTES = 14  # after the frame, in the oldest format
MAGIC_AT = 16
HEADER = struct.Struct(">qiibIhiqqqhii")
LOG_APPEND_TIME = 8  # attribute of a batch
ABORT = 0  # type of a control record
LONGEST_MS = 2**63 - 1
CHECKSUM_TRIES = 3  # a fault between broker and here is gone the next time


@dataclass
class Unreadable(ConsumerRecord):  # type: ignore[misc]
    """A record or the rest of a batch that cannot be read; its value are the bytes as they are."""

    reason: str = ""


@dataclass
class Gap(ConsumerRecord):  # type: ignore[misc]
    """The offsets from ``first`` to its own ``offset`` are not in the topic: compaction has removed them."""

    first: int = 0


class FetchedBytes:
    """What a broker has sent of a partition; the last batch may be cut off."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def size_in_bytes(self) -> int:
        """Return the number of bytes."""
        return len(self.data)

    def has_next(self) -> bool:
        """Return whether there is a whole batch."""
        return next(self.batches(), None) is not None

    def batches(self) -> Iterator[memoryview]:
        """Yield the bytes of each whole batch."""
        begin, view = 0, memoryview(self.data)
        while len(self.data) - begin >= FRAME.size:
            _, length = FRAME.unpack_from(self.data, begin)
            end = begin + FRAME.size + length
            if length < SHORTEST_BATCH_BYTES or end > len(self.data):
                return
            yield view[begin:end]
            begin = end


class PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of a fetch of one partition. To iterate never raises: the caller would lose the records before."""

    next_fetch_offset: int
    checksum_tries: dict[tuple[TopicPartition, int], int] = {}  # noqa: RUF012 - over all fetches

    def _unpack_records(self) -> Iterator[ConsumerRecord]:
        for data, following in pairwise(chain(self._records.batches(), (memoryview(b""),))):
            base_offset, _ = FRAME.unpack_from(data)
            is_old = data[MAGIC_AT] < 2
            batch = _open(data, is_old)
            if batch is None or (self._check_crcs and not batch.validate_crc()):
                place = (self._tp, self.next_fetch_offset)
                tries = self.checksum_tries.pop(place, 0) + 1
                if tries < CHECKSUM_TRIES:
                    self.checksum_tries[place] = tries
                    return  # it is fetched again
                claimed = batch.next_offset if batch else 0
                end = _likely_end(self.next_fetch_offset, claimed, data, following)
                yield self._unreadable(end, data, "the checksum of its batch is wrong")
                continue
            if not is_old:  # the offset of an old one may be that of its last record
                yield from self._gap_before(base_offset)
            if self._is_served(batch, base_offset):
                yield from self._served(batch, data, is_old)
                yield from self._gap_before(batch.next_offset)
            self.next_fetch_offset = max(self.next_fetch_offset, batch.next_offset)

    def _is_served(self, batch: Any, base_offset: int) -> bool:
        """Return whether a batch has records that were not written in an aborted transaction."""
        if self._isolation_level == fetcher.READ_COMMITTED and batch.producer_id is not None:
            self._consume_aborted_up_to(base_offset)
            if batch.is_control_batch and _is_abort_marker(batch):
                self._aborted_producers.discard(batch.producer_id)
            if batch.is_transactional and batch.producer_id in self._aborted_producers:
                return False
        return not batch.is_control_batch

    def _served(self, batch: Any, data: memoryview, is_old: bool) -> Iterator[ConsumerRecord]:
        tp = self._tp
        if not is_old:
            try:
                data = uncompressed(data)
            except Exception as error:  # each codec raises errors of its own
                yield self._unreadable(batch.next_offset, data, f"its batch cannot be decompressed: {error!r}")
                return
            batch = DefaultRecordBatch(data)
        try:
            for record in batch:
                offset = record.offset
                if offset < self.next_fetch_offset:  # a fetch may begin in the middle of a batch
                    continue
                if offset > self.next_fetch_offset:
                    yield from self._gap_before(offset)
                self.next_fetch_offset = offset + 1
                yield self._consumer_record(tp, record)
        except Exception as error:  # the decoder raises errors of many kinds, and the next batches must be read
            if is_old:
                yield self._unreadable(batch.next_offset, data, str(error))
            else:
                yield from self._without_headers(data)

    def _without_headers(self, data: memoryview) -> Iterator[ConsumerRecord]:
        """Yield the records of an uncompressed batch from the next offset on; decode all but their headers."""
        header, body = BatchHeader.of(data), bytearray(data[HEADER.size :])
        place, end = 0, 0
        for _ in range(header.records):
            try:
                length, place = _varint(body, place)
                end = place + length
                if not place <= end <= len(body):
                    raise ValueError
            except (ValueError, IndexError):
                yield self._unreadable(header.next_offset, bytes(body[place:]), "the rest of its batch is damaged")
                return
            record = body[place:end]
            place = end
            try:
                offset, timestamp_ms, key, value = header.record(record)
            except (ValueError, IndexError):
                if self.next_fetch_offset < header.next_offset:
                    yield self._unreadable(self.next_fetch_offset + 1, bytes(record), "it is damaged")
                continue
            if self.next_fetch_offset <= offset < header.next_offset:
                yield from self._gap_before(offset)
                self.next_fetch_offset = offset + 1
                yield self._record(ConsumerRecord, offset, timestamp_ms, key, value)

    def _gap_before(self, offset: int) -> Iterator[ConsumerRecord]:
        """Yield the gap between the next offset and a later one, if there is any."""
        first = self.next_fetch_offset
        if offset > first:
            self.next_fetch_offset = offset
            yield self._record(Gap, offset - 1, first=first)

    def _unreadable(self, next_offset: int, data: bytes | memoryview, reason: str) -> ConsumerRecord:
        first = self.next_fetch_offset
        self.next_fetch_offset = max(next_offset, first + 1)
        offsets = f"offset {first}" if next_offset <= first + 1 else f"offsets {first} to {next_offset - 1}"
        return self._record(Unreadable, first, value=bytes(data), reason=f"{offsets} cannot be read: {reason}")

    def _record(
        self,
        kind: type[ConsumerRecord],
        offset: int,
        timestamp_ms: int = -1,
        key: bytes | None = None,
        value: bytes | None = None,
        **more: Any,
    ) -> ConsumerRecord:
        sizes = [len(part) if part is not None else -1 for part in (key, value)]
        return kind(self._tp.topic, self._tp.partition, offset, timestamp_ms, 0, key, value, None, *sizes, (), **more)


class BatchHeader(NamedTuple):
    """The header of a batch of the present format."""

    base_offset: int
    attributes: int
    next_offset: int
    first_ms: int
    newest_ms: int
    records: int

    @classmethod
    def of(cls, data: memoryview) -> BatchHeader:
        """Read the header of a batch."""
        base, _, _, _, _, attributes, last_delta, first_ms, newest_ms, _, _, _, records = HEADER.unpack_from(data)
        return cls(base, attributes, base + last_delta + 1, first_ms, newest_ms, records)

    def record(self, data: bytearray) -> tuple[int, int, bytes | None, bytes | None]:
        """Return offset, timestamp, key and value of a record.

        Raises:
            ValueError, IndexError: its bytes are no record.
        """
        delta_ms, place = _varint(data, 1)  # after the attributes
        offset_delta, place = _varint(data, place)
        key, place = _bytes(data, place)
        value, _ = _bytes(data, place)
        timestamp_ms = self.newest_ms if self.attributes & LOG_APPEND_TIME else self.first_ms + delta_ms
        return self.base_offset + offset_delta, min(timestamp_ms, LONGEST_MS), key, value


def _open(data: memoryview, is_old: bool) -> Any:
    """Return the batch, None if it is too short for its header."""
    if is_old:
        return LegacyRecordBatch(data, data[MAGIC_AT])
    return DefaultRecordBatch(data) if len(data) >= HEADER.size else None


def _varint(data: bytearray, place: int) -> tuple[int, int]:
    """Return the zigzag number of up to 64 bits at a place, and the place after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), place
    raise ValueError


def _bytes(data: bytearray, place: int) -> tuple[bytes | None, int]:
    """Return the bytes at a place, None for null, and the place after them."""
    length, place = _varint(data, place)
    if length < 0:
        return None, place
    if place + length > len(data):
        raise ValueError
    return bytes(data[place : place + length]), place + length


def _is_abort_marker(batch: Any) -> bool:
    # compaction may leave a control batch without its record
    record = next(iter(batch), None)
    key = (record and record.key) or b""
    return len(key) >= 4 and int.from_bytes(key[2:4], "big") == ABORT


def _likely_end(first: int, claimed: int, data: memoryview, following: memoryview) -> int:
    """Return the offset after a damaged batch: its own header may be damaged."""
    if following:
        claimed, _ = FRAME.unpack_from(following)
    return claimed if first < claimed <= first + len(data) else first + 1


def any_bytes(key: bytes | None) -> bytes | None:
    """Return the key. As ``key_deserializer`` of a consumer it chooses this way of reading records."""
    return key


# options of every consumer; positions.py settles what has no commit
READING = {
    "enable_auto_commit": False,
    "auto_offset_reset": "none",
    "isolation_level": "read_committed",
    "key_deserializer": any_bytes,
}


def _records_for(
    tp: TopicPartition, fetched: FetchedBytes, aborted: Any, offset: int, key_deserializer: Any, *more: Any
) -> fetcher.PartitionRecords:
    if key_deserializer is any_bytes:
        return PartitionRecords(tp, fetched, aborted, offset, None, *more)
    return _Original(tp, MemoryRecords(fetched.data), aborted, offset, key_deserializer, *more)


_Original = fetcher.PartitionRecords
fetcher.MemoryRecords = FetchedBytes
fetcher.PartitionRecords = _records_for
