"""Hold the requested columns of a source as an Arrow table, and say where each row came from.

Rows of frames and Parquet files are counted from 0, lines of text files from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sasrec.data.column_types import TEXT, first_misfit, fits, is_text, typed
from sasrec.data.formats import EVENT_TYPE, ITEM_ID, USER_ID, DataFileError, Format, TimestampUnit
from sasrec.data.layouts import Request
from sasrec.data.lines import stored_rows
from sasrec.data.presets import TABLE


@dataclass(frozen=True)
class Part:
    """Say where the rows of one batch of a file are, or those of a frame.

    Args:
        path: of the file; None: a frame.
        count: of its rows.
        first_row: number of the first one in the file.
        rows: their numbers, if they do not follow each other.
        lines: the lines on which they begin, if these are known.
        request: to read the file again for a row's line; None: Parquet has no lines.
    """

    path: Path | None
    count: int
    first_row: int = 0
    rows: Sequence[int] | None = None
    lines: Sequence[int] | None = None
    request: Request | None = None

    def where(self, row: int) -> str:
        """Say where a row is."""
        if self.lines is not None:
            return f"{self.path}:{self.lines[row]}"
        number = self.first_row + row if self.rows is None else self.rows[row]
        if self.path is None:
            return f"row {number}"
        found = iter(()) if self.request is None else stored_rows(self.path, self.request)
        line, _ = next(islice(found, number, None), (None, ()))
        return f"{self.path}, row {number}" if line is None else f"{self.path}:{line}"

    def chosen(self, mask: pa.ChunkedArray) -> Part:
        """Return the part with the rows of a mask only."""
        kept = pc.indices_nonzero(mask).to_pylist()
        numbers = [self.first_row + row if self.rows is None else self.rows[row] for row in kept]
        lines = None if self.lines is None else [self.lines[row] for row in kept]
        return replace(self, count=len(kept), rows=numbers, lines=lines)


@dataclass(frozen=True)
class Data:
    """The requested columns of a source, named USER_ID and so on.

    Args:
        name: the source's name in messages.
        parts: where the rows are, in their order.
        labels: the source's own names of the columns, for messages.
        known: the layout of the source.
        unit: the unit of numeric timestamps; None: the caller gave none.
        untyped: the columns are text because a text file has no types.
        objects: the source is JSON, whose objects need not have every field.
        strings: columns of ids that JSON has as strings.
        read_bytes: how much of the file was read, as it is on disk.
    """

    table: pa.Table
    name: str
    parts: tuple[Part, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    known: Format = TABLE
    unit: TimestampUnit | None = None
    untyped: bool = False
    objects: bool = False
    strings: frozenset[str] = frozenset()
    read_bytes: int = 0

    @property
    def timestamp_unit(self) -> TimestampUnit:
        """The unit in which numeric times are read."""
        return self.unit or self.known.timestamp_unit

    def where(self, row: int) -> str:
        """Say where a row is: its line in a text file, else its number."""
        for part in self.parts:
            if row < part.count:
                return part.where(row)
            row -= part.count
        return f"row {row}"

    def label(self, name: str) -> str:
        """Return what the source calls a column."""
        return self.labels.get(name, name)

    def error(self, row: int, problem: str) -> DataFileError:
        """Return an error that names the row."""
        return DataFileError(f"{self.where(row)}: {problem}", row)

    def refuse_nulls(self, name: str, remedy: str) -> None:
        """Raise DataFileError where a column has a null."""
        if self.table[name].null_count:
            row = pc.index(pc.is_null(self.table[name]), True).as_py()
            raise self.error(row, f"{self.label(name)} is {'empty' if self.untyped else 'null'}; {remedy}")

    def renamed(self, name: str, new: str) -> Data:
        """Return the data with a column under another name."""
        names = [new if column == name else column for column in self.table.column_names]
        return replace(self, table=self.table.rename_columns(names), labels={**self.labels, new: self.label(name)})

    def with_column(self, name: str, column: pa.ChunkedArray) -> Data:
        """Return the data with a column replaced."""
        return replace(self, table=self.table.set_column(self.table.column_names.index(name), name, column))

    def without(self, *names: str) -> Data:
        """Return the data without these columns."""
        return replace(self, table=self.table.drop_columns([n for n in names if n in self.table.column_names]))

    def in_unit(self, unit: TimestampUnit) -> Data:
        """Return the data with times that are numbers in this unit."""
        return replace(self, unit=unit, known=replace(self.known, time_format=None))

    def up_to(self, row: int) -> Data:
        """Return the rows before a row."""
        return replace(self, table=self.table.slice(0, row))

    def typed(self, ids: bool) -> Data:
        """Return the columns of a text file as a typed file would hold them; the ids only if this is the whole file."""
        if not self.untyped:
            return self
        keep = set() if ids else {USER_ID, ITEM_ID}
        columns = {
            name: column if name in keep or name in self.strings or not is_text(column.type) else typed(name, column)
            for name, column in zip(self.table.column_names, self.table.columns, strict=True)
        }
        return replace(self, table=pa.table(columns))

    def type_error(self, name: str, remedy: str) -> DataFileError:
        """Return an error that names the type of a column."""
        return DataFileError(f"{self.name}: {self.label(name)} has type {self.table[name].type}; {remedy}")

    def cast(self, name: str, kind: pa.DataType, problem: str) -> pa.ChunkedArray:
        """Return a column as another type, or raise DataFileError that names the first row that does not fit."""
        column = self.table[name]
        if not fits(column, kind):
            row = first_misfit(column, kind)
            raise self.error(row, f"{self.label(name)} {column[row].as_py()!r} {problem}")
        return column.cast(kind)

    def no_rows(self, path: object, given: tuple[str, ...]) -> DataFileError:
        """Return the error of a source without rows of the event types that are given or that the layout says."""
        types = ", ".join(given or self.known.event_types)
        wrong = f" of event type {types}; correct the types, or the name of their column" if types else ""
        return DataFileError(f"{path} has no rows{wrong}")

    def of_types(self, given: tuple[str, ...]) -> Data:
        """Return the rows whose event type is one of those that are given or that the layout says, or empty."""
        types = given or self.known.event_types
        if EVENT_TYPE not in self.table.column_names:
            return self
        column = self.table[EVENT_TYPE]
        data = self.with_column(EVENT_TYPE, column if pa.types.is_null(column.type) else column.cast(TEXT))
        if not types or pa.types.is_null(column.type):
            return data
        column = data.table[EVENT_TYPE]
        untyped = pc.or_(pc.fill_null(pc.equal(column, ""), True), pc.is_in(column, pa.array(types, TEXT)))
        parts = tuple(part.chosen(untyped) for part in self.parts[:1])
        return replace(data, table=data.table.filter(untyped), parts=parts)
