"""The event archive has each event of the topic once, even if its writer is killed at any moment."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sasrec import Event
from streamrec.archive.segment_files import concatenate
from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveError
from streamrec.schemas import CLICK, EXCLUDE, ClickEvent, RecordMark, Role
from streamrec.storage import Place

from support.archives import click
from support.killed_at_step import killed_at_each_step
from support.places import below

BASE_MS = 1_700_000_000_000


def rows(archive: EventArchive) -> list[tuple[str, str, int]]:
    found = archive.read()
    return list(zip(found.user_ids, found.item_ids, found.timestamps_ms.tolist(), strict=True))


def expected(*events: ClickEvent) -> list[tuple[str, str, int]]:
    return [(event.user_id, event.item_id, event.timestamp_ms) for event in events]


def test_an_empty_archive_is_empty(place: Place) -> None:
    archive = EventArchive(place)
    assert (rows(archive), archive.next_offsets(), archive.segments()) == ([], {}, [])
    stats = archive.stats()
    assert (stats.events, stats.first_ts_ms, stats.last_ts_ms, stats.bytes) == (0, None, None, 0)
    assert archive.prune(BASE_MS) == 0


# by partition, for each offset: its clicks (0: a dead letter), and whether a segment ends after it
STREAMS = st.dictionaries(
    st.integers(0, 3), st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30), min_size=1
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STREAMS, st.integers(0, 5), st.integers(2, 9))
def test_appended_events_are_read_in_the_order_of_partitions_and_offsets_merged_or_not(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    streams: dict[int, list[tuple[int, bool]]],
    base: int,
    merge_at: int,
) -> None:
    monkeypatch.setattr("streamrec.archive.segments.MIN_SEGMENTS_TO_MERGE", merge_at)
    archive = EventArchive(tmp_path_factory.mktemp("archive"))
    wanted = []
    for partition, offsets in sorted(streams.items()):
        first, pending = base, []
        for offset, (count, ends_segment) in enumerate(offsets, start=base):
            pending += [click(partition, offset)] * count
            wanted += [click(partition, offset)] * count
            if ends_segment or offset == base + len(offsets) - 1:
                letters = [number for number, _ in offsets[first - base : offset + 1 - base]].count(0)
                archive.append(partition, first, offset + 1, pending, letters)
                first, pending = offset + 1, []
                archive.merge(partition)
        assert len([segment for segment in archive.segments() if segment.partition == partition]) < merge_at
    assert rows(EventArchive(archive.place)) == expected(*wanted)
    assert archive.next_offsets() == {partition: base + len(offsets) for partition, offsets in streams.items()}
    stats = archive.stats()
    assert stats.events == len(wanted)
    assert stats.dead_letters == sum(number == 0 for offsets in streams.values() for number, _ in offsets)


def test_outcomes_are_archived_and_none_if_all_are_one(place: Place) -> None:
    archive = EventArchive(place)
    archive.import_events([Event("ann", "a", BASE_MS)])
    archive.append(0, 0, 2, [click(0, 0), click(0, 1)])
    assert archive.read().outcomes is None
    some = [replace(click(0, 2), role=Role(outcome=0.25)), replace(click(0, 3), role=EXCLUDE), click(0, 4)]
    archive.append(0, 2, 5, some)
    found = archive.read()
    assert found.outcomes is not None
    assert found.outcomes.tolist() == [1, 1, 1, 0.25, 1]
    assert len(found) == 5


def test_roles_are_archived_and_merged_and_only_clicks_are_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamrec.archive.segments.MIN_SEGMENTS_TO_MERGE", 4)
    archive, both = EventArchive(place), Role(click=True, exclude=True)
    for offset, role in enumerate((CLICK, EXCLUDE, both, CLICK)):
        archive.append(0, offset, offset + 1, [replace(click(0, offset), role=role)], mark=RecordMark(offset, 1, 2))
    wanted = [(True, False), (False, True), (True, True), (True, False)]
    for _ in range(2):
        table = concatenate([table for _, table in archive.tables()])
        assert list(zip(table["click"].to_pylist(), table["exclude"].to_pylist(), strict=True)) == wanted
        assert rows(archive) == expected(*(click(0, offset) for offset in (0, 2, 3)))
        assert archive.marks() == {0: RecordMark(3, 1, 2)}
        archive.merge(0)
    assert archive.stats().segments == 1


@pytest.mark.parametrize(
    ("first", "next_offset", "offset"),
    [(5, 9, 5), (0, 10, 0), (9, 20, 9), (10, 10, 10), (12, 11, 11), (10, 20, 20), (10, 20, 9)],
)
def test_archived_offsets_and_offsets_outside_the_range_are_refused(
    place: Place, first: int, next_offset: int, offset: int
) -> None:
    archive = EventArchive(place)
    archive.append(0, 0, 10, [click(0, n) for n in range(10)])
    with pytest.raises(ArchiveError, match="do not follow 9"):
        archive.append(0, first, next_offset, [click(0, offset)])
    assert rows(archive) == expected(*(click(0, n) for n in range(10)))
    archive.append(0, 15, 16, [click(0, 15)])  # a gap is no error: retention removed these records


def many_small(place: Place, count: int = 5) -> EventArchive:
    archive = EventArchive(place)
    for n in range(count):
        archive.append(0, n, n + 1, [click(0, n)])
    return archive


def test_a_merge_that_was_killed_before_it_removed_the_small_segments_duplicates_no_event(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamrec.archive.segments.MIN_SEGMENTS_TO_MERGE", 5)
    archive = many_small(place)
    small = {segment.name: archive.store.read(segment.name) for segment in archive.segments()}
    assert archive.merge(0) == 5
    for name, content in list(small.items())[2:]:
        archive.store.write(name, content or b"")
    assert rows(archive) == expected(*(click(0, n) for n in range(5)))
    assert archive.stats().segments == 1
    archive.append(0, 5, 6, [click(0, 5)])
    assert archive.merge(0) == 0
    assert len(archive.store.files("epoch-0")) == 2, "the next merge removes them"


def test_a_merge_does_nothing_if_a_segment_is_pruned_meanwhile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamrec.archive.segments.MIN_SEGMENTS_TO_MERGE", 5)
    archive = many_small(place)
    list_files = EventArchive._files_of

    def listed_then_pruned(self: EventArchive, partition: int) -> object:
        found = list_files(self, partition)
        archive.store.delete(min(found))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(EventArchive, "_files_of", listed_then_pruned)
        assert archive.merge(0) == 0
    assert rows(archive) == expected(*(click(0, n) for n in range(1, 5)))


def test_a_reader_gets_all_events_while_segments_are_merged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamrec.archive.segments.MIN_SEGMENTS_TO_MERGE", 5)
    archive = many_small(place)
    list_segments, merged = EventArchive.segments, []

    def listed_then_merged(self: EventArchive) -> object:
        found = list_segments(self)
        merged.append(archive.merge(0))
        return found

    monkeypatch.setattr(EventArchive, "segments", listed_then_merged)
    assert rows(archive) == expected(*(click(0, n) for n in range(5)))
    assert merged == [5, 0], "the first listing was stale"


def test_a_new_topic_epoch_starts_at_offset_0(place: Place) -> None:
    EventArchive(place, topic_epoch=0).append(0, 0, 10, [click(0, 3)])
    again = EventArchive(place, topic_epoch=1)
    assert again.next_offsets() == {}
    again.append(0, 0, 2, [click(0, 1)])
    assert rows(again) == expected(click(0, 1))


def test_imported_events_come_first_and_are_imported_once(place: Place) -> None:
    archive = EventArchive(place)
    archive.append(2, 0, 5, [click(2, 4)])
    old = [Event("ann", "a", 5), Event("bob", "b", 3), Event("ann", "c", 5)]
    assert archive.import_events(old) == 3
    assert archive.import_events(iter(old)) == 0
    assert archive.import_events([Event("cid", "d", 9)]) == 1
    assert archive.import_events([]) == 0
    found = rows(archive)
    assert sorted(found[:4]) == sorted([("ann", "a", 5), ("bob", "b", 3), ("ann", "c", 5), ("cid", "d", 9)])
    assert found.index(("ann", "a", 5)) < found.index(("ann", "c", 5)), "in the order of the file"
    assert found[4:] == expected(click(2, 4))
    assert archive.stats().imported_events == 4
    assert archive.next_offsets() == {2: 5}
    with pytest.raises(ArchiveError, match="without a timestamp"):
        archive.import_events([Event("ann", "a", None)])


def test_pruning_removes_old_segments_and_remembers_the_next_offsets(place: Place) -> None:
    archive = EventArchive(place)
    for start in range(0, 50, 10):
        archive.append(0, start, start + 10, [click(0, n) for n in range(start, start + 10)])
    archive.import_events([Event("ann", "a", 5)])
    assert archive.prune(BASE_MS + 25_000) == 3  # two segments and the imported file
    assert rows(archive) == expected(*(click(0, n) for n in range(20, 50)))
    assert archive.prune(BASE_MS + 10**9) == 2
    assert rows(archive) == expected(*(click(0, n) for n in range(40, 50)))
    assert archive.next_offsets() == {0: 50}


def test_damaged_and_foreign_files_are_named(place: Place) -> None:
    archive = EventArchive(place)
    archive.append(0, 0, 10, [click(0, 1)])
    (segment,) = archive.segments()
    content = archive.store.read(segment.name) or b""
    archive.store.write(segment.name, content[:-9])
    with pytest.raises(ArchiveError, match=r"0000000-.*\.parquet cannot be read: .*restore it from a copy, or remove"):
        archive.read()
    archive.store.write(segment.name, content)
    archive.store.write("epoch-0/partition-0/notes.txt", b"hello")
    with pytest.raises(ArchiveError, match=r"notes\.txt does not belong in an archive"):
        archive.next_offsets()


def test_segments_of_two_archivers_that_overlap_have_each_event_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = EventArchive(place), EventArchive(place)
    one.append(0, 0, 10, [click(0, n) for n in range(10)])
    with monkeypatch.context() as patched:  # the other one has listed the segments before that
        patched.setattr(EventArchive, "_segments_of", lambda *_: [])
        other.append(0, 0, 7, [click(0, n) for n in range(7)])
        other.append(0, 7, 15, [click(0, n) for n in range(7, 15)])
    with pytest.raises(ArchiveError, match="offsets 10 to 19 of partition 0 do not follow 14"):
        one.append(0, 10, 20, [click(0, n) for n in range(10, 20)])
    assert rows(one) == expected(*(click(0, n) for n in range(15)))
    assert one.next_offsets() == {0: 15}
    monkeypatch.setattr("streamrec.archive.segments.MIN_SEGMENTS_TO_MERGE", 2)
    assert one.merge(0) == 2
    assert rows(other) == expected(*(click(0, n) for n in range(15)))
    assert [file.name for file in one.store.files("epoch-0")] == [f"epoch-0/partition-0/{0:019}-{15:019}.parquet"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from support.archives import click
from streamrec.archive.segments import EventArchive
archive = EventArchive(sys.argv[1])
while True:
    for partition in range(2):
        first = archive.next_offsets().get(partition, 0)
        archive.append(partition, first, first + 7, [click(partition, n) for n in range(first, first + 7)])
"""


def test_a_writer_killed_at_random_moments_loses_and_duplicates_no_event(place: Place) -> None:
    rng = random.Random(1)
    archive = EventArchive(place)
    reached = 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(archive.place), str(Path(__file__).parents[1])]
        with subprocess.Popen(command) as writer:
            until = time.monotonic() + 60
            while sum(archive.next_offsets().values()) == reached:
                assert writer.poll() is None and time.monotonic() < until
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))  # the random moment
            writer.send_signal(signal.SIGKILL)
        ends = archive.next_offsets()
        assert rows(archive) == expected(*(click(p, n) for p in sorted(ends) for n in range(ends[p])))
        assert sum(ends.values()) > reached
        reached = sum(ends.values())


def test_a_writer_killed_at_any_step_loses_and_duplicates_no_event(
    place: Place, request: pytest.FixtureRequest
) -> None:
    numbers, events = itertools.count(), 10
    server = request.getfixturevalue("s3") if isinstance(place, str) else None
    ends = set()
    for at, killed in killed_at_each_step(
        lambda: below(place, str(next(numbers))),
        server,
        "support.archive_writer",
        lambda place: [str(place), str(events)],
        os.environ,
    ):
        archive = EventArchive(at)
        end = archive.next_offsets().get(0, 0)
        assert rows(archive) == expected(*(click(0, n) for n in range(end)))
        ends.add(end)
        with archive.following():  # the next archiver continues there
            archive.append(0, end, events + 1, [click(0, n) for n in range(end, events + 1)])
            archive.merge(0)
        assert rows(archive) == expected(*(click(0, n) for n in range(events + 1)))
        assert killed or end == events
    assert ends == set(range(0, events + 1, 2))
