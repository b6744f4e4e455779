"""The click topic in a folder or object store, so that training does not depend on Kafka's retention.

    ARCHIVE/
      format                                    the format version of the archive (formats.py)
      epoch-E/partition-P/FIRST-NEXT.parquet    events at offsets FIRST to NEXT - 1 of a partition
      imported/SHA256.parquet                   events of an imported file (imports.py)

A segment appears whole or not at all. The next offset of a partition follows from the file names alone. So a crash
neither loses nor duplicates an event: an unfinished segment is read from Kafka again, a finished one never.

One process writes at a time. A folder is locked. In an object store two archivers may write segments that overlap until
one notices. An offset always has the same event, so readers take it from the first segment.

Small segments of a partition are merged. The merged file is in place before they are removed; until then segments
within the offsets of another one are ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from sasrec import Event, Interactions
from streamrec.archive.imports import IMPORTED, RoleOf, always_a_click, import_of
from streamrec.archive.segment_files import (
    SCHEMA,
    ArchiveStats,
    Segment,
    check_archive,
    columns_of_roles,
    concatenate,
    dead_letters_in,
    events_in,
    mark_in,
    next_offsets_of,
    read_table,
    without_overlap,
    write_table,
)
from streamrec.errors import ArchiveError, ArchiveTaken, StoreUnavailable
from streamrec.formats import claim_format
from streamrec.schemas import ClickEvent, RecordMark
from streamrec.storage import ABANDONED_AFTER_S, Place, open_store

SEGMENT = re.compile(r"(\d+)-(\d+)\.parquet")
PARTITION = re.compile(r"epoch-\d+/partition-([^/]*)/([^/]+)")
MIN_SEGMENTS_TO_MERGE = 64
SMALL_BYTES = 2**20  # segments below this size are merged
READ_ATTEMPTS = 5  # while another process merges or prunes
PARALLEL_READS = 8  # an object store answers each after some 10 ms


class EventArchive:
    """Imported events, and the events of a topic under one topic epoch.

    Every method raises StoreUnavailable if the folder or object store cannot be read or written.
    """

    def __init__(self, place: Place, topic_epoch: int = 0) -> None:
        self.place = place
        self.topic_epoch = topic_epoch
        self.store = open_store(place)
        self._epoch = f"epoch-{topic_epoch}"

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Lock the archive for the process that copies the topic into it; an object store has no lock.

        Raises:
            ArchiveTaken: another process holds the lock.
        """
        check_archive(self.store)
        claim_format(self.store)
        with contextlib.ExitStack() as lock:
            try:
                lock.enter_context(self.store.locked(wait=False))
            except BlockingIOError:
                raise ArchiveTaken(
                    f"another process writes the topic into {self.store} (streamrec retrain, or archive follow): "
                    "stop it, or set another folder"
                ) from None
            with contextlib.suppress(StoreUnavailable):  # upkeep
                self.store.sweep(ABANDONED_AFTER_S)
            yield

    def next_offsets(self) -> dict[int, int]:
        """Return the next offset to archive, by partition."""
        return next_offsets_of(self._segments_of())

    def next_offset(self, partition: int) -> int:
        """Return the next offset to archive of a partition."""
        return next_offsets_of(self._segments_of(partition)).get(partition, 0)

    def segments(self) -> list[Segment]:
        """List imported files, then segments by partition and offset: the order in which events are read.

        Raises:
            ArchiveError: a folder of segments has another file, or the archive's format is unknown.
        """
        followed = self._segments_of()
        names = sorted(file.name for file in self.store.files(IMPORTED) if file.name.endswith(".parquet"))
        return [Segment(name) for name in names] + followed

    def _segments_of(self, partition: int | None = None) -> list[Segment]:
        """List the segments of a partition, or of all, by partition and offset."""
        check_archive(self.store)
        return without_overlap(self._parse(name) for name in self._files_of(partition))

    def _files_of(self, partition: int | None) -> dict[str, int]:
        """Return the size of each file of a partition, or of all, by name."""
        files = self.store.files(self._epoch if partition is None else f"{self._epoch}/partition-{partition}")
        return {file.name: file.bytes for file in files if PARTITION.fullmatch(file.name)}

    def _parse(self, name: str) -> Segment:
        parts = PARTITION.fullmatch(name)
        offsets = parts and SEGMENT.fullmatch(parts[2])
        if not parts or not offsets or not parts[1].isdecimal():
            raise ArchiveError(f"{self.store.at(name)} does not belong in an archive; move it elsewhere")
        return Segment(name, int(parts[1]), int(offsets[1]), int(offsets[2]))

    def append(
        self,
        partition: int,
        first: int,
        next_offset: int,
        events: Sequence[ClickEvent],
        dead_letters: int = 0,
        mark: RecordMark | None = None,
    ) -> None:
        """Add the events of a range of offsets as a segment, whole or not at all.

        Args:
            first: first offset of the range.
            next_offset: offset after the range; some offsets may have no event, such as those of dead letters.
            mark: of the last record, to recognize the topic.

        Raises:
            ArchiveTaken: the range overlaps archived offsets, or an event lies outside the range.
            ArchiveError: the folder of the partition has another file.
        """
        expected = self.next_offset(partition)
        if not expected <= first < next_offset or any(not first <= event.offset < next_offset for event in events):
            raise ArchiveTaken(
                f"offsets {first} to {next_offset - 1} of partition {partition} do not follow {expected - 1}, the last "
                f"offset in {self.store}; does another process write to the archive?"
            )
        columns = [[getattr(event, name) for event in events] for name in SCHEMA.names[:4]]
        columns += columns_of_roles([event.role for event in events])
        claim_format(self.store)
        table = pa.table(columns, SCHEMA)
        write_table(self.store, self._name(partition, first, next_offset), table, dead_letters, mark)

    def marks(self) -> dict[int, RecordMark]:
        """Return the mark of the last archived record, by partition; partitions without one are left out."""
        last = [*{segment.partition: segment for segment in self._segments_of()}.values()]
        with contextlib.suppress(FileNotFoundError):  # another process merges or prunes
            found = zip(last, map(mark_in, self._read(last)), strict=True)
            return {segment.partition: mark for segment, mark in found if mark and segment.partition is not None}
        return {}

    def merge(self, partition: int) -> int:
        """Merge the small segments of a partition if there are many; return the number of merged segments.

        If another process prunes at the same time, none are merged; the next call tries again.

        Raises:
            ArchiveError: a segment is damaged.
        """
        try:
            return self._merge(partition)
        except FileNotFoundError:
            return 0

    def _merge(self, partition: int) -> int:
        sizes = self._files_of(partition)
        segments = without_overlap(map(self._parse, sizes))
        for name in sizes.keys() - {segment.name for segment in segments}:
            self.store.delete(name)  # an earlier merge was killed before it removed this segment
        small = list(itertools.takewhile(lambda s: sizes[s.name] < SMALL_BYTES, reversed(segments)))[::-1]
        if len(small) < MIN_SEGMENTS_TO_MERGE:
            return 0
        tables = self._read(small)
        name = self._name(partition, small[0].first, small[-1].next)
        write_table(self.store, name, concatenate(tables), sum(map(dead_letters_in, tables)), mark_in(tables[-1]))
        for segment in small:
            self.store.delete(segment.name)
        return len(small)

    def _name(self, partition: int, first: int, next_offset: int) -> str:
        return f"{self._epoch}/partition-{partition}/{first:019}-{next_offset:019}.parquet"

    def _read(self, segments: Sequence[Segment]) -> list[pa.Table]:
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            return list(pool.map(lambda segment: read_table(self.store, segment), segments))

    def import_events(self, events: Iterable[Event], source: str = "", role_of: RoleOf = always_a_click) -> int:
        """Add events that were never in the topic; return their number, or 0 if they were imported before.

        Args:
            source: the name of their file.
            role_of: the role of an event type; events without one are left out.

        Raises:
            ArchiveError: an event has no timestamp.
        """
        name, table = import_of(events, source, role_of)
        check_archive(self.store)
        if not table.num_rows or any(file.name == name for file in self.store.files(IMPORTED)):
            return 0
        claim_format(self.store)
        write_table(self.store, name, table)
        return int(table.num_rows)

    def read(self) -> Interactions:
        """Return all clicks: imported ones by time, then each partition's in the order of their offsets.

        The clicks of a user lie in one partition, so they come in the order in which the daemon applied them. Outcomes
        are None if all are 1.

        Raises:
            ArchiveError: a segment is damaged.
        """
        found = self.tables()
        imported = events_in([table for segment, table in found if segment.partition is None]).in_order()
        followed = events_in([table for segment, table in found if segment.partition is not None])
        assert imported.outcomes is not None and followed.outcomes is not None
        outcomes = np.concatenate((imported.outcomes, followed.outcomes))
        return Interactions(
            imported.user_ids + followed.user_ids,
            imported.item_ids + followed.item_ids,
            np.concatenate((imported.timestamps_ms, followed.timestamps_ms)),
            None if (outcomes == 1).all() else outcomes,
        )

    def prune(self, before_ms: int) -> int:
        """Remove segments whose events are all older than this time; return the number of removed segments.

        The newest segment of each partition is not removed: its name stores the next offset.
        """
        found = self.tables()
        ends, removed = next_offsets_of(segment for segment, _ in found), 0
        for segment, table in found:
            times = table["timestamp_ms"].to_numpy()
            is_last = segment.partition is not None and segment.next == ends[segment.partition]
            if not is_last and (not len(times) or times.max() < before_ms):
                self.store.delete(segment.name)
                removed += 1
        return removed

    def stats(self) -> ArchiveStats:
        """Return size and content of the archive."""
        found = self.tables()
        times = np.concatenate([table["timestamp_ms"].to_numpy() for _, table in found] or [np.zeros(0, np.int64)])
        return ArchiveStats(
            segments=len(found),
            events=len(times),
            imported_events=sum(table.num_rows for segment, table in found if segment.partition is None),
            dead_letters=sum(dead_letters_in(table) for _, table in found),
            bytes=sum(file.bytes for file in self.store.files() if file.name.endswith(".parquet")),
            first_ts_ms=int(times.min()) if len(times) else None,
            last_ts_ms=int(times.max()) if len(times) else None,
            next_offsets=next_offsets_of(segment for segment, _ in found),
        )

    def before(self) -> dict[int, EventArchive]:
        """Return the archives of earlier epochs of the topic, by epoch, oldest first."""
        numbers = {file.name.split("/")[0].removeprefix("epoch-") for file in self.store.files()}
        epochs = sorted(int(number) for number in numbers if number.isdecimal())
        return {epoch: EventArchive(self.place, epoch) for epoch in epochs if epoch < self.topic_epoch}

    def tables(self, imported: bool = True) -> list[tuple[Segment, pa.Table]]:
        """Read all segments, in order, with or without imported files.

        Raises:
            ArchiveError: a segment is damaged.
        """
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                segments = self.segments() if imported else self._segments_of()
                return list(zip(segments, self._read(segments), strict=True))
        raise ArchiveError(f"segments vanish from {self.store} while they are read; does another process remove them?")
