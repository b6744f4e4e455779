"""Read files, folders and frames batch by batch.

Streams of events and whole tables both read the batches of this module: one set of rules holds for both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from sasrec.data.column_types import TEXT, is_text, plain
from sasrec.data.content import Content, one_line, opened
from sasrec.data.folders import data_files
from sasrec.data.formats import EVENT_TYPE, ITEM_ID, USER_ID, DataFileError
from sasrec.data.layouts import Request, find_columns
from sasrec.data.presets import TABLE
from sasrec.data.recognition import choose
from sasrec.data.tables import Data, Part
from sasrec.data.texts import text_tables

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1 << 16
MISSING = pa.array(["NaN", "nan", "null", "NULL", "None", "\\N", "<NA>", "NaT"], TEXT)


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
        names = [str(column) for column in given]
        layout = choose(request.columns, "", names, where, TABLE)
        places = find_columns(where, names, request, layout)
        columns = {}
        for column, place in places.items():
            # column by column: Arrow need not understand the others, nor pandas' index, and it is ten times as fast
            name = str(given[place])
            columns[column] = pa.table({name: source[given[place]]})[name]
        name = ""
        labels = {column: str(given[place]) for column, place in places.items()}
        table = plain(pa.table(columns))
        data = Data(table, where, (Part(None, len(table)),), labels, layout, request.columns.timestamp_unit)
        return data.of_types(request.columns.event_types)
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
    found = [*batches(path, request)]
    if not found:
        raise DataFileError(f"{path} has no rows")
    table = pa.concat_tables([data.table for data in found], promote_options="permissive")
    parts = tuple(part for data in found for part in data.parts)
    strings = frozenset(name for data in found for name in data.strings)
    return replace(found[0], table=table, name=str(path), parts=parts, strings=strings).typed(ids=True)


def batches(path: Path, request: Request) -> Iterator[Data]:
    """Yield the rows of a file, or of the files in a folder in the order of their names, batch by batch.

    Raises:
        DataFileError: a file cannot be read, or lacks a column, or the files differ. The rows before were yielded.
    """
    first: Data | None = None
    warned = False
    for file in data_files(path):
        with opened(file) as content:
            for data in _parquet(file, content, request) if content.is_parquet else _text(file, content, request):
                if first is None and request.columns.event_types:
                    _warn_without_types(path, data)
                first = first or data
                _check_alike(path, first, data)
                data = data.of_types(request.columns.event_types)
                warned = warned or _warn_of_missing(data)
                yield data


def _warn_of_missing(data: Data) -> bool:
    """Warn of an id that many programs write for a missing one; return whether there is one."""
    for name in (USER_ID, ITEM_ID):
        if name in data.table.column_names and is_text(data.table[name].type):
            missing = pc.is_in(data.table[name], MISSING)
            if pc.any(missing).as_py():
                row = pc.index(missing, True).as_py()
                text = data.table[name][row].as_py()
                log.warning(
                    "%s: %s %r is read as an id; if it stands for a missing one, remove such rows",
                    data.where(row),
                    data.label(name),
                    text,
                )
                return True
    return False


def _warn_without_types(path: Path, data: Data) -> None:
    names = data.table.column_names
    if EVENT_TYPE not in names or data.table[EVENT_TYPE].null_count == len(data.table):
        log.warning(
            "%s has no column event_type: events of all types are read; name the column of types with "
            "--event-type-column or Columns(event_type=...) if there is one",
            path,
        )


def _check_alike(path: Path, first: Data, data: Data) -> None:
    """Raise DataFileError where a batch has other columns, another layout or other types than the first one."""
    here, there = data.table, first.table
    if here.column_names != there.column_names:
        both = f"{', '.join(here.column_names)}, but {', '.join(there.column_names)} in {first.name}"
        raise DataFileError(f"{data.name} has the columns {both}; give all files the same")
    if data.known is not first.known:
        both = f"{data.known.name}, but {first.name} is {first.known.name}"
        raise DataFileError(f"{data.name} is {both}; give all files the same format")
    try:
        pa.unify_schemas([there.schema, here.schema], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataFileError(f"the files in {path} do not fit together: {one_line(error)}") from error


def _parquet(path: Path, content: Content, request: Request) -> Iterator[Data]:
    with parquet.ParquetFile(content.raw) as file:
        names = file.schema_arrow.names
        known = choose(request.columns, "", names, path, TABLE)
        sources = {name: names[place] for name, place in find_columns(path, names, request, known).items()}
        size, total, first_row = path.stat().st_size, file.metadata.num_rows, 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[*dict.fromkeys(sources.values())]):
            table = plain(pa.table({name: batch.column(source) for name, source in sources.items()}))
            part = Part(path, len(table), first_row)
            first_row += len(table)
            share = int(size * first_row / total)
            yield Data(table, str(path), (part,), sources, known, request.columns.timestamp_unit, read_bytes=share)


def _text(path: Path, content: Content, request: Request) -> Iterator[Data]:
    first_row = 0
    for batch in text_tables(path, content, request):
        table, layout = batch.table, batch.layout
        part = Part(path, len(table), first_row, None, batch.lines, request)
        first_row += len(table)
        yield Data(
            table,
            str(path),
            (part,),
            layout.labels,
            layout.format,
            request.columns.timestamp_unit,
            True,
            not layout.is_table,
            batch.strings,
            batch.read_bytes,
        )
