"""Read the records of a topic from the files of its broker; decoded here alone, not by aiokafka.

Control batches say which transactions were aborted: their records are left out, as a reader of committed ones does.
Source: "Message Format", https://kafka.apache.org/documentation/#messageformat
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# base offset, length | leader's epoch, magic, checksum, attributes, last offset, first and newest time, producer,
# its epoch, base sequence, number of records
FRAME, HEAD = struct.Struct(">qi"), struct.Struct(">ibIhiqqqhii")
CODEC, TRANSACTIONAL, CONTROL = 7, 0x10, 0x20
COMMIT = 1


@dataclass(frozen=True)
class StoredRecord:
    """A record as the broker stores it; bytes of a header's name that are not UTF-8 are replaced."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True)
class _Batch:
    attributes: int
    producer: int
    records: list[StoredRecord]


class _Bytes:
    def __init__(self, data: bytes, at: int) -> None:
        self._data, self.at = data, at

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._data[self.at]
            self.at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return (number >> 1) ^ -(number & 1)
            shift += 7

    def take(self, length: int) -> bytes:
        self.at += length
        return self._data[self.at - length : self.at]

    def sized(self) -> bytes | None:
        length = self.varint()
        return None if length < 0 else self.take(length)


def read_topic_files(logs: Path, topic: str) -> list[StoredRecord]:
    """Return every committed record of a topic, in partition and offset order.

    Args:
        logs: ``log.dirs`` of the broker.
    """
    found: list[StoredRecord] = []
    for folder in sorted(logs.glob(f"{topic}-*")):
        number = folder.name.removeprefix(f"{topic}-")
        if number.isdigit():
            found += _committed(_batches(folder, int(number)))
    return sorted(found, key=lambda record: (record.partition, record.offset))


def _committed(batches: Iterator[_Batch]) -> Iterator[StoredRecord]:
    open_ones: dict[int, list[StoredRecord]] = {}
    for batch in batches:
        if batch.attributes & CONTROL:
            records = open_ones.pop(batch.producer, [])
            key = batch.records[0].key if batch.records else None
            if key is not None and struct.unpack(">hh", key)[1] == COMMIT:
                yield from records
        elif batch.attributes & TRANSACTIONAL:
            open_ones.setdefault(batch.producer, []).extend(batch.records)
        else:
            yield from batch.records


def _batches(folder: Path, partition: int) -> Iterator[_Batch]:
    for segment in sorted(folder.glob("*.log")):
        data, at = segment.read_bytes(), 0
        while at + FRAME.size < len(data):
            base, length = FRAME.unpack_from(data, at)
            end = at + FRAME.size + length
            if length <= 0 or end > len(data):
                break  # the broker is writing it, or has reserved the space
            yield _batch(data, at + FRAME.size, base, partition)
            at = end


def _batch(data: bytes, at: int, base: int, partition: int) -> _Batch:
    _, _, _, attributes, _, first_ms, _, producer, _, _, count = HEAD.unpack_from(data, at)
    assert not attributes & CODEC, "a compressed batch"
    bytes_, records = _Bytes(data, at + HEAD.size), []
    for _ in range(count):
        end = bytes_.varint() + bytes_.at
        bytes_.take(1)
        timestamp, offset = first_ms + bytes_.varint(), base + bytes_.varint()
        key, value = bytes_.sized(), bytes_.sized()
        headers = []
        for _ in range(bytes_.varint()):
            name = bytes_.take(bytes_.varint()).decode(errors="replace")
            headers.append((name, bytes_.sized()))
        assert bytes_.at == end, "a record that is longer than its content"
        records.append(StoredRecord(partition, offset, timestamp, key, value, tuple(headers)))
    return _Batch(attributes, producer, records)
