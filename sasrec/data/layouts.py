"""Find the wanted columns: in a header, in the keys of JSON objects or among the columns of a frame."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from sasrec.data.formats import (
    CSV,
    DEFAULT_COLUMNS,
    FORMATS,
    ITEM_ID,
    OUTCOME,
    RATING,
    TIMESTAMP,
    USER_ID,
    Columns,
    DataFileError,
    Format,
    TimestampUnit,
    plain_name,
)

OPTIONS = {USER_ID: "user", ITEM_ID: "item", OUTCOME: "outcome", TIMESTAMP: "timestamp"}
ANY_CASE = (*OPTIONS, RATING)
SEPARATORS = ",\t;"


@dataclass(frozen=True)
class Request:
    """Say what to read from a source.

    Args:
        names: the wanted columns: USER_ID, ITEM_ID, OUTCOME, TIMESTAMP, RATING or a column's own name.
        needed: those of them that must be there. Columns that ``columns`` names must be there, too.
    """

    names: tuple[str, ...]
    needed: frozenset[str]
    columns: Columns = DEFAULT_COLUMNS


@dataclass(frozen=True)
class Layout:
    """Say where the requested columns of one text file are.

    Args:
        fields: the names of the file's columns as it spells them; empty for JSON lines.
        places: index into fields of each requested column; None: not there, or JSON lines.
        first_line: number of the first line that is not blank.
        first_row: number of the line on which the first row begins.
    """

    format: Format
    separator: str
    fields: tuple[str, ...]
    request: Request
    places: tuple[int | None, ...]
    first_line: int
    first_row: int

    @property
    def timestamp_unit(self) -> TimestampUnit:
        """The unit of numeric timestamps."""
        return self.request.columns.timestamp_unit or self.format.timestamp_unit

    @property
    def is_csv(self) -> bool:
        """Whether the file has a header, and quotes around fields that need them."""
        return self.format.shape == "header" and len(self.separator) == 1

    @property
    def sources(self) -> dict[str, str]:
        """The header's fields of the requested columns that are there."""
        places = zip(self.request.names, self.places, strict=True)
        return {name: self.fields[place] for name, place in places if place is not None}

    @property
    def labels(self) -> dict[str, str]:
        """The file's own names of the requested columns, for messages."""
        labels = {}
        for name in self.request.names:
            default = name.lower() if name in ANY_CASE else name
            field = self.sources.get(name)
            labels[name] = self.request.columns.given(name) or (default if field is None else plain_name(field))
        return labels

    def getter(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Return a function that picks the requested values from a row's fields with one None behind them."""
        places = [len(self.fields) if place is None else place for place in self.places]
        if len(places) == 1:
            return lambda row: (row[places[0]],)
        return itemgetter(*places)


def find_columns(
    where: object,
    fields: Sequence[str],
    request: Request,
    names: Mapping[str, str] | None = None,
    plain: Callable[[str], str] = str,
) -> dict[str, int]:
    """Return the index into ``fields`` of each requested column that is there.

    Args:
        where: file and line, or the frame, for messages.
        names: names of columns that are not the default, in lower case.
        plain: removes what surrounds a name in a field.

    Raises:
        DataFileError: a needed column is missing, or a column is there twice.
    """
    places = {}
    for name in request.names:
        found = _matches(name, fields, request.columns, names or {}, plain)
        if len(found) > 1:
            raise DataFileError(f"{where}: column {name} is there {len(found)} times; keep one of them")
        if found:
            places[name] = found[0]
        elif name in request.needed or request.columns.given(name):
            raise missing(where, name, request.columns, map(plain, fields))
    return places


def missing(where: object, name: str, columns: Columns, there: Iterable[str]) -> DataFileError:
    """Return an error that names a missing column, the columns that are there and the option that helps."""
    given, option, remedy = columns.given(name), OPTIONS.get(name), ""
    if option is not None:
        option = f"--{option}-column or Columns({option}=...)"
        remedy = f"; correct {option}" if given else f"; if one of them is meant, name it with {option}"
    listed = ", ".join(map(repr, there))
    return DataFileError(f"{where}: column {given or name} is missing; the columns are {listed}{remedy}")


def recognise(path: Path, number: int, line: str, request: Request) -> Layout:
    """Return the layout of a text file, given its first line that is not blank and the number of that line.

    Raises:
        DataFileError: the format is not known, or a needed column is missing.
    """
    where, columns = f"{path}:{number}", request.columns
    headers = [(separator, _split(line, separator)) for separator in _separators(path, line, columns)]
    for known in FORMATS:
        for separator, fields in headers:
            fits = separator == known.separator if known.separator is not None else separator
            if fits and known.recognised(line.strip(), fields):
                return _layout(where, known, separator, fields, request, number)

    def found(header: tuple[str, list[str]]) -> int:
        return sum(bool(_matches(name, header[1], columns, {}, plain_name)) for name in request.needed)

    separator, fields = max((header for header in headers if header[0]), key=found)  # the first of the best
    if not found((separator, fields)) and columns == Columns(timestamp_unit=columns.timestamp_unit):
        wanted = " and ".join(name for name in request.names if name in request.needed)
        others = ", ".join(known.name for known in FORMATS if known is not CSV)
        raise DataFileError(
            f"{where}: no known format in {line.strip()[:60]!r}; expected a header with {wanted} (CSV, TSV), {others} "
            "or Parquet"
        )
    return _layout(where, CSV, separator, fields, request, number)


def _separators(path: Path, line: str, columns: Columns) -> list[str]:
    """Return the separators that a line may have, the likeliest first; an empty one stands for none."""
    if columns.separator is not None:
        return [columns.separator]
    by_name = "\t" if ".tsv" in path.name.lower() else "," if ".csv" in path.name.lower() else ""
    likely = sorted(SEPARATORS, key=lambda separator: (separator != by_name, -line.count(separator)))
    return ["", *likely, *(known.separator for known in FORMATS if known.separator and len(known.separator) > 1)]


def _split(line: str, separator: str) -> list[str]:
    """Return the fields of a header."""
    line = line.rstrip("\r\n")
    if len(separator) != 1:
        return line.split(separator) if separator else []
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # a field beyond csv's limit: no header
        return line.split(separator)


def _layout(where: str, known: Format, separator: str, fields: Sequence[str], request: Request, number: int) -> Layout:
    if known.shape == "objects":
        return Layout(known, separator, (), request, (None,) * len(request.names), number, number)
    fields = known.fields or tuple(fields)
    places = find_columns(where, fields, request, known.names, plain_name)
    first_row = number if known.shape == "bare" else number + 1
    return Layout(known, separator, fields, request, tuple(map(places.get, request.names)), number, first_row)


def _matches(
    name: str, fields: Sequence[str], columns: Columns, names: Mapping[str, str], plain: Callable[[str], str]
) -> list[int]:
    """Return the fields that bear a name: as it is, else without what surrounds it, else in any case."""
    given = columns.given(name)
    spelled = given or name
    found = [at for at, field in enumerate(fields) if field == spelled]
    found = found or [at for at, field in enumerate(fields) if plain(field) == spelled]
    if found or given is not None or name not in ANY_CASE:
        return found
    default = names.get(name, name.lower())
    return [at for at, field in enumerate(fields) if plain(field).lower() == default]
