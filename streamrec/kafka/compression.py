"""Decompress the records of a batch, up to a limit: 10 kB may stand for gigabytes, and would end every daemon in turn.

aiokafka decompresses without a limit, so it gets batches that are decompressed already.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

import cramjam

ATTRIBUTES, ATTRIBUTES_AT, RECORDS_AT = struct.Struct(">h"), 21, 61  # in a batch
CODEC_MASK = 7
MAX_BATCH_BYTES = 64 * 2**20
XERIAL = struct.pack(">b7sii", -126, b"SNAPPY\0", 1, 1)  # Java's framing of snappy: this, then blocks
BLOCK_BYTES = struct.Struct(">i")  # before each block
GZIP_FORMAT = 31  # and the longest window
FIRST_GUESS = 16  # bytes from one byte


def uncompressed(batch: memoryview) -> memoryview:
    """Return a batch with its records as they were before compression. Raises as ``decompress`` does."""
    (attributes,) = ATTRIBUTES.unpack_from(batch, ATTRIBUTES_AT)
    codec = attributes & CODEC_MASK
    if not codec:
        return batch
    header = bytearray(batch[:RECORDS_AT])
    ATTRIBUTES.pack_into(header, ATTRIBUTES_AT, attributes & ~CODEC_MASK)
    return memoryview(bytes(header) + decompress(codec, bytes(batch[RECORDS_AT:])))


def decompress(codec: int, data: bytes) -> bytes:
    """Return records as they were before compression; ``codec`` is its number in the attributes of a batch.

    Raises:
        Exception: the data are damaged, the codec is unknown, or there are more than MAX_BATCH_BYTES. Each codec has
            errors of its own.
    """
    if codec not in DECODERS:
        raise ValueError(f"codec {codec} is unknown")
    return DECODERS[codec](data)


def _gzip(data: bytes) -> bytes:
    parts, room = [], MAX_BATCH_BYTES + 1
    while data and room:
        member = zlib.decompressobj(wbits=GZIP_FORMAT)
        parts.append(member.decompress(data, room))
        room -= len(parts[-1])
        if room and not member.eof:
            raise EOFError("the data end too early")
        data = member.unused_data
    _check(MAX_BATCH_BYTES + 1 - room)
    return b"".join(parts)


def _snappy(data: bytes) -> bytes:
    blocks = list(_blocks(data)) if data.startswith(XERIAL) else [data]
    _check(sum(cramjam.snappy.decompress_raw_len(block) for block in blocks))
    return b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks)


def _blocks(data: bytes) -> Iterator[bytes]:
    place = len(XERIAL)
    while place < len(data):
        (length,) = BLOCK_BYTES.unpack_from(data, place)
        place += BLOCK_BYTES.size
        if not 0 < length <= len(data) - place:
            raise ValueError(f"a block of {length} bytes is not whole")
        yield data[place : place + length]
        place += length


def _into(decompress_into: Callable[[bytes, bytearray], int]) -> Callable[[bytes], bytes]:
    """Return the decoder of a codec that does not say beforehand how many bytes there are."""

    def decoder(data: bytes) -> bytes:
        size = min(FIRST_GUESS * len(data) + 1024, MAX_BATCH_BYTES)
        while True:
            buffer = bytearray(size)
            try:
                return bytes(memoryview(buffer)[: decompress_into(data, buffer)])
            except cramjam.DecompressionError as error:
                if size == MAX_BATCH_BYTES:
                    raise ValueError(f"{error} of {MAX_BATCH_BYTES // 2**20} MiB, the most of a batch") from error
                size = min(8 * size, MAX_BATCH_BYTES)

    return decoder


def _check(size: int) -> None:
    if size > MAX_BATCH_BYTES:
        raise ValueError(f"there are more than {MAX_BATCH_BYTES // 2**20} MiB, the most of a batch")


DECODERS = {1: _gzip, 2: _snappy, 3: _into(cramjam.lz4.decompress_into), 4: _into(cramjam.zstd.decompress_into)}
