"""One segment of the archive: a Parquet file of events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from sasrec import Interactions
from streamrec.durable import atomic_file
from streamrec.errors import ArchiveError

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp_ms", pa.int64()), ("offset", pa.int64())]
)
DEAD_LETTERS = b"streamrec.dead_letters"  # number of dead letters, in the metadata of the schema


@dataclass(frozen=True)
class Segment:
    """A file of events. ``partition`` is None, and the offsets are 0, if the events were imported."""

    path: Path
    partition: int | None = None
    first: int = 0
    next: int = 0


def write_table(table: pa.Table, path: Path, dead_letters: int | None = None) -> None:
    """Write a segment, whole or not at all.

    Raises:
        OSError, pa.ArrowException: the file cannot be written.
    """
    if dead_letters is not None:
        table = table.replace_schema_metadata({DEAD_LETTERS: str(dead_letters).encode()})
    with atomic_file(path) as file:
        parquet.write_table(table, file, compression="zstd")


def read_table(path: Path) -> pa.Table:
    """Read a segment.

    Raises:
        FileNotFoundError: there is no file at this path.
        ArchiveError: the file is damaged, or is not a segment.
    """
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ArchiveError(f"{path} cannot be read: {error}; restore it from a copy, or remove it") from error
    if not table.schema.equals(SCHEMA):
        raise ArchiveError(f"{path} is not a segment of an archive: its columns are {', '.join(table.column_names)}")
    return table


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of all tables, without metadata."""
    return pa.concat_tables([t.replace_schema_metadata() for t in tables]) if tables else SCHEMA.empty_table()


def events_in(tables: Sequence[pa.Table]) -> Interactions:
    """Return the events of tables, in their order."""
    table = concatenate(tables)
    times = np.array(table["timestamp_ms"].to_numpy(), np.int64)
    return Interactions(table["user_id"].to_pylist(), table["item_id"].to_pylist(), times)


def dead_letters_in(table: pa.Table) -> int:
    """Return how many dead letters lay in the offsets of a segment."""
    return int((table.schema.metadata or {}).get(DEAD_LETTERS, b"0"))
