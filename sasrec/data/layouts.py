"""Find the wanted columns: in a header, in the keys of JSON objects or among the columns of a frame."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from sasrec.data.formats import (
    DEFAULT_COLUMNS,
    EVENT_TYPE,
    ITEM_ID,
    OUTCOME,
    RATING,
    TIME_OFFSET,
    TIMESTAMP,
    USER_ID,
    Columns,
    DataFileError,
    Format,
    plain_name,
)
from sasrec.data.presets import TABLE, suggestion

OPTIONS = {
    USER_ID: ("--user-column", "user"),
    ITEM_ID: ("--item-column", "item"),
    OUTCOME: ("--outcome-column", "outcome"),
    TIMESTAMP: ("--timestamp-column", "timestamp"),
    EVENT_TYPE: ("--event-type-column", "event_type"),
}
ANY_CASE = (*OPTIONS, RATING)


@dataclass(frozen=True)
class Request:
    """Say what to read from a source.

    Args:
        names: the wanted columns: USER_ID, ITEM_ID, OUTCOME, TIMESTAMP, EVENT_TYPE, RATING or a column's own name.
        needed: those of them that must be there. Columns that ``columns`` names must be there, too.
    """

    names: tuple[str, ...]
    needed: frozenset[str]
    columns: Columns = DEFAULT_COLUMNS

    @classmethod
    def of(cls, names: Iterable[str], needed: Iterable[str], columns: Columns) -> Request:
        """Return a request: with event types where these decide, without times where the rows are in their order."""
        without = {TIMESTAMP} if columns.in_file_order else set()
        more = (EVENT_TYPE,) if columns.event_types or columns.event_type or columns.format else ()
        wanted = dict.fromkeys(name for name in (*names, *more) if name not in without)
        return cls(tuple(wanted), frozenset(needed) - without, columns)


@dataclass(frozen=True)
class Layout:
    """Say where the requested columns of one text file are.

    Args:
        shape: "header": the first line names the columns; "bare": no header; "lines": a JSON object, or a Python dict,
            on each line; "array": one JSON array of objects.
        fields: the names of the file's columns as it spells them; empty for objects.
        names: the requested columns that are there, and TIME_OFFSET where the format has one.
        places: index into fields of each of these; empty for objects.
        paths: name or path in an object of each of these; empty for tables.
        first_line: number of the first line that is not blank.
        first_row: number of the line on which the first row begins.
    """

    format: Format
    shape: Literal["header", "bare", "lines", "array"]
    separator: str
    fields: tuple[str, ...]
    request: Request
    names: tuple[str, ...]
    places: tuple[int, ...]
    paths: tuple[str, ...]
    first_line: int
    first_row: int

    @property
    def is_table(self) -> bool:
        """Whether a line has fields between separators."""
        return self.shape in ("header", "bare")

    @property
    def is_csv(self) -> bool:
        """Whether one character separates the fields, and quotes may be around those that need them."""
        return self.is_table and len(self.separator) == 1 and self.format.quoted

    @property
    def labels(self) -> dict[str, str]:
        """The file's own names of the columns that are there, for messages."""
        found = [plain_name(self.fields[place]) for place in self.places] if self.is_table else list(self.paths)
        given = self.request.columns.given
        return {name: given(name) or own for name, own in zip(self.names, found, strict=True)}

    def getter(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Return a function that picks the requested values from a row's fields."""
        if len(self.places) == 1:
            return lambda row: (row[self.places[0]],)
        return itemgetter(*self.places)


def find_columns(
    where: object,
    fields: Sequence[str],
    request: Request,
    known: Format = TABLE,
    plain: Callable[[str], str] = str,
    line: str = "",
) -> dict[str, int]:
    """Return the index into ``fields`` of each requested column that is there.

    Args:
        where: file and line, or the frame, for messages.
        plain: removes what surrounds a name in a field.
        line: the first line of a text file.

    Raises:
        DataFileError: a needed column is missing, or a column is there twice.
    """
    places = {}
    for name in wanted_names(request, known):
        found = matches(name, fields, request.columns, known.names, plain)
        if len(found) > 1:
            raise DataFileError(f"{where}: column {name} is there {len(found)} times; keep one of them")
        if found:
            places[name] = found[0]
        elif name in request.needed or request.columns.given(name):
            # a file whose format is known already looks like it
            hint = suggestion(line, fields) if known is TABLE and request.columns.format is None else ""
            raise missing(where, name, request.columns, [*map(plain, fields)], hint)
    return places


def wanted_names(request: Request, known: Format) -> tuple[str, ...]:
    """Return the names to look for: those requested, and TIME_OFFSET where times are and the format has one."""
    with_offset = TIME_OFFSET in known.names and TIMESTAMP in request.names and not request.columns.timestamp
    return (*request.names, TIME_OFFSET) if with_offset else request.names


def missing(
    where: object, name: str, columns: Columns, there: Sequence[str], hint: str = "", kind: str = "column"
) -> DataFileError:
    """Return an error that names a missing column or field, those that are there and the option that helps."""
    given, remedy = columns.given(name), ""
    if name in OPTIONS:
        flag, argument = OPTIONS[name]
        option = f"{flag} or Columns({argument}=...)"
        remedy = f"; correct {option}" if given else f"; if one of them is meant, name it with {option}"
        if name == TIMESTAMP and not given:
            remedy += (
                "; if the rows are in the order of time, oldest first, say so with --in-file-order or "
                "Columns(in_file_order=True)"
            )
    if kind == "column" and any(re.fullmatch(r"-?\d+(\.\d+)?", field.strip()) for field in there):
        remedy += "; if the first line is no header, give --no-header or Columns(header=False)"
    listed = ", ".join(map(repr, there)) or "none"
    return DataFileError(f"{where}: {kind} {given or name} is missing; the {kind}s are {listed}{remedy}{hint}")


def matches(
    name: str, fields: Sequence[str], columns: Columns, names: Mapping[str, str], plain: Callable[[str], str]
) -> list[int]:
    """Return the fields that bear a name: as it is, else without what surrounds it, else in any case."""
    given = columns.given(name)
    spelled = given or names.get(name, name)
    found = [at for at, field in enumerate(fields) if field == spelled]
    found = found or [at for at, field in enumerate(fields) if plain(field) == spelled]
    if found or given is not None or name not in (*ANY_CASE, TIME_OFFSET):
        return found
    default = names.get(name, name.lower())
    return [at for at, field in enumerate(fields) if plain(field).lower() == default]
