"""Read text row by row: recognise the format, then yield the requested values of each row."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from sasrec.data.content import BOM, Content, opened
from sasrec.data.formats import EVENT_TYPE, ITEM_ID, DataFileError
from sasrec.data.layouts import Layout, Request
from sasrec.data.objects import Row, object_rows, open_array, open_objects
from sasrec.data.recognition import recognise

HEADER_LINES = 10  # a quoted name in a header may contain line breaks, but a stray quote must not read the whole file
PEEK_BYTES = 4096
PIECE_CHARS = 1 << 16


def open_rows(path: Path, content: Content, request: Request) -> tuple[Layout, Iterator[Row]]:
    """Recognise the format of text; return its layout and its rows.

    Raises:
        DataFileError: the file is empty, of unknown format, or lacks a column; a row is damaged.
    """
    text = content.text
    if _is_array(content.stream):
        layout, objects = open_array(path, iter(lambda: text.read(PIECE_CHARS), ""), request)
        return layout, object_rows(path, layout, objects)
    number, first = next(((n, line) for n, line in enumerate(text, start=1) if line.strip()), (0, ""))
    if not first:
        needed = ", ".join(name for name in request.names if name in request.needed)
        raise DataFileError(f"{path} is empty; expected a header with {needed}")
    if first.lstrip().startswith("{"):
        layout, objects = open_objects(path, number, first, text, request)
        return layout, object_rows(path, layout, objects)
    layout, lines = _open_table(path, number, first, text, request)
    return layout, _csv_rows(path, layout, lines) if layout.is_csv else _split_rows(path, layout, lines)


def stored_rows(path: Path, request: Request) -> Iterator[Row]:
    """Yield the rows of a file."""
    with opened(path) as content:
        yield from open_rows(path, content, request)[1]


def _is_array(stream: io.BufferedReader) -> bool:
    """Return whether text begins like a JSON array of objects."""
    head = stream.peek(PEEK_BYTES).removeprefix(BOM).lstrip()
    return head[:1] == b"[" and head[1:].lstrip()[:1] in (b"{", b"]", b"")


def _open_table(
    path: Path, number: int, first: str, text: Iterator[str], request: Request
) -> tuple[Layout, Iterator[str]]:
    """Return the layout of a file of fields, and its lines from its first row on."""
    behind: list[str] = []
    while (first + "".join(behind)).count('"') % 2 and len(behind) < HEADER_LINES:
        behind.append(next(text, ""))
    header = first + "".join(behind)
    if behind and header.count('"') % 2 == 0:
        with contextlib.suppress(DataFileError):
            layout = recognise(path, number, header, request)
            if layout.is_csv and layout.shape == "header":
                return replace(layout, first_row=number + len(behind) + 1), text
    layout = recognise(path, number, first, request)
    unread = behind if layout.shape == "header" else [first, *behind]
    return layout, chain(filter(None, unread), text)


def _csv_rows(path: Path, layout: Layout, lines: Iterable[str]) -> Iterator[Row]:
    width, get = len(layout.fields), layout.getter()
    reader = csv.reader(lines, delimiter=layout.separator, strict=True)
    line = layout.first_row  # where the row begins: quoted fields may span lines
    try:
        for row in reader:
            if row:
                if len(row) != width:
                    raise DataFileError(
                        f"{path}:{line}: {width} columns expected, got {len(row)}; correct the row, or --separator"
                    )
                yield line, get(row)
            line = layout.first_row + reader.line_num
    except csv.Error as error:
        raise DataFileError(f"{path}:{line}: {error}; correct the quotes of the row") from error


def _split_rows(path: Path, layout: Layout, lines: Iterable[str]) -> Iterator[Row]:
    width, get, pairs = len(layout.fields), layout.getter(), layout.format.pairs
    for line, text in enumerate(lines, start=layout.first_row):
        fields = text.rstrip("\r\n").split(layout.separator)
        if len(fields) != width:
            if not text.strip():
                continue
            raise DataFileError(
                f"{path}:{line}: {width} fields between {layout.separator!r} expected, got {len(fields)}; correct the "
                "row, or --separator"
            )
        if pairs:
            yield from _pairs(line, layout, get(fields))
        else:
            yield line, get(fields)


def _pairs(line: int, layout: Layout, values: tuple[str, ...]) -> Iterator[Row]:
    """Yield one row for each pair of item and type in the field that both are in: ``N1-0 N2-1``."""
    for pair in values[layout.names.index(ITEM_ID)].split():
        item, _, kind = pair.rpartition("-")
        pair_of = {ITEM_ID: item, EVENT_TYPE: kind}
        yield line, tuple(pair_of.get(name, value) for name, value in zip(layout.names, values, strict=True))
