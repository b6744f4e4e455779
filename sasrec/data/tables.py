"""CSV, Parquet and frames -> one Arrow table, and where each of its rows came from.

Rows of frames and Parquet files are counted from 0, lines of CSV files from 1.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from sasrec.data.readers import DataFileError

USER_ID, ITEM_ID, OUTCOME, TIMESTAMP = "USER_ID", "ITEM_ID", "OUTCOME", "TIMESTAMP"
TEXT = pa.large_string()
CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


@dataclass(frozen=True)
class Data:
    """The columns that are wanted of a source, and what they are called in errors."""

    table: pa.Table
    name: str
    files: tuple[tuple[Path, int], ...] = ()  # with their rows; a frame has none

    def where(self, row: int) -> str:
        """Where a row stands: its line in a CSV file, else its number."""
        for path, count in self.files:
            if row < count:
                lines = _csv_rows(path) if _is_csv(path) else iter(())
                line, _ = next(islice(lines, row + 1, None), (None, []))
                return f"{path}, row {row}" if line is None else f"{path}:{line}"
            row -= count
        return f"row {row}"

    def error(self, row: int, problem: str) -> DataFileError:
        """An error that names the row."""
        return DataFileError(f"{self.where(row)}: {problem}")

    def refuse_nulls(self, name: str, remedy: str) -> None:
        """Raises DataFileError where a column has a null."""
        if self.table[name].null_count:
            raise self.error(pc.index(pc.is_null(self.table[name]), True).as_py(), f"{name} is null; {remedy}")

    def refuse_type(self, name: str, remedy: str) -> DataFileError:
        """An error that names the type of a column."""
        return DataFileError(f"{self.name}: {name} has type {self.table[name].type}; {remedy}")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column is of strings, whichever of Arrow's."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def as_integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as int64 where no digit is lost by it ("007" is not 7), else the same object."""
    try:
        whole = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column
    return whole if whole.cast(column.type).equals(column) else column


def fits(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether a whole column can be cast."""
    try:
        column.cast(kind)
    except pa.ArrowException:
        return False
    return True


def first_misfit(column: pa.ChunkedArray, kind: pa.DataType) -> int:
    """The first row that cannot be cast; the length where all can."""
    return bisect_left(range(len(column)), True, key=lambda row: not fits(column.slice(0, row + 1), kind))


def cast(data: Data, name: str, column: pa.ChunkedArray, kind: pa.DataType, problem: str) -> pa.ChunkedArray:
    """Cast a column, or raise DataFileError that names the first row that cannot be."""
    if not fits(column, kind):
        row = first_misfit(column, kind)
        raise data.error(row, f"{name} {column[row].as_py()!r} {problem}")
    return column.cast(kind)


# --- sources


def _present(where: object, columns: Iterable[object], names: Iterable[str], needed: Collection[str]) -> list[str]:
    there = [str(column) for column in columns]
    present = []
    for name in names:
        if there.count(name) > 1:
            raise DataFileError(f"{where}: column {name} is there {there.count(name)} times; keep one of them")
        if name in there:
            present.append(name)
        elif name in needed:
            raise DataFileError(f"{where}: column {name} is missing; the columns are {', '.join(map(repr, there))}")
    return present


def frame_table(frame: Any, names: list[str], needed: Collection[str]) -> pa.Table:
    """The wanted columns of a frame; raises DataFileError where one is missing or the frame is none."""
    where, name = "the frame", ""
    try:
        is_dict = isinstance(frame, Mapping)
        if not is_dict and not hasattr(frame, "__arrow_c_stream__"):
            raise TypeError(
                f"a path, a pandas, polars or pyarrow table or a dict is needed, not {type(frame).__name__}"
            )
        known = type(frame).__module__.partition(".")[0] in ("pandas", "polars") and hasattr(frame, "columns")
        if is_dict or known:
            # column by column: Arrow need not understand the others, nor pandas' index, and it is ten times as fast
            columns = {}
            for name in _present(where, frame if is_dict else frame.columns, names, needed):
                columns[name] = pa.table({name: frame[name]})[name]
            name = ""
            return _plain(pa.table(columns))
        table = pa.table(frame)
        return _plain(table.select(_present(where, table.column_names, names, needed)))
    except DataFileError:
        raise
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataFileError(f"cannot read {name or where}: {one_line(error)}") from error


def _plain(table: pa.Table) -> pa.Table:
    """Categories and the kinds of string as one kind of string."""
    for at, name in enumerate(table.column_names):
        column = table[name]
        if pa.types.is_dictionary(column.type):
            kind = TEXT if is_text(column.type.value_type) else column.type.value_type
            chunks = [pc.take(chunk.dictionary.cast(kind), chunk.indices) for chunk in column.chunks]
            table = table.set_column(at, name, pa.chunked_array(chunks, kind))
        elif is_text(column.type):
            table = table.set_column(at, name, column.cast(TEXT))
    return table


def read_path(path: Path, names: list[str], needed: Collection[str]) -> Data:
    """The wanted columns of a file or of the files in a folder; raises DataFileError."""
    try:
        files = _folder_files(path) if path.is_dir() else [path]
        tables = [_read_file(file, names, needed) for file in files]
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}") from error
    for file, table in zip(files, tables, strict=True):
        if table.column_names != tables[0].column_names:
            both = f"{', '.join(table.column_names)}, but {', '.join(tables[0].column_names)} in {files[0]}"
            raise DataFileError(f"{file} has the columns {both}; give all files the same")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataFileError(f"the files in {path} do not fit together: {one_line(error)}") from error
    if _is_csv(files[0]):
        table = pa.table({name: _typed(name, table[name]) for name in table.column_names})
    return Data(table, str(path), tuple((file, part.num_rows) for file, part in zip(files, tables, strict=True)))


def _folder_files(folder: Path) -> list[Path]:
    def hidden(path: Path) -> bool:
        return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)

    files = sorted(path for path in folder.rglob("*") if path.is_file() and not hidden(path))
    found = [path for path in files if _is_csv(path) or path.suffix.lower() == ".parquet"]
    if not found:
        raise DataFileError(f"{folder} has no data files; expected .parquet, {', '.join(CSV_SUFFIXES)}")
    if len({_is_csv(path) for path in found}) > 1:
        raise DataFileError(f"{folder} has both CSV and Parquet files; keep one kind")
    return found


def _read_file(path: Path, names: list[str], needed: Collection[str]) -> pa.Table:
    if not _is_csv(path) and path.suffix.lower() != ".parquet" and path.exists():
        raise DataFileError(f"{path} is of no known kind; expected .parquet, {', '.join(CSV_SUFFIXES)}")
    try:
        if _is_csv(path):
            return _read_csv(path, names, needed)
        with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            return _plain(file.read(columns=_present(path, file.schema_arrow.names, names, needed)))
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataFileError(f"cannot read {path}: {reason}") from error


# --- CSV


def _is_csv(path: Path) -> bool:
    return path.name.lower().endswith(CSV_SUFFIXES)


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in path.name.lower() else ","


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line on which a row begins and its fields, the header first, blank lines left out."""
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=_delimiter(path), strict=True)
        line = 1
        try:
            for row in reader:
                if row:
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataFileError(f"{path}:{line}: {error}") from error
        except UnicodeDecodeError as error:
            raise DataFileError(f"{path} is not UTF-8 text: {error}") from error


def _read_csv(path: Path, names: list[str], needed: Collection[str]) -> pa.Table:
    line, header = next(_csv_rows(path), (0, []))
    if not line:
        raise DataFileError(f"{path} is empty; expected a header with {', '.join(names)}")
    present = _present(path, header, names, needed)
    with _open(path) as raw:
        quoted = any(b'"' in block for block in iter(lambda: raw.read(1 << 20), b""))
    if quoted:
        _check_csv(path, len(header))  # Arrow takes a quote left open for an id that reaches to the end of the file
    gzipped = path.suffix.lower() == ".gz"
    try:
        with pa.input_stream(str(path), compression="gzip" if gzipped else None) as stream:
            return arrow_csv.read_csv(
                stream,
                parse_options=arrow_csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=quoted),
                convert_options=arrow_csv.ConvertOptions(
                    include_columns=present, column_types=dict.fromkeys(present, TEXT)
                ),
            )
    except pa.ArrowInvalid:
        _check_csv(path, len(header))
        raise


def _check_csv(path: Path, width: int) -> None:
    for line, row in _csv_rows(path):
        if len(row) != width:
            raise DataFileError(f"{path}:{line}: {width} columns expected, got {len(row)}")


def _typed(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """What a typed file would hold. Done on all files together: one "x7" makes every id of a folder text."""
    if name not in (USER_ID, ITEM_ID):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, TEXT), column)
    column = as_integers(column)
    kinds = (pa.float64(), pa.bool_()) if name == OUTCOME and is_text(column.type) else ()
    return next((column.cast(kind) for kind in kinds if fits(column, kind)), column)


def one_line(error: Exception) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())
