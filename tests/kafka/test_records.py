"""Whatever bytes a record is made of: the daemon, the archive and a rebuild go on, and no other click is lost."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from aiokafka.consumer.fetcher import READ_COMMITTED
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.kafka.compression import MAX_BATCH_BYTES, XERIAL, decompress
from streamrec.kafka.records import CHECKSUM_TRIES, FetchedBytes, Gap, PartitionRecords, Unreadable
from streamrec.kafka.topics import ensure_topics
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import stored
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import produce_clicks, read_topic, wait_caught_up
from support.raw_batches import GZIP, RawBatch, RawRecord, produce_raw
from support.workload import click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
PLACE = TopicPartition("clicks", 0)
NOT_UTF8 = [(b"\xff", b"value"), (b"\xc3\x28", None)]
CONTROL, TRANSACTIONAL = 0x20, 0x10


def raw_snappy(data: bytes) -> bytes:
    return bytes(snappy_encode(data, xerial_compatible=False))


def read(data: bytes, begin: int = 0, aborted: Any = ()) -> list[Any]:
    records = PartitionRecords(PLACE, FetchedBytes(data), list(aborted), begin, None, None, True, READ_COMMITTED)
    found = list(records)
    assert records.next_fetch_offset >= max([begin, *(record.offset + 1 for record in found)])
    return found


def served(found: list[Any]) -> list[tuple[int, bytes | None]]:
    return [(record.offset, record.value) for record in found if not isinstance(record, (Gap, Unreadable))]


@pytest.mark.parametrize("codec", [0, GZIP])
def test_a_header_name_that_is_no_text_is_not_needed_to_read_a_click(codec: int) -> None:
    records = [RawRecord(b"a"), RawRecord(b"b", b"key", NOT_UTF8, delta_ms=7), RawRecord(b"c")]
    found = read(RawBatch(records, codec, base_offset=5, first_ms=1000).encode(), begin=5)
    assert served(found) == [(5, b"a"), (6, b"b"), (7, b"c")]
    assert (found[1].key, found[1].timestamp, found[1].partition) == (b"key", 1007, 0)


def test_a_fetch_that_begins_within_such_a_batch_returns_what_follows() -> None:
    batch = RawBatch([RawRecord(b"a"), RawRecord(b"b", headers=NOT_UTF8), RawRecord(b"c")]).encode()
    assert served(read(batch, begin=1)) == [(1, b"b"), (2, b"c")]
    assert served(read(batch, begin=2)) == [(2, b"c")]


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\0", b"\0\0\2" + b"\x80" * 10, b"\0\0\2\x7f", b"\xff" * 40])
def test_a_damaged_record_is_returned_as_it_is_between_its_neighbours(body: bytes) -> None:
    batch = RawBatch([RawRecord(b"a"), RawRecord(None, body=body), RawRecord(b"c")])
    found = read(batch.encode())
    assert served(found) == [(0, b"a"), (2, b"c")]
    (damaged,) = [record for record in found if isinstance(record, Unreadable)]
    assert (damaged.offset, damaged.value) == (1, body)


def test_a_batch_of_an_unknown_codec_is_returned_as_a_whole() -> None:
    bad = RawBatch([RawRecord(b"b"), RawRecord(b"c")], codec=7, base_offset=1).encode()
    data = RawBatch([RawRecord(b"a")]).encode() + bad + RawBatch([RawRecord(b"d")], base_offset=3).encode()
    found = read(data)
    assert served(found) == [(0, b"a"), (3, b"d")]
    (damaged,) = [record for record in found if isinstance(record, Unreadable)]
    assert (damaged.offset, damaged.value) == (1, bad)
    assert "offsets 1 to 2" in damaged.reason


COMPRESS = {1: gzip_encode, 2: snappy_encode, 3: lz4_encode, 4: zstd_encode, 5: raw_snappy}


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("size", [1, 100, 100_000, 3_000_000])
def test_compressed_records_are_what_they_were(kind: int, size: int) -> None:
    value = random.Random(size).randbytes(size // 2) + bytes(size - size // 2)
    records = [RawRecord(value), RawRecord(b"b", headers=NOT_UTF8)]
    batch = RawBatch(records, 2 if kind == 5 else kind, compress=COMPRESS[kind]).encode()
    assert served(read(batch)) == [(0, value), (1, b"b")]


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_small_batch_that_stands_for_gigabytes_is_a_dead_letter_and_takes_no_memory(kind: int) -> None:
    bomb = RawRecord(bytes(MAX_BATCH_BYTES))
    batch = RawBatch([bomb], 2 if kind == 5 else kind, base_offset=1, compress=COMPRESS[kind]).encode()
    data = RawBatch([RawRecord(b"a")]).encode() + batch + RawBatch([RawRecord(b"c")], base_offset=2).encode()
    found = read(data)
    assert served(found) == [(0, b"a"), (2, b"c")]
    (damaged,) = [record for record in found if isinstance(record, Unreadable)]
    assert (damaged.offset, damaged.value) == (1, batch)
    assert "64 MiB" in damaged.reason


def test_a_claim_of_gigabytes_costs_no_memory() -> None:
    for claim in (b"\xff\xff\xff\xff\x0f" + bytes(100), XERIAL + b"\0\0\0\x09" + b"\xff\xff\xff\xff\x0f" + bytes(4)):
        tracemalloc.start()
        with pytest.raises(ValueError, match="64 MiB"):
            decompress(2, claim)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()


def test_a_wrong_checksum_is_read_again_before_its_batch_is_given_up() -> None:
    good, after = RawBatch([RawRecord(b"a")]).encode(), RawBatch([RawRecord(b"c")], base_offset=2).encode()
    bad = bytearray(RawBatch([RawRecord(b"b")], base_offset=1).encode())
    bad[-1] ^= 1
    data = good + bytes(bad) + after
    for _ in range(CHECKSUM_TRIES - 1):
        assert served(read(data)) == [(0, b"a")]
    assert [(record.offset, type(record) is Unreadable) for record in read(data)] == [(0, False), (1, True), (2, False)]


def test_missing_offsets_are_gaps_but_control_records_and_aborted_transactions_are_none() -> None:
    def marker(offset: int, kind: int, producer: int) -> bytes:
        record = RawRecord(b"\0\0\0\0\0\0", bytes([0, 0, 0, kind]))
        return RawBatch([record], base_offset=offset, attributes=CONTROL | TRANSACTIONAL, producer_id=producer).encode()

    def transaction(offset: int, value: bytes, producer: int) -> bytes:
        return RawBatch([RawRecord(value)], base_offset=offset, attributes=TRANSACTIONAL, producer_id=producer).encode()

    data = (
        transaction(0, b"aborted", 7)
        + marker(1, 0, 7)
        + transaction(2, b"committed", 7)
        + marker(3, 1, 7)
        + RawBatch([RawRecord(b"x"), RawRecord(b"y")], base_offset=10, offsets=[0, 2], next_offset=15).encode()
        # compaction may leave a control batch without its record
        + RawBatch([], base_offset=15, next_offset=16, attributes=CONTROL | TRANSACTIONAL, producer_id=7).encode()
        + RawBatch([RawRecord(b"z")], base_offset=16).encode()
    )
    found = read(data, aborted=[(7, 0)])
    assert served(found) == [(2, b"committed"), (10, b"x"), (12, b"y"), (16, b"z")]
    assert [(gap.first, gap.offset) for gap in found if isinstance(gap, Gap)] == [(4, 9), (11, 11), (13, 14)]


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_of_a_batch_disturb_the_batches_around_it(data: st.DataObject) -> None:
    records = data.draw(
        st.lists(
            st.builds(
                RawRecord,
                st.none() | st.binary(max_size=30),
                st.none() | st.binary(max_size=10),
                st.lists(st.tuples(st.binary(max_size=6), st.none() | st.binary(max_size=6)), max_size=3),
                st.none() | st.none() | st.binary(max_size=30),
                st.integers(-(2**40), 2**62),
            ),
            min_size=1,
            max_size=5,
        )
    )
    codec = data.draw(st.sampled_from([0, 0, GZIP, 2, 3, 4, 5, 7]))
    attributes = data.draw(st.sampled_from([0, 0, 8, 0x40]))
    odd = RawBatch(records, codec, base_offset=1, attributes=attributes).encode()
    end = 1 + len(records)
    before, after = RawBatch([RawRecord(b"before")]).encode(), RawBatch([RawRecord(b"after")], base_offset=end).encode()
    found = read(before + odd + after)
    assert served(found)[0] == (0, b"before") and served(found)[-1] == (end, b"after")
    assert all(type(record.timestamp) is int and -(2**63) <= record.timestamp < 2**63 for record in found)
    if codec in (0, GZIP):  # readable ones are served as they are
        expected = [(1 + place, record.value) for place, record in enumerate(records) if record.body is None]
        assert set(expected) <= set(served(found))
    covered = [range(record.first if isinstance(record, Gap) else record.offset, record.offset + 1) for record in found]
    assert len(list(chain(*covered))) == len(set(chain(*covered)))  # no offset twice


async def test_daemon_archive_and_topic_readers_go_on(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient, tmp_path: Path
) -> None:
    settings = make_settings(kafka_partitions=1, archive_dir=tmp_path / "archive")
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    daemon = start_daemon(kafka_partitions=1)
    await produce_clicks(settings, [("before", "i1")])
    for codec in (0, GZIP):
        records = [
            RawRecord(click("odd", "i1"), b"odd", NOT_UTF8),
            RawRecord(click("odd", "i2"), b"odd", [(b"name", b"\xff")]),
            RawRecord(b"no click", b"\xff", NOT_UTF8),
        ]
        await produce_raw(settings, RawBatch(records, codec))
    await produce_clicks(settings, [("after", "i2")])
    await wait_caught_up(settings)
    sequences = {user: sequence.n async for user, sequence in stored(redis, None) if sequence}
    assert sequences == {"before": 1, "odd": 4, "after": 1}
    letters = await read_topic(settings, settings.kafka.dead_letters)
    headers = [dict(letter.headers) for letter in letters]
    assert [(h["streamrec.offset"], letter.value) for h, letter in zip(headers, letters, strict=True)] == [
        (b"3", b"no click"),
        (b"6", b"no click"),
    ]
    assert "Traceback" not in daemon.output
    archive = EventArchive(tmp_path / "archive")
    await Archiver(settings.kafka, settings.events, archive, flush_s=60).run(asyncio.Event(), burst=True)
    assert (archive.stats().events, archive.stats().dead_letters) == (6, 2)
