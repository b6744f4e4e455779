"""The click topic on local disk, so that training does not depend on Kafka's retention.

    ARCHIVE/
      epoch-E/partition-P/FIRST-NEXT.parquet    the events of the offsets FIRST to NEXT - 1 of a partition
      imported/SHA256.parquet                   the events of a file that was imported, by what is in it

A segment is written under another name, flushed to disk and renamed into place, and where a partition goes on
is told by the names alone. So a crash at any moment neither loses an event nor doubles one: what has no name
yet is read from Kafka again, and what has one is never read again. One process writes at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from sasrec import Event, Interactions
from streamrec.durable import replacing
from streamrec.errors import ArchiveError
from streamrec.schemas import ClickEvent

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp_ms", pa.int64()), ("offset", pa.int64())]
)
SEGMENT = re.compile(r"(\d+)-(\d+)\.parquet")
DEAD_LETTERS = b"streamrec.dead_letters"
IMPORTED = "imported"


@dataclass(frozen=True)
class Segment:
    """A file of events. ``partition`` is None, and the offsets are 0, where it was imported."""

    path: Path
    partition: int | None = None
    first: int = 0
    next: int = 0


@dataclass(frozen=True)
class ArchiveStats:
    """What an archive holds; the times are None where it holds nothing."""

    segments: int
    events: int
    imported_events: int
    dead_letters: int
    bytes: int
    first_ts_ms: int | None
    last_ts_ms: int | None
    next_offsets: dict[int, int]


class EventArchive:
    """Events of one topic under one topic epoch, and those that were imported."""

    def __init__(self, folder: Path, topic_epoch: int = 0) -> None:
        self.folder = folder
        self._epoch = folder / f"epoch-{topic_epoch}"

    def next_offsets(self) -> dict[int, int]:
        """Where each partition goes on, by partition."""
        return _ends(self.segments())

    def segments(self) -> list[Segment]:
        """Imported files first, then by partition and offset: the order in which events are read.

        Raises:
            ArchiveError: a name in a folder of segments is none of a segment.
        """
        imported = [Segment(path) for path in sorted(self.folder.glob(f"{IMPORTED}/[!.]*.parquet"))]
        return imported + self._segments_of("*")

    def _segments_of(self, partition: int | str) -> list[Segment]:
        """The segments of a partition, or of all ("*"), by partition and offset."""
        found = []
        for path in self._epoch.glob(f"partition-{partition}/[!.]*"):
            name = SEGMENT.fullmatch(path.name)
            number = path.parent.name.removeprefix("partition-")
            if name is None or not number.isdecimal():
                raise ArchiveError(f"{path} does not belong into an archive; move it elsewhere")
            found.append(Segment(path, int(number), int(name[1]), int(name[2])))
        return sorted(found, key=lambda segment: (segment.partition, segment.first))

    def append(
        self, partition: int, first: int, next_offset: int, events: Sequence[ClickEvent], dead_letters: int = 0
    ) -> None:
        """Put the events of a range of offsets there, whole or not at all.

        Args:
            first, next_offset: the range read; offsets without an event, of dead letters say, belong to it too.

        Raises:
            ArchiveError: the range overlaps what is there, events lie outside it, or it cannot be written.
        """
        there = _ends(self._segments_of(partition)).get(partition, 0)
        if not there <= first < next_offset or any(not first <= event.offset < next_offset for event in events):
            raise ArchiveError(
                f"offsets {first} to {next_offset - 1} of partition {partition} do not follow {there - 1}, the last "
                f"in {self.folder}; does another process write there?"
            )
        columns = [[getattr(event, name) for event in events] for name in SCHEMA.names]
        table = pa.table(columns, SCHEMA.with_metadata({DEAD_LETTERS: str(dead_letters).encode()}))
        _write(table, self._epoch / f"partition-{partition}" / f"{first:019}-{next_offset:019}.parquet")

    def import_events(self, events: Iterable[Event]) -> int:
        """Add events that never were in the topic; returns how many, 0 where the same ones were imported before.

        Raises:
            ArchiveError: an event has no timestamp, or they cannot be written.
        """
        rows = list(events)
        if any(row.timestamp_ms is None for row in rows):
            raise ArchiveError("an event without a timestamp cannot be archived; give every row one")
        columns = [[getattr(row, name) for row in rows] for name in SCHEMA.names[:3]]
        table = pa.table([*columns, range(len(rows))], SCHEMA)
        digest = hashlib.sha256(repr(rows).encode()).hexdigest()
        path = self.folder / IMPORTED / f"{digest}.parquet"
        if path.exists() or not rows:
            return 0
        _write(table, path)
        return len(rows)

    def read(self) -> Interactions:
        """All events: those that were imported, then partition by partition in the order of their offsets.

        A user's events lie in one partition, so they come in the order in which the daemon applied them.

        Raises:
            ArchiveError: a segment is damaged.
        """
        tables = [_read(segment.path) for segment in self.segments()]
        table = pa.concat_tables([t.replace_schema_metadata() for t in tables]) if tables else SCHEMA.empty_table()
        times = np.array(table["timestamp_ms"].to_numpy(), np.int64)
        return Interactions(table["user_id"].to_pylist(), table["item_id"].to_pylist(), times)

    def prune(self, before_ms: int) -> int:
        """Remove segments that hold nothing as new as that; returns how many.

        The newest segment of a partition stays, since its name tells where the partition goes on.
        """
        segments = self.segments()
        ends, removed = _ends(segments), 0
        for segment in segments:
            if segment.partition is not None and segment.next == ends[segment.partition]:
                continue
            times = _read(segment.path)["timestamp_ms"].to_numpy()
            if not len(times) or times.max() < before_ms:
                segment.path.unlink()
                removed += 1
        return removed

    def stats(self) -> ArchiveStats:
        """What is there."""
        segments = self.segments()
        tables = [_read(segment.path) for segment in segments]
        times = np.concatenate([table["timestamp_ms"].to_numpy() for table in tables] or [np.zeros(0, np.int64)])
        imported = sum(t.num_rows for s, t in zip(segments, tables, strict=True) if s.partition is None)
        return ArchiveStats(
            segments=len(segments),
            events=len(times),
            imported_events=imported,
            dead_letters=sum(int((table.schema.metadata or {}).get(DEAD_LETTERS, b"0")) for table in tables),
            bytes=sum(segment.path.stat().st_size for segment in segments),
            first_ts_ms=int(times.min()) if len(times) else None,
            last_ts_ms=int(times.max()) if len(times) else None,
            next_offsets=_ends(segments),
        )


def _ends(segments: Iterable[Segment]) -> dict[int, int]:
    """The offset after the last one of each partition."""
    ends: dict[int, int] = {}
    for segment in segments:
        if segment.partition is not None:
            ends[segment.partition] = max(ends.get(segment.partition, 0), segment.next)
    return ends


def _read(path: Path) -> pa.Table:
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise ArchiveError(f"{path} cannot be read: {error}; restore it from a copy, or remove it") from error
    if not table.schema.equals(SCHEMA):
        raise ArchiveError(f"{path} is no segment of an archive: it has the columns {', '.join(table.column_names)}")
    return table


def _write(table: pa.Table, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".*"):  # of a writer that was killed; there is only one
            left.unlink()
        with replacing(path) as file:
            parquet.write_table(table, file, compression="zstd")
    except (OSError, pa.ArrowException) as error:
        raise ArchiveError(f"cannot write {path}: {error}") from error
