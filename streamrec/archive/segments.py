"""The click topic on local disk, so that training does not depend on Kafka's retention.

    ARCHIVE/
      format                                    the format version of the folder (formats.py)
      epoch-E/partition-P/FIRST-NEXT.parquet    events at offsets FIRST to NEXT - 1 of a partition
      imported/SHA256.parquet                   events of an imported file; the name is a hash of these events

A segment is written under a temporary name, flushed to disk and renamed. The next offset of a partition follows from
the file names alone. So a crash neither loses nor duplicates an event: an unfinished segment is read from Kafka again,
a finished one never. One process writes at a time.

Small segments of a partition are merged once there are MIN_SEGMENTS_TO_MERGE. The merged file is in place before they
are removed; until then segments within the offsets of another one are ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sasrec import Event, Interactions
from streamrec.archive.segment_files import (
    SCHEMA,
    Segment,
    concatenate,
    dead_letters_in,
    events_in,
    read_table,
    write_table,
)
from streamrec.errors import ArchiveError
from streamrec.formats import check_folder, claim_folder
from streamrec.schemas import ClickEvent

SEGMENT = re.compile(r"(\d+)-(\d+)\.parquet")
IMPORTED = "imported"
MIN_SEGMENTS_TO_MERGE = 64
SMALL_BYTES = 2**20  # segments below this size are merged
READ_ATTEMPTS = 5  # while another process merges or prunes
LOCK = "lock"


@dataclass(frozen=True)
class ArchiveStats:
    """Size and content of an archive. The times are None if there are no events."""

    segments: int
    events: int
    imported_events: int
    dead_letters: int
    bytes: int
    first_ts_ms: int | None
    last_ts_ms: int | None
    next_offsets: dict[int, int]


class EventArchive:
    """Imported events, and the events of a topic under one topic epoch."""

    def __init__(self, folder: Path, topic_epoch: int = 0) -> None:
        self.folder = folder
        self.topic_epoch = topic_epoch
        self._epoch = folder / f"epoch-{topic_epoch}"

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Lock the archive for the process that copies the topic into it.

        Raises:
            ArchiveError: another process holds the lock, or the folder cannot be written.
        """
        try:
            self._check_format()
            claim_folder(self.folder)
            lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise ArchiveError(f"cannot write to {self.folder}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ArchiveError(
                    f"another process writes the topic into {self.folder} (streamrec retrain, or archive follow): "
                    "stop it, or set another folder"
                ) from None
            yield

    def next_offsets(self) -> dict[int, int]:
        """Return the next offset to archive, by partition."""
        return _next_offsets(self.segments())

    def segments(self) -> list[Segment]:
        """List imported files, then segments by partition and offset: the order in which events are read.

        Raises:
            ArchiveError: a folder of segments has another file, or the archive's format is unknown.
        """
        imported = [Segment(path) for path in sorted(self.folder.glob(f"{IMPORTED}/[!.]*.parquet"))]
        return imported + self._segments_of("*")

    def _segments_of(self, partition: int | str) -> list[Segment]:
        """List the segments of a partition, or of all ("*"), by partition and offset."""
        self._check_format()
        found = []
        for path in self._epoch.glob(f"partition-{partition}/[!.]*"):
            name = SEGMENT.fullmatch(path.name)
            number = path.parent.name.removeprefix("partition-")
            if name is None or not number.isdecimal():
                raise ArchiveError(f"{path} does not belong in an archive; move it elsewhere")
            found.append(Segment(path, int(number), int(name[1]), int(name[2])))
        listed: list[Segment] = []
        for segment in sorted(found, key=lambda segment: (segment.partition, segment.first, -segment.next)):
            if not listed or listed[-1].partition != segment.partition or listed[-1].next < segment.next:
                listed.append(segment)
        return listed

    def append(
        self, partition: int, first: int, next_offset: int, events: Sequence[ClickEvent], dead_letters: int = 0
    ) -> None:
        """Add the events of a range of offsets as a segment, whole or not at all.

        Args:
            first: first offset of the range.
            next_offset: offset after the range; some offsets may have no event, such as those of dead letters.

        Raises:
            ArchiveError: the range overlaps archived offsets, an event lies outside the range, or the file cannot be
                written.
        """
        expected = _next_offsets(self._segments_of(partition)).get(partition, 0)
        if not expected <= first < next_offset or any(not first <= event.offset < next_offset for event in events):
            raise ArchiveError(
                f"offsets {first} to {next_offset - 1} of partition {partition} do not follow {expected - 1}, the last "
                f"offset in {self.folder}; does another process write to the archive?"
            )
        columns = [[getattr(event, name) for event in events] for name in SCHEMA.names]
        self._write(pa.table(columns, SCHEMA), self._path(partition, first, next_offset), dead_letters)

    def merge(self, partition: int) -> int:
        """Merge the small segments of a partition if there are many; return the number of merged segments.

        If another process prunes at the same time, none are merged; the next call tries again.

        Raises:
            ArchiveError: a segment is damaged, or the merged one cannot be written.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._merge(partition)
        return 0

    def _merge(self, partition: int) -> int:
        segments = self._segments_of(partition)
        listed = {segment.path for segment in segments}
        for path in self._epoch.glob(f"partition-{partition}/[!.]*"):
            if path not in listed:  # an earlier merge was killed before it removed this segment
                path.unlink(missing_ok=True)
        small = list(itertools.takewhile(lambda s: s.path.stat().st_size < SMALL_BYTES, reversed(segments)))[::-1]
        if len(small) < MIN_SEGMENTS_TO_MERGE:
            return 0
        tables = [read_table(segment.path) for segment in small]
        path = self._path(partition, small[0].first, small[-1].next)
        self._write(concatenate(tables), path, sum(map(dead_letters_in, tables)))
        for segment in small:
            segment.path.unlink(missing_ok=True)
        return len(small)

    def _path(self, partition: int, first: int, next_offset: int) -> Path:
        return self._epoch / f"partition-{partition}" / f"{first:019}-{next_offset:019}.parquet"

    def import_events(self, events: Iterable[Event]) -> int:
        """Add events that were never in the topic; return their number, or 0 if they were imported before.

        Raises:
            ArchiveError: an event has no timestamp, or the file cannot be written.
        """
        rows = list(events)
        if any(row.timestamp_ms is None for row in rows):
            raise ArchiveError("an event without a timestamp cannot be archived; add a timestamp to each row")
        columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names[:3]]
        table = pa.table([*columns, range(len(rows))], SCHEMA)
        digest = hashlib.sha256(repr(rows).encode()).hexdigest()
        path = self.folder / IMPORTED / f"{digest}.parquet"
        self._check_format()
        if path.exists() or not rows:
            return 0
        self._write(table, path)
        return len(rows)

    def read(self) -> Interactions:
        """Return all events: imported ones by time, then each partition's in the order of their offsets.

        The events of a user lie in one partition, so they come in the order in which the daemon applied them.

        Raises:
            ArchiveError: a segment is damaged.
        """
        found = self.tables()
        imported = events_in([table for segment, table in found if segment.partition is None]).in_order()
        followed = events_in([table for segment, table in found if segment.partition is not None])
        return Interactions(
            imported.user_ids + followed.user_ids,
            imported.item_ids + followed.item_ids,
            np.concatenate((imported.timestamps_ms, followed.timestamps_ms)),
        )

    def prune(self, before_ms: int) -> int:
        """Remove segments whose events are all older than this time; return the number of removed segments.

        The newest segment of each partition is not removed: its name stores the next offset.
        """
        found = self.tables()
        ends, removed = _next_offsets(segment for segment, _ in found), 0
        for segment, table in found:
            if segment.partition is not None and segment.next == ends[segment.partition]:
                continue
            times = table["timestamp_ms"].to_numpy()
            if not len(times) or times.max() < before_ms:
                segment.path.unlink(missing_ok=True)
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
            bytes=sum(path.stat().st_size for path in self.folder.rglob("[!.]*.parquet")),
            first_ts_ms=int(times.min()) if len(times) else None,
            last_ts_ms=int(times.max()) if len(times) else None,
            next_offsets=_next_offsets(segment for segment, _ in found),
        )

    def before(self) -> dict[int, EventArchive]:
        """Return the archives of earlier epochs of the topic, by epoch, oldest first."""
        numbers = [path.name.removeprefix("epoch-") for path in self.folder.glob("epoch-*")]
        epochs = sorted(int(number) for number in numbers if number.isdecimal())
        return {epoch: EventArchive(self.folder, epoch) for epoch in epochs if epoch < self.topic_epoch}

    def tables(self, imported: bool = True) -> list[tuple[Segment, pa.Table]]:
        """Read all segments, in order, with or without imported files.

        Raises:
            ArchiveError: a segment is damaged.
        """
        for _ in range(READ_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                segments = self.segments() if imported else self._segments_of("*")
                return [(segment, read_table(segment.path)) for segment in segments]
        raise ArchiveError(f"segments vanish from {self.folder} while they are read; does another process remove them?")

    def _check_format(self) -> None:
        check_folder(self.folder, "**/[!.]*.parquet", "set another STREAMREC_ARCHIVE_DIR", ArchiveError)

    def _write(self, table: pa.Table, path: Path, dead_letters: int | None = None) -> None:
        try:
            claim_folder(self.folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            for leftover in path.parent.glob(".*"):  # of a killed process; only one process writes
                leftover.unlink()
            write_table(table, path, dead_letters)
        except (OSError, pa.ArrowException) as error:
            raise ArchiveError(f"cannot write {path}: {error}") from error


def _next_offsets(segments: Iterable[Segment]) -> dict[int, int]:
    """Return the offset after the last archived one, by partition."""
    ends: dict[int, int] = {}
    for segment in segments:
        if segment.partition is not None:
            ends[segment.partition] = max(ends.get(segment.partition, 0), segment.next)
    return ends
