"""The click topic on local disk, so that training does not depend on Kafka's retention.

    ARCHIVE/
      format                                    the version of all this (formats.py)
      epoch-E/partition-P/FIRST-NEXT.parquet    the events of the offsets FIRST to NEXT - 1 of a partition
      imported/SHA256.parquet                   the events of a file that was imported, by what is in it

A segment is written under another name, flushed to disk and renamed into place, and where a partition goes on
is told by the names alone. So a crash at any moment neither loses an event nor doubles one: what has no name
yet is read from Kafka again, and what has one is never read again. One process writes at a time.

Many small segments are merged into one now and then. Until they are removed it covers them, and a segment that
another one covers does not count.
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
import pyarrow.parquet as parquet

from sasrec import Event, Interactions
from streamrec.durable import replacing
from streamrec.errors import ArchiveError
from streamrec.formats import check_folder, claim_folder
from streamrec.schemas import ClickEvent

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp_ms", pa.int64()), ("offset", pa.int64())]
)
SEGMENT = re.compile(r"(\d+)-(\d+)\.parquet")
DEAD_LETTERS = b"streamrec.dead_letters"
IMPORTED = "imported"
MERGED_AT = 64  # small segments of a partition
SMALL_BYTES = 2**20
READ_AGAIN = 5  # times, where segments are merged or pruned while they are read
LOCK = "lock"


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
        self.topic_epoch = topic_epoch
        self._epoch = folder / f"epoch-{topic_epoch}"

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Be the one process that writes what it reads of the topic.

        Raises:
            ArchiveError: another one is.
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
                    f"another process writes the topic into {self.folder} (streamrec retrain, or archive follow); "
                    "stop it, or name another folder"
                ) from None
            yield

    def next_offsets(self) -> dict[int, int]:
        """Where each partition goes on, by partition."""
        return _ends(self.segments())

    def segments(self) -> list[Segment]:
        """Imported files first, then by partition and offset: the order in which events are read.

        Raises:
            ArchiveError: a name in a folder of segments is none of a segment, or the archive's format is unknown.
        """
        imported = [Segment(path) for path in sorted(self.folder.glob(f"{IMPORTED}/[!.]*.parquet"))]
        return imported + self._segments_of("*")

    def _segments_of(self, partition: int | str) -> list[Segment]:
        """The segments of a partition, or of all ("*"), by partition and offset."""
        self._check_format()
        found = []
        for path in self._epoch.glob(f"partition-{partition}/[!.]*"):
            name = SEGMENT.fullmatch(path.name)
            number = path.parent.name.removeprefix("partition-")
            if name is None or not number.isdecimal():
                raise ArchiveError(f"{path} does not belong into an archive; move it elsewhere")
            found.append(Segment(path, int(number), int(name[1]), int(name[2])))
        kept: list[Segment] = []
        for segment in sorted(found, key=lambda segment: (segment.partition, segment.first, -segment.next)):
            if not kept or kept[-1].partition != segment.partition or kept[-1].next < segment.next:
                kept.append(segment)
        return kept

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
        self._write(table, self._path(partition, first, next_offset))

    def merge(self, partition: int) -> int:
        """Put small segments of a partition together, once there are many; returns how many became one.

        None do while somebody prunes them; the next call tries again.

        Raises:
            ArchiveError: a segment is damaged, or the new one cannot be written.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._merge(partition)
        return 0

    def _merge(self, partition: int) -> int:
        segments = self._segments_of(partition)
        counted = {segment.path for segment in segments}
        for path in self._epoch.glob(f"partition-{partition}/[!.]*"):
            if path not in counted:  # covered: whoever merged them was killed before he had removed them
                path.unlink(missing_ok=True)
        small = list(itertools.takewhile(lambda s: s.path.stat().st_size < SMALL_BYTES, reversed(segments)))[::-1]
        if len(small) < MERGED_AT:
            return 0
        tables = [_read(segment.path) for segment in small]
        dead_letters = str(sum(map(_dead_letters, tables))).encode()
        whole = pa.concat_tables([table.replace_schema_metadata() for table in tables])
        path = self._path(partition, small[0].first, small[-1].next)
        self._write(whole.replace_schema_metadata({DEAD_LETTERS: dead_letters}), path)
        for segment in small:
            segment.path.unlink(missing_ok=True)
        return len(small)

    def _path(self, partition: int, first: int, next_offset: int) -> Path:
        return self._epoch / f"partition-{partition}" / f"{first:019}-{next_offset:019}.parquet"

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
        self._check_format()
        if path.exists() or not rows:
            return 0
        self._write(table, path)
        return len(rows)

    def read(self) -> Interactions:
        """All events: those that were imported by time, then partition by partition in the order of their offsets.

        A user's events lie in one partition, so they come in the order in which the daemon applied them.

        Raises:
            ArchiveError: a segment is damaged.
        """
        found = self.tables()
        imported = _events([table for segment, table in found if segment.partition is None]).in_order()
        followed = _events([table for segment, table in found if segment.partition is not None])
        return Interactions(
            imported.user_ids + followed.user_ids,
            imported.item_ids + followed.item_ids,
            np.concatenate((imported.timestamps_ms, followed.timestamps_ms)),
        )

    def prune(self, before_ms: int) -> int:
        """Remove segments that hold nothing as new as that; returns how many.

        The newest segment of a partition stays, since its name tells where the partition goes on.
        """
        found = self.tables()
        ends, removed = _ends(segment for segment, _ in found), 0
        for segment, table in found:
            if segment.partition is not None and segment.next == ends[segment.partition]:
                continue
            times = table["timestamp_ms"].to_numpy()
            if not len(times) or times.max() < before_ms:
                segment.path.unlink(missing_ok=True)
                removed += 1
        return removed

    def stats(self) -> ArchiveStats:
        """What is there."""
        found = self.tables()
        times = np.concatenate([table["timestamp_ms"].to_numpy() for _, table in found] or [np.zeros(0, np.int64)])
        return ArchiveStats(
            segments=len(found),
            events=len(times),
            imported_events=sum(table.num_rows for segment, table in found if segment.partition is None),
            dead_letters=sum(_dead_letters(table) for _, table in found),
            bytes=sum(path.stat().st_size for path in self.folder.rglob("[!.]*.parquet")),
            first_ts_ms=int(times.min()) if len(times) else None,
            last_ts_ms=int(times.max()) if len(times) else None,
            next_offsets=_ends(segment for segment, _ in found),
        )

    def before(self) -> dict[int, EventArchive]:
        """The archives of the topic before it was created again, by their epoch, the oldest first."""
        numbers = [path.name.removeprefix("epoch-") for path in self.folder.glob("epoch-*")]
        epochs = sorted(int(number) for number in numbers if number.isdecimal())
        return {epoch: EventArchive(self.folder, epoch) for epoch in epochs if epoch < self.topic_epoch}

    def _check_format(self) -> None:
        check_folder(self.folder, "**/[!.]*.parquet", "name another STREAMREC_ARCHIVE_DIR", ArchiveError)

    def _write(self, table: pa.Table, path: Path) -> None:
        try:
            claim_folder(self.folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(".*"):  # of a writer that was killed; there is only one
                left.unlink()
            with replacing(path) as file:
                parquet.write_table(table, file, compression="zstd")
        except (OSError, pa.ArrowException) as error:
            raise ArchiveError(f"cannot write {path}: {error}") from error

    def tables(self, imported: bool = True) -> list[tuple[Segment, pa.Table]]:
        """All segments, in their order, and what is in them; with those that were imported, or without.

        Raises:
            ArchiveError: a segment is damaged.
        """
        for _ in range(READ_AGAIN):
            with contextlib.suppress(FileNotFoundError):
                segments = self.segments() if imported else self._segments_of("*")
                return [(segment, _read(segment.path)) for segment in segments]
        raise ArchiveError(f"segments vanish from {self.folder} while they are read; is something else removing them?")


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
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ArchiveError(f"{path} cannot be read: {error}; restore it from a copy, or remove it") from error
    if not table.schema.equals(SCHEMA):
        raise ArchiveError(f"{path} is no segment of an archive: it has the columns {', '.join(table.column_names)}")
    return table


def _events(tables: Sequence[pa.Table]) -> Interactions:
    table = pa.concat_tables([t.replace_schema_metadata() for t in tables]) if tables else SCHEMA.empty_table()
    times = np.array(table["timestamp_ms"].to_numpy(), np.int64)
    return Interactions(table["user_id"].to_pylist(), table["item_id"].to_pylist(), times)


def _dead_letters(table: pa.Table) -> int:
    return int((table.schema.metadata or {}).get(DEAD_LETTERS, b"0"))
