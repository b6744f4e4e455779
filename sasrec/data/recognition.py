"""Recognise the layout of a text file by its first line, or by the keys of its first object."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sasrec.data.formats import TIME_OFFSET, Columns, DataFileError, Format, plain_name
from sasrec.data.layouts import ANY_CASE, OPTIONS, Layout, Request, find_columns, matches, wanted_names
from sasrec.data.presets import OBJECTS, PRESETS, TABLE, fits, layouts_of, suggestion

SEPARATORS = ",\t;|"
SHOWN_CHARS = 60


def choose(columns: Columns, line: str, names: Sequence[str], where: object, default: Format) -> Format:
    """Return the layout of the preset that a caller named, else the default.

    Raises:
        DataFileError: the source has none of the preset's layouts.
    """
    if columns.format is None:
        return default
    found = next((known for _, known in layouts_of(columns.format) if fits(known, line, names)), None)
    if found is None:
        published = ", ".join(known.name for known in PRESETS[columns.format])
        shown = repr(line.strip()[:SHOWN_CHARS]) if line else ", ".join(map(repr, names))
        raise DataFileError(
            f"{where}: {shown} is no layout of {columns.format} ({published}); give another --format, or none and the "
            "names of the columns"
        )
    return found


def recognise(path: Path, number: int, line: str, request: Request) -> Layout:
    """Return the layout of a text file of fields, given its first line that is not blank and that line's number.

    Raises:
        DataFileError: the format is not known, or a needed column is missing.
    """
    where, columns = f"{path}:{number}", request.columns
    headers = [(separator, _split(line, separator)) for separator in _separators(path, line, columns)]
    if not columns.has_header:
        separator, fields = headers[0]
        names = columns.fields or tuple(str(at) for at in range(1, len(fields) + 1))
        if len(names) != len(fields):
            raise DataFileError(
                f"{where}: {len(fields)} fields between {separator!r}, but {len(names)} names; correct --fields or "
                "--separator"
            )
        return _table_layout(where, TABLE, "bare", separator, names, request, number, line)
    for _, known in layouts_of(columns.format):
        if known.literals or not (columns.format or _is_automatic(known, path)):
            continue
        for separator, fields in headers:
            if known.separator in (None, separator) and fits(known, line, fields):
                shape: Literal["bare", "header"] = "bare" if known.fields else "header"
                return _table_layout(where, known, shape, separator, known.fields or fields, request, number, line)

    def found(header: tuple[str, list[str]]) -> int:
        return sum(bool(matches(name, header[1], columns, {}, plain_name)) for name in request.needed)

    separator, fields = max(headers, key=found)  # the first of the best
    choose(columns, line, fields, where, TABLE)
    if not found((separator, fields)) and not any(map(columns.given, OPTIONS)) and columns.separator is None:
        wanted = " and ".join(name for name in request.names if name in request.needed)
        hint = next(filter(None, (suggestion(line, names) for _, names in headers)), "")
        raise DataFileError(
            f"{where}: no known format in {line.strip()[:SHOWN_CHARS]!r}; expected a header with {wanted} (CSV, TSV), "
            f"JSON or Parquet; if the first line is no header, give --no-header, and the columns by number{hint}"
        )
    return _table_layout(where, TABLE, "header", separator, fields, request, number, line)


def _is_automatic(known: Format, path: Path) -> bool:
    name = re.sub(r"\.(gz|zst|zip|bz2|xz)$", "", path.name.lower())
    return bool(known.automatic and re.fullmatch(known.automatic, name))


def _separators(path: Path, line: str, columns: Columns) -> list[str]:
    """Return the separators that a line may have, the likeliest first."""
    if columns.separator is not None:
        return [columns.separator]
    by_name = "\t" if ".tsv" in path.name.lower() else "," if ".csv" in path.name.lower() else ""
    likely = sorted(SEPARATORS, key=lambda separator: (separator != by_name, -line.count(separator)))
    if by_name and by_name not in line:  # "events.csv" with semicolons
        likely = [*likely[1:], likely[0]]
    return [*likely, "::"]


def _split(line: str, separator: str) -> list[str]:
    """Return the fields of a header."""
    line = line.rstrip("\r\n")
    if len(separator) != 1:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # a field beyond csv's limit: no header
        return line.split(separator)


def _table_layout(
    where: str,
    known: Format,
    shape: Literal["bare", "header"],
    separator: str,
    fields: Sequence[str],
    request: Request,
    number: int,
    line: str,
) -> Layout:
    """Return the layout of a file of fields, whose columns have these names."""
    places = find_columns(where, fields, request, known, plain_name, line)
    first_row = number if shape == "bare" else number + 1
    names, indices = tuple(places), tuple(places.values())
    return Layout(known, shape, separator, tuple(fields), request, names, indices, (), number, first_row)


def object_layout(
    where: str, shape: Literal["lines", "array"], keys: Sequence[str], line: str, request: Request, number: int
) -> Layout:
    """Return the layout of a file of objects, given the keys of the first one; names not among them may come later.

    Raises:
        DataFileError: a preset was named that this is not.
    """
    known = choose(request.columns, line, keys, where, OBJECTS)
    names = wanted_names(request, known)
    by_lower = {key.lower(): key for key in reversed(keys)}

    def path(name: str) -> str:
        given = request.columns.given(name)
        default = known.names.get(name, name.lower() if name in ANY_CASE else name)
        return given or (by_lower.get(default, default) if name in (*ANY_CASE, TIME_OFFSET) else name)

    paths = tuple(map(path, names))
    return Layout(known, shape, "", (), request, names, (), paths, number, number)
