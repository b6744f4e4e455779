"""One segment of the archive: a Parquet file of events. A column whose rows all have its default is left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from sasrec import Interactions
from streamrec.errors import ArchiveError
from streamrec.formats import check_format
from streamrec.schemas import RecordMark, Role
from streamrec.storage import Store

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp_ms", pa.int64()),
        ("offset", pa.int64()),
        ("click", pa.bool_()),
        ("exclude", pa.bool_()),
        ("outcome", pa.float32()),
    ]
)
DEFAULTS = {"click": True, "exclude": False, "outcome": 1.0}  # of columns that may be left out
# in the metadata of the schema
DEAD_LETTERS = b"streamrec.dead_letters"  # number of dead letters
MARK = b"streamrec.mark"  # of the last record


@dataclass(frozen=True)
class Segment:
    """A file of events. ``partition`` is None, and the offsets are 0, if the events were imported.

    Events before ``first`` are ignored: the segment before has them.
    """

    name: str  # of the file, in the archive
    partition: int | None = None
    first: int = 0
    next: int = 0


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


def check_archive(store: Store) -> None:
    """Check that the folder or object store has an archive of a known format, or nothing.

    Raises:
        ArchiveError: it has not.
    """
    check_format(store, lambda name: name.endswith(".parquet"), "set another STREAMREC_ARCHIVE_DIR", ArchiveError)


def columns_of_roles(roles: Sequence[Role]) -> list[list[object]]:
    """Return the columns of the schema that say what events do, in its order."""
    return [[getattr(role, name) for role in roles] for name in DEFAULTS]


def write_table(
    store: Store, name: str, table: pa.Table, dead_letters: int | None = None, mark: RecordMark | None = None
) -> None:
    """Write a segment, whole or not at all.

    Raises:
        StoreUnavailable: the file cannot be written.
    """
    if dead_letters is not None:
        metadata = {DEAD_LETTERS: str(dead_letters)} | ({MARK: str(mark)} if mark else {})
        table = table.replace_schema_metadata(metadata)
    for column, default in DEFAULTS.items():
        if compute.all(compute.equal(table[column], default), min_count=0).as_py():
            table = table.drop_columns(column)
    content = pa.BufferOutputStream()
    parquet.write_table(table, content, compression="zstd")
    store.write(name, content.getvalue().to_pybytes())


def read_table(store: Store, segment: Segment) -> pa.Table:
    """Read a segment.

    Raises:
        FileNotFoundError: there is no such file.
        ArchiveError: the file is damaged, or is not a segment.
        StoreUnavailable: the file cannot be read.
    """
    content, where = store.read(segment.name), store.at(segment.name)
    if content is None:
        raise FileNotFoundError(where)
    try:
        with parquet.ParquetFile(pa.BufferReader(content)) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise ArchiveError(f"{where} cannot be read: {error}; restore it from a copy, or remove it") from error
    columns = table.column_names
    for column in DEFAULTS.keys() - columns:
        default = pa.scalar(DEFAULTS[column], SCHEMA.field(column).type)
        table = table.append_column(SCHEMA.field(column), pa.repeat(default, table.num_rows))
    if set(table.column_names) == set(SCHEMA.names):
        table = table.select(SCHEMA.names)
    if not table.schema.equals(SCHEMA):
        raise ArchiveError(f"{where} is not a segment of an archive: its columns are {', '.join(columns)}")
    if segment.partition is None:
        return table
    return table.filter(compute.greater_equal(table["offset"], segment.first))  # keeps the metadata


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of all tables, without metadata."""
    return pa.concat_tables([t.replace_schema_metadata() for t in tables]) if tables else SCHEMA.empty_table()


def events_in(tables: Sequence[pa.Table]) -> Interactions:
    """Return the clicks of tables, in their order; an event that only excludes is none."""
    table = concatenate(tables)
    table = table.filter(table["click"])
    times, outcomes = np.array(table["timestamp_ms"].to_numpy(), np.int64), np.array(table["outcome"].to_numpy())
    return Interactions(table["user_id"].to_pylist(), table["item_id"].to_pylist(), times, outcomes)


def dead_letters_in(table: pa.Table) -> int:
    """Return how many dead letters lay in the offsets of a segment."""
    return int((table.schema.metadata or {}).get(DEAD_LETTERS, b"0"))


def mark_in(table: pa.Table) -> RecordMark | None:
    """Return the mark of the last record of a segment; None if the segment was written without."""
    return RecordMark.parse((table.schema.metadata or {}).get(MARK, b"").decode(errors="replace"))


def next_offsets_of(segments: Iterable[Segment]) -> dict[int, int]:
    """Return the offset after the last archived one, by partition."""
    ends: dict[int, int] = {}
    for segment in segments:
        if segment.partition is not None:
            ends[segment.partition] = max(ends.get(segment.partition, 0), segment.next)
    return ends


def without_overlap(found: Iterable[Segment]) -> list[Segment]:
    """Return the segments by partition and offset, each from the end of the one before; not those within another."""
    listed: list[Segment] = []
    for segment in sorted(found, key=lambda segment: (segment.partition, segment.first, -segment.next)):
        reached = listed[-1].next if listed and listed[-1].partition == segment.partition else 0
        if reached < segment.next:
            listed.append(replace(segment, first=max(segment.first, reached)))
    return listed
