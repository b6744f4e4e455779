"""Record batches byte by byte, for what no producer library writes; encoded here alone, not by aiokafka.

Source: "Record Batch", https://kafka.apache.org/documentation/#recordbatch
"""

from __future__ import annotations

import gzip
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import for_code
from aiokafka.protocol.produce import ProduceRequest

from streamrec.settings import Settings

GZIP = 1


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def varint(number: int) -> bytes:
    """A zigzag number."""
    number = (number << 1) ^ (number >> 63)
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def sized(data: bytes | None) -> bytes:
    return varint(-1) if data is None else varint(len(data)) + data


@dataclass
class RawRecord:
    """A record of which every byte can be chosen; ``body`` replaces all that follows its length."""

    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[bytes, bytes | None]] = ()
    body: bytes | None = None
    delta_ms: int = 0

    def encode(self, offset_delta: int) -> bytes:
        headers = b"".join(varint(len(name)) + name + sized(value) for name, value in self.headers)
        body = b"\0" + varint(self.delta_ms) + varint(offset_delta) + sized(self.key) + sized(self.value)
        body = self.body if self.body is not None else body + varint(len(self.headers)) + headers
        return varint(len(body)) + body


@dataclass
class RawBatch:
    """A batch; ``offsets`` are those of its records, counted from its first [0, 1, 2, ...]."""

    records: Sequence[RawRecord]
    codec: int = 0
    base_offset: int = 0
    offsets: Sequence[int] = ()
    attributes: int = 0
    first_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    producer_id: int = -1
    next_offset: int | None = None
    compress: Callable[[bytes], bytes] | None = None  # for codecs other than GZIP [as it is]

    def encode(self) -> bytes:
        offsets = self.offsets or range(len(self.records))
        data = b"".join(record.encode(offset) for offset, record in zip(offsets, self.records, strict=True))
        last = max(offsets, default=0) if self.next_offset is None else self.next_offset - 1 - self.base_offset
        newest_ms = max([self.first_ms, *(self.first_ms + record.delta_ms for record in self.records)])
        # attributes, last offset, first and newest time, producer id and epoch, base sequence, number of records
        after = struct.pack(
            ">hiqqqhii",
            self.attributes | self.codec,
            last,
            self.first_ms,
            newest_ms,
            self.producer_id,
            0 if self.producer_id >= 0 else -1,
            0 if self.producer_id >= 0 else -1,
            len(self.records),
        ) + (self.compress or (gzip.compress if self.codec == GZIP else bytes))(data)
        head = struct.pack(">ibI", -1, 2, crc32c(after))
        return struct.pack(">qi", self.base_offset, len(head) + len(after)) + head + after


async def produce_raw(settings: Settings, batch: RawBatch, partition: int = 0) -> None:
    """Write a batch as it stands to a partition of the click topic; the broker sets its offset."""
    client = AIOKafkaClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await client.bootstrap()
    try:
        await client.add_topic(settings.kafka.topic)
        leader = client.cluster.partitions_for_topic(settings.kafka.topic) and client.get_random_node()
        request = ProduceRequest(None, -1, 10_000, [(settings.kafka.topic, [(partition, batch.encode())])])
        response = await client.send(leader, request)
        ((_, ((_, code, *_),)),) = response.topics
        if code:
            raise for_code(code)
    finally:
        await client.close()
