"""Read files, folders and frames into one Arrow table, and say where each of its rows came from.

Rows of frames and Parquet files are counted from 0, lines of text files from 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from sasrec.data.column_types import TEXT, first_misfit, fits, plain, typed
from sasrec.data.formats import DataFileError, TimestampUnit
from sasrec.data.layouts import Layout, Request, find_columns
from sasrec.data.lines import Row, one_line, open_rows, reading, rows, stored_rows, text_of, unzipped

FOLDER_SUFFIXES = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Part:
    """One file of a table: its path, its rows and, for a text file, its layout."""

    path: Path
    count: int
    layout: Layout | None = None


@dataclass(frozen=True)
class Data:
    """The requested columns of a source, named USER_ID and so on.

    Args:
        name: the source's name in messages.
        parts: the files, in the order of their rows; a frame has none.
        labels: the source's own names of the columns, for messages.
        timestamp_unit: the unit of numeric timestamps; None: as the reader wants them.
        first_row: number of the first row, where this is a later batch of a file.
    """

    table: pa.Table
    name: str
    parts: tuple[Part, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    timestamp_unit: TimestampUnit | None = None
    first_row: int = 0

    def where(self, row: int) -> str:
        """Say where a row is: its line in a text file, else its number."""
        row += self.first_row
        for part in self.parts:
            if row < part.count:
                found = iter(()) if part.layout is None else stored_rows(part.path, part.layout)
                line, _ = next(islice(found, row, None), (None, ()))
                return f"{part.path}, row {row}" if line is None else f"{part.path}:{line}"
            row -= part.count
        return f"row {row}"

    def label(self, name: str) -> str:
        """Return what the source calls a column."""
        return self.labels.get(name, name)

    def error(self, row: int, problem: str) -> DataFileError:
        """Return an error that names the row."""
        return DataFileError(f"{self.where(row)}: {problem}")

    def refuse_nulls(self, name: str, remedy: str) -> None:
        """Raise DataFileError where a column has a null."""
        if self.table[name].null_count:
            row = pc.index(pc.is_null(self.table[name]), True).as_py()
            raise self.error(row, f"{self.label(name)} is null; {remedy}")

    def renamed(self, name: str, new: str) -> Data:
        """Return the data with a column under another name."""
        names = [new if column == name else column for column in self.table.column_names]
        return replace(self, table=self.table.rename_columns(names), labels={**self.labels, new: self.label(name)})

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


# --- frames


def read_frame(frame: Any, request: Request) -> Data:
    """Return the requested columns of a frame.

    Raises:
        DataFileError: a column is missing, or this is no frame.
    """
    where, name = "the frame", ""
    try:
        is_dict = isinstance(frame, Mapping)
        if not is_dict and not hasattr(frame, "__arrow_c_stream__"):
            raise TypeError(
                f"a path, a pandas, polars or pyarrow table or a dict is needed, not {type(frame).__name__}"
            )
        known = type(frame).__module__.partition(".")[0] in ("pandas", "polars") and hasattr(frame, "columns")
        source = frame if is_dict or known else _arrow_table(frame)
        given = list(frame if is_dict else frame.columns if known else source.column_names)
        places = find_columns(where, [str(column) for column in given], request)
        columns = {}
        for column, place in places.items():
            # column by column: Arrow need not understand the others, nor pandas' index, and it is ten times as fast
            name = str(given[place])
            columns[column] = pa.table({name: source[given[place]]})[name]
        name = ""
        labels = {column: str(given[place]) for column, place in places.items()}
        return Data(plain(pa.table(columns)), where, (), labels, request.columns.timestamp_unit)
    except DataFileError:
        raise
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataFileError(f"cannot read {name or where}: {one_line(error)}") from error


def _arrow_table(frame: Any) -> pa.Table:
    """Return any frame as an Arrow table; do not export Arrow's own: string views may crash releases before 25."""
    if isinstance(frame, pa.RecordBatchReader):
        return frame.read_all()
    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame])
    return frame if isinstance(frame, pa.Table) else pa.table(frame)


# --- files


def read_path(path: Path, request: Request) -> Data:
    """Return the requested columns of a file, or of the files in a folder.

    Raises:
        DataFileError: a file cannot be read, or lacks a column, or the files differ.
    """
    parts, tables = [], []
    labels: Mapping[str, str] = {}
    for file in data_files(path):
        layout, labels, table = _read_file(file, request)
        parts.append(Part(file, table.num_rows, layout))
        tables.append(table)
    first = parts[0]
    for part, table in zip(parts, tables, strict=True):
        if table.column_names != tables[0].column_names:
            both = f"{', '.join(table.column_names)}, but {', '.join(tables[0].column_names)} in {first.path}"
            raise DataFileError(f"{part.path} has the columns {both}; give all files the same")
        if part.layout and first.layout and part.layout.timestamp_unit != first.layout.timestamp_unit:
            both = f"{part.layout.format.name}, but {first.path} is {first.layout.format.name}"
            raise DataFileError(f"{part.path} is {both}; give all files the same format")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataFileError(f"the files in {path} do not fit together: {one_line(error)}") from error
    if first.layout is None:
        return Data(table, str(path), tuple(parts), labels, request.columns.timestamp_unit)
    if first.layout.format.shape != "objects":
        table = pa.table({name: typed(name, table[name]) for name in table.column_names})
    return Data(table, str(path), tuple(parts), labels, first.layout.timestamp_unit)


def data_files(path: Path) -> list[Path]:
    """Return the data files in a folder, sorted, without hidden ones; a path that is no folder stands for itself.

    Raises:
        DataFileError: the folder has no data files, or both CSV and Parquet files.
    """
    if not path.is_dir():
        return [path]

    def hidden(file: Path) -> bool:
        return any(part.startswith((".", "_")) for part in file.relative_to(path).parts)

    with reading(path):
        files = sorted(file for file in path.rglob("*") if file.is_file() and not hidden(file))
    found = [file for file in files if file.name.lower().endswith(FOLDER_SUFFIXES)]
    if not found:
        raise DataFileError(f"{path} has no data files; expected {', '.join(FOLDER_SUFFIXES)}")
    if len({file.suffix.lower() == ".parquet" for file in found}) > 1:
        raise DataFileError(f"{path} has both CSV and Parquet files; keep one kind")
    return found


def is_parquet(path: Path, raw: BufferedReader) -> bool:
    """Return whether an open file is Parquet, by its name or its first bytes; read none of them."""
    return path.suffix.lower() == ".parquet" or raw.peek(4)[:4] == b"PAR1"


def parquet_batches(path: Path, raw: BufferedReader, request: Request) -> Iterator[tuple[Data, float]]:
    """Yield the requested columns of a Parquet file batch by batch, and the share of its rows read after each."""
    with parquet.ParquetFile(raw) as file:
        sources = _parquet_names(path, file, request)
        unit, total, first_row = request.columns.timestamp_unit, file.metadata.num_rows, 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[*sources.values()]):
            table = _renamed(pa.Table.from_batches([batch]), sources)
            yield (
                Data(table, str(path), (Part(path, total),), sources, unit, first_row),
                (first_row + len(table)) / total,
            )
            first_row += len(table)


def _parquet_names(path: Path, file: parquet.ParquetFile, request: Request) -> dict[str, str]:
    """Return the file's own name of each requested column."""
    fields = file.schema_arrow.names
    return {name: fields[place] for name, place in find_columns(path, fields, request).items()}


def _renamed(table: pa.Table, sources: Mapping[str, str]) -> pa.Table:
    return plain(pa.table({name: table[source] for name, source in sources.items()}))


def _read_file(path: Path, request: Request) -> tuple[Layout | None, Mapping[str, str], pa.Table]:
    """Return a file's layout, its own names of the columns, and its table; text is not typed yet."""
    with reading(path):
        with path.open("rb") as raw:
            if is_parquet(path, raw):
                with parquet.ParquetFile(raw) as file:
                    sources = _parquet_names(path, file, request)
                    return None, sources, _renamed(file.read(columns=[*sources.values()]), sources)
            with text_of(path, raw) as text:
                layout, lines = open_rows(path, text, request)
                if not (layout.is_csv and layout.separator.isascii()):
                    return layout, layout.labels, _table_of(layout, rows(path, layout, lines, strict=True))
        return layout, layout.labels, _read_csv(path, layout)


def _table_of(layout: Layout, found: Iterable[Row]) -> pa.Table:
    """Return the rows of a text file that Arrow does not read as a table."""
    names, batches, texts = layout.request.names, [], set()
    found = iter(found)
    while batch := [values for _, values in islice(found, ROWS_AT_ONCE)]:
        columns = dict(zip(names, zip(*batch, strict=True), strict=True))
        texts |= {name for name in names if any(isinstance(value, str) for value in columns[name])}
        batches.append([pa.array([None if v is None else str(v) for v in columns[name]], TEXT) for name in names])
    table = pa.table({name: pa.chunked_array([b[at] for b in batches], TEXT) for at, name in enumerate(names)})
    if layout.format.shape != "objects":
        return table.select([*layout.sources])
    empty = {name for name in names if table[name].null_count == len(table)} - layout.request.needed
    columns = {name: table[name] if name in texts else typed(name, table[name]) for name in names if name not in empty}
    return pa.table(columns)  # JSON tells 5 from "5"


# --- CSV


def _read_csv(path: Path, layout: Layout) -> pa.Table:
    sources = layout.sources
    with path.open("rb") as raw, unzipped(path, raw) as content:
        quoted = any(b'"' in block for block in iter(lambda: content.read(1 << 20), b""))
    if quoted:
        _check_csv(path, layout)  # Arrow reads an open quote as an id that reaches to the end of the file
    kinds = dict.fromkeys(sources.values(), TEXT)
    try:
        with pa.input_stream(str(path), compression="gzip" if path.suffix.lower() == ".gz" else None) as stream:
            table = arrow_csv.read_csv(
                stream,
                read_options=arrow_csv.ReadOptions(skip_rows=layout.first_line - 1),
                parse_options=arrow_csv.ParseOptions(delimiter=layout.separator, newlines_in_values=quoted),
                convert_options=arrow_csv.ConvertOptions(include_columns=[*sources.values()], column_types=kinds),
            )
    except pa.ArrowInvalid:
        _check_csv(path, layout)
        raise
    return pa.table({name: table[source] for name, source in sources.items()})


def _check_csv(path: Path, layout: Layout) -> None:
    """Raise DataFileError that names the damaged line, where there is one."""
    for _ in stored_rows(path, layout):
        pass
