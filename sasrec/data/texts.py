"""Read text files as tables of text, batch by batch.

Arrow reads plain fields, Python the rest: quoted fields, objects, and every file that Arrow refuses, because Python
names the damaged line. Both give equal rows, so Python continues where Arrow stopped.
"""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as arrow_csv

from sasrec.data.column_types import TEXT
from sasrec.data.content import Content, opened, reading
from sasrec.data.formats import ITEM_ID, USER_ID, DataFileError
from sasrec.data.layouts import Layout, Request
from sasrec.data.lines import open_rows
from sasrec.data.objects import Row

ROWS_AT_ONCE = 1 << 14
SHOWN_CHARS = 60


class TextTable(NamedTuple):
    """Rows of a text file.

    Args:
        table: the requested columns that are there, as text.
        lines: the lines on which the rows begin; None: not known.
        strings: columns of ids that JSON has as strings.
        read_bytes: how much of the file was read, as it is on disk.
    """

    layout: Layout
    table: pa.Table
    lines: Sequence[int] | None
    strings: frozenset[str]
    read_bytes: int


class _QuoteFound(Exception):
    """Arrow must not read on: it takes an open quote for a field that reaches to the end of the file."""


class _Unquoted(io.RawIOBase):
    """Bytes for Arrow, up to the first block with a quote."""

    def __init__(self, stream: io.BufferedReader, stop: bytes) -> None:
        self._stream, self._stop = stream, stop

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        if self._stop and self._stop in block:
            raise _QuoteFound
        return block


def text_tables(path: Path, content: Content, request: Request) -> Iterator[TextTable]:
    """Yield the rows of an open file of text.

    Raises:
        DataFileError: the file is damaged or of unknown format. The rows before the damage were yielded.
    """
    layout, rows = open_rows(path, content, request)
    read, complete = 0, False
    for_arrow = layout.is_table and len(layout.separator) == 1 and layout.separator.isascii()
    if for_arrow and content.again and not layout.format.pairs:
        read, complete = yield from _arrow_tables(path, layout)
    if not complete:
        yield from _row_tables(path, layout, islice(rows, read, None), content)


def _arrow_tables(path: Path, layout: Layout) -> Generator[TextTable, None, tuple[int, bool]]:
    """Yield what Arrow reads; return how many rows that were, and whether these were all."""
    read, kinds = 0, {str(place): TEXT for place in layout.places}
    with opened(path) as content:
        source = pa.PythonFile(_Unquoted(content.stream, b'"' if layout.format.quoted else b""), "r")
        try:
            with arrow_csv.open_csv(
                source,
                arrow_csv.ReadOptions(
                    skip_rows=layout.first_row - 1, column_names=[str(at) for at in range(len(layout.fields))]
                ),
                arrow_csv.ParseOptions(delimiter=layout.separator, quote_char=False),
                arrow_csv.ConvertOptions(include_columns=[*kinds], column_types=kinds),
            ) as batches:
                for batch in batches:
                    columns = {
                        name: batch.column(str(at)) for name, at in zip(layout.names, layout.places, strict=True)
                    }
                    read += batch.num_rows
                    yield TextTable(layout, pa.table(columns), None, frozenset(), content.position)
        except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError, _QuoteFound):
            return read, False
    return read, True


def _row_tables(path: Path, layout: Layout, rows: Iterator[Row], content: Content) -> Iterator[TextTable]:
    """Yield what Python reads; where it finds damage, yield the rows before it first."""
    failure: DataFileError | None = None
    while failure is None:
        lines: list[int] = []
        values: list[tuple[Any, ...]] = []
        position = content.position
        try:
            with reading(path):
                for line, row in islice(rows, ROWS_AT_ONCE):
                    lines.append(line)
                    values.append(row)
                position = content.position
        except DataFileError as error:
            failure = error
        if not values and failure is None:
            return
        try:
            if values:
                yield _table_of(layout, lines, values, position)
        except UnicodeEncodeError:
            failure = _not_utf8(path, layout, lines, values)
            if failure.row:
                yield _table_of(layout, lines[: failure.row], values[: failure.row], position)
    raise failure


def _table_of(layout: Layout, lines: list[int], values: list[tuple[Any, ...]], position: int) -> TextTable:
    columns, strings = {}, set()
    for name, column in zip(layout.names, zip(*values, strict=True), strict=True):
        if not layout.is_table:
            if name in (USER_ID, ITEM_ID) and any(isinstance(value, str) for value in column):
                strings.add(name)
            column = tuple(None if value is None else str(value) for value in column)
        columns[name] = pa.array(column, TEXT)
    return TextTable(layout, pa.table(columns), lines, frozenset(strings), position)


def _not_utf8(path: Path, layout: Layout, lines: list[int], values: list[tuple[Any, ...]]) -> DataFileError:
    """Return the error of the first row with a value that is no UTF-8 text."""
    cells = (
        (at, name, str(value))
        for at, row in enumerate(values)
        for name, value in zip(layout.names, row, strict=True)
        if not _is_utf8(str(value))
    )
    at, name, text = next(cells)
    from_bytes = any("\udc80" <= char <= "\udcff" for char in text)
    what = "is not UTF-8 text; save the file as UTF-8" if from_bytes else "holds half of a surrogate pair"
    return DataFileError(f"{path}:{lines[at]}: {layout.labels[name]} {text[:SHOWN_CHARS]!r} {what}", at)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
