"""Read text files row by row, plain or .gz: recognise the format, then yield the requested values of each row."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from sasrec.data.formats import ITEM_ID, USER_ID, DataFileError
from sasrec.data.layouts import ANY_CASE, Layout, Request, missing, recognise

HEADER_LINES = 10  # a quoted name in a header may contain line breaks, but a stray quote must not read the whole file
ABSENT = object()
Row = tuple[int, tuple[Any, ...]]  # the line on which the row begins; its requested values, None where absent


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every error of reading a file into a DataFileError that names the file."""
    try:
        yield
    except DataFileError:
        raise
    except (OSError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataFileError(f"cannot read {path}: {reason}") from error
    except zlib.error as error:
        raise DataFileError(f"{path} is damaged: {error}") from error
    except UnicodeError as error:
        raise DataFileError(f"{path} is not UTF-8 text: {error}") from error
    except EOFError as error:
        raise DataFileError(f"{path} is cut short: {error}") from error


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


def unzipped(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """Return what an open file contains: of a .gz file, the unzipped bytes."""
    return gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw  # type: ignore[return-value]


def text_of(path: Path, raw: IO[bytes]) -> io.TextIOWrapper:
    """Return the content of an open file as UTF-8 text; closing the text closes the file."""
    return io.TextIOWrapper(unzipped(path, raw), encoding="utf-8-sig", newline="")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a text file, plain or .gz."""
    with reading(path), path.open("rb") as raw, text_of(path, raw) as text:
        yield text


def open_rows(path: Path, text: Iterator[str], request: Request) -> tuple[Layout, Iterator[str]]:
    """Recognise a text file's format; return its layout and the lines from its first row on.

    Raises:
        DataFileError: the file is empty, of unknown format, or lacks a column.
    """
    number, first = next(((n, line) for n, line in enumerate(text, start=1) if line.strip()), (0, ""))
    if not first:
        needed = ", ".join(name for name in request.names if name in request.needed)
        raise DataFileError(f"{path} is empty; expected a header with {needed}")
    behind: list[str] = []
    while (first + "".join(behind)).count('"') % 2 and len(behind) < HEADER_LINES:
        behind.append(next(text, ""))
    header = first + "".join(behind)
    if behind and header.count('"') % 2 == 0:
        with contextlib.suppress(DataFileError):
            layout = recognise(path, number, header, request)
            if layout.is_csv:
                return replace(layout, first_row=number + len(behind) + 1), text
    layout = recognise(path, number, first, request)
    unread = behind if layout.format.shape == "header" else [first, *behind]
    return layout, chain(filter(None, unread), text)


def rows(path: Path, layout: Layout, lines: Iterable[str], strict: bool = False) -> Iterator[Row]:
    """Yield the requested values of each row; blank lines are skipped.

    Args:
        lines: the lines from ``layout.first_row`` on.
        strict: refuse CSV with an open quote or with text behind a quoted field.

    Raises:
        DataFileError: a row is damaged; the message names its line.
    """
    if layout.format.shape == "objects":
        return _object_rows(path, layout, lines)
    return _csv_rows(path, layout, lines, strict) if layout.is_csv else _split_rows(path, layout, lines)


def stored_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """Yield the rows of a file of known layout, as strictly as tables are read."""
    with open_text(path) as text:
        yield from rows(path, layout, islice(text, layout.first_row - 1, None), strict=True)


def _csv_rows(path: Path, layout: Layout, lines: Iterable[str], strict: bool) -> Iterator[Row]:
    width, get = len(layout.fields), layout.getter()
    reader = csv.reader(lines, delimiter=layout.separator, strict=strict)
    line = layout.first_row  # where the row begins: quoted fields may span lines
    try:
        for row in reader:
            if row:
                if len(row) != width:
                    raise DataFileError(f"{path}:{line}: {width} columns expected, got {len(row)}")
                yield line, get([*row, None])
            line = layout.first_row + reader.line_num
    except csv.Error as error:
        raise DataFileError(f"{path}:{line}: {error}") from error


def _split_rows(path: Path, layout: Layout, lines: Iterable[str]) -> Iterator[Row]:
    width, get = len(layout.fields), layout.getter()
    for line, text in enumerate(lines, start=layout.first_row):
        fields: list[str | None] = [*text.rstrip("\r\n").split(layout.separator)]
        if len(fields) != width:
            if not text.strip():
                continue
            raise DataFileError(
                f"{path}:{line}: {width} fields between {layout.separator!r} expected, got {len(fields)}"
            )
        fields.append(None)
        yield line, get(fields)


def _object_rows(path: Path, layout: Layout, lines: Iterable[str]) -> Iterator[Row]:
    names, columns, labels = layout.request.names, layout.request.columns, layout.labels
    keys = [(labels[name], name if name in ANY_CASE and not columns.given(name) else None) for name in names]
    ids = [(at, labels[name]) for at, name in enumerate(names) if name in (USER_ID, ITEM_ID)]
    unseen = [name for name in names if columns.given(name)]
    for line, text in enumerate(lines, start=layout.first_row):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataFileError(f"{path}:{line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataFileError(f"{path}:{line}: a JSON object is expected, not {type(row).__name__}")
        for name in unseen:
            if labels[name] not in row:
                raise missing(f"{path}:{line}", name, columns, row)
        unseen = []  # later objects may lack what is optional
        values = [_value(row, key, any_case) for key, any_case in keys]
        for at, label in ids:
            _check_id(path, line, label, values[at])
        yield line, tuple(None if value is ABSENT else value for value in values)


def _value(row: dict[str, Any], key: str, any_case: str | None) -> Any:
    value = row.get(key, ABSENT)
    if value is ABSENT and any_case is not None:
        return next((row[name] for name in row if name.upper() == any_case), ABSENT)
    return value


def _check_id(path: Path, line: int, label: str, value: object) -> None:
    if value is ABSENT:
        return  # reported as an empty id
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataFileError(f"{path}:{line}: {label} must be a string or an integer, not {value!r}")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise DataFileError(f"{path}:{line}: {label} holds half of a surrogate pair: {value!r}") from None
