"""Read objects: JSON lines, one JSON array, or lines that are Python dicts. Names of fields may be paths.

user.id            field id of the object in field user
products[].id      one row for each element of the list in field products; all such names are of one list
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from sasrec.data.formats import ITEM_ID, USER_ID, DataFileError
from sasrec.data.layouts import ANY_CASE, Layout, Request, missing
from sasrec.data.presets import OBJECTS, layouts_of, suggestion
from sasrec.data.recognition import object_layout

ABSENT = object()
CHUNK_CHARS = 1 << 16
ID_TYPES = frozenset((str, int))
MAX_ELEMENT_CHARS = 1 << 24
Row = tuple[int, tuple[Any, ...]]  # the line on which the row begins; its requested values, None where absent
Objects = Iterator[tuple[int, dict[str, Any]]]


def open_objects(path: Path, number: int, first: str, more: Iterable[str], request: Request) -> tuple[Layout, Objects]:
    """Return the layout of a file with an object on each line, and its objects with their lines.

    Args:
        number: of the first line that is not blank.
        first: that line; ``more``: the lines behind it.

    Raises:
        DataFileError: the first line is no object, or not of the named preset.
    """
    literal = _is_literal(request.columns.format)
    parse = _literal if literal else _json
    objects = _in_lines(path, enumerate(chain([first], more), start=number), parse)
    line, head = next(objects)
    layout = object_layout(f"{path}:{line}", "lines", list(head), first, request, number)
    return layout, chain([(line, head)], objects)


def open_array(path: Path, text: Iterator[str], request: Request) -> tuple[Layout, Objects]:
    """Return the layout of a file with one JSON array, and its objects with their lines.

    Args:
        text: the file's text in pieces of any size.

    Raises:
        DataFileError: the array is empty, or not of the named preset.
    """
    objects = _in_array(path, _Source(path, text))
    line, head = next(objects, (0, {}))
    if not line:
        raise DataFileError(f"{path} has no rows")
    return object_layout(f"{path}:{line}", "array", list(head), "", request, line), chain([(line, head)], objects)


def object_rows(path: Path, layout: Layout, objects: Objects) -> Iterator[Row]:
    """Yield the requested values of each object.

    Raises:
        DataFileError: a field is missing, or an id is none.
    """
    request = layout.request
    fields = [_Field.of(name, label, request) for name, label in zip(layout.names, layout.paths, strict=True)]
    lists = {field.of_list for field in fields if field.of_list is not None}
    if len(lists) > 1:
        raise DataFileError(f"{path}: the paths go through the lists {', '.join(sorted(lists))}; name fields of one")
    of_list = lists.pop() if lists else None
    is_flat = of_list is None and not any("." in field.path for field in fields)
    keys = [field.path for field in fields]
    ids = [at for at, field in enumerate(fields) if field.name in (USER_ID, ITEM_ID)]
    first, last = ids[0], ids[-1]
    must = itemgetter(*(at for at, field in enumerate(fields) if field.name in request.needed), *ids)
    unseen = {name for name in layout.names if request.columns.given(name)}  # later objects may lack optional fields
    for line, row in objects:
        if is_flat and not unseen:  # nearly all rows: what they must have is there, and ids are ids
            values = [row.get(key) for key in keys]
            if type(values[first]) in ID_TYPES and type(values[last]) in ID_TYPES and None not in must(values):
                yield line, tuple(values)
                continue
        for element in [row] if of_list is None else _elements(path, line, row, of_list):
            yield line, _values(path, line, row, element, fields, layout, unseen)
            unseen = set()


def _values(
    path: Path, line: int, row: dict[str, Any], element: Any, fields: list[_Field], layout: Layout, unseen: set[str]
) -> tuple[Any, ...]:
    """Return the values of an object, or of an element of its list; ``unseen``: fields that must be there, too."""
    values, request = [], layout.request
    for field in fields:
        value = _value(row if field.of_list is None else element, field)
        if value is ABSENT and (field.name in request.needed or field.name in unseen):
            there = list(element if field.of_list is not None and isinstance(element, dict) else row)
            hint = suggestion("", there) if layout.format is OBJECTS else ""
            raise missing(f"{path}:{line}", field.name, request.columns, there, hint, "field")
        if field.name in (USER_ID, ITEM_ID):
            _check_id(path, line, field.label, value)
        values.append(None if value is ABSENT else value)
    return tuple(values)


@dataclass(frozen=True)
class _Field:
    """A requested field: its label, the list that its path goes through, and its path in the object or element."""

    name: str
    label: str
    of_list: str | None
    path: str
    any_case: bool

    @classmethod
    def of(cls, name: str, label: str, request: Request) -> _Field:
        of_list, is_list, rest = label.rpartition("[]")
        any_case = name in ANY_CASE and request.columns.given(name) is None
        return cls(name, label, of_list if is_list else None, rest.lstrip("."), any_case)


def _elements(path: Path, line: int, row: dict[str, Any], of_list: str) -> list[Any]:
    found = _at(row, of_list)
    if not isinstance(found, list):
        kind = "missing" if found is ABSENT else f"{type(found).__name__}, not a list"
        raise DataFileError(f"{path}:{line}: {of_list} is {kind}; the fields are {', '.join(map(repr, row))}")
    return found


def _value(element: Any, field: _Field) -> Any:
    if not field.path:
        return element
    if not isinstance(element, dict):
        return ABSENT
    value = _at(element, field.path)
    if value is ABSENT and field.any_case:
        return next((element[key] for key in element if key.upper() == field.name), ABSENT)
    return value


def _at(row: dict[str, Any], path: str) -> Any:
    """Return the value at a path; a key that is spelled like the path comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return ABSENT
        value = value[key]
    return value


def _check_id(path: Path, line: int, label: str, value: object) -> None:
    if value is None:
        raise DataFileError(f"{path}:{line}: {label} is null; give every row its id, or remove the row")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataFileError(f"{path}:{line}: {label} must be a string or an integer, not {value!r}")


def _is_literal(preset: str | None) -> bool:
    return preset is not None and all(known.literals for _, known in layouts_of(preset))


def _json(text: str) -> Any:
    return json.loads(text)


def _literal(text: str) -> Any:
    return ast.literal_eval(text.strip())


def _in_lines(path: Path, lines: Iterable[tuple[int, str]], parse: Any) -> Objects:
    kind = "JSON" if parse is _json else "a Python dict"
    for line, text in lines:
        if not text.strip():
            continue
        try:
            row = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            looks = text.lstrip().startswith(("{u'", "{'"))
            hint = "; Python dicts are no JSON: is this Steam's file? Then give --format steam" if looks else ""
            if text.strip() == "{" or "Extra data" in str(error):
                hint = "; write each object on one line, or all of them as one JSON array"
            raise DataFileError(f"{path}:{line}: not {kind}: {error}{hint}") from error
        yield line, _object(path, line, row)


def _in_array(path: Path, source: _Source) -> Objects:
    source.skip("[")
    if source.next_char() == "]":
        source.skip("]")
    else:
        while True:
            line, row = source.value()
            yield line, _object(path, line, row)
            if source.next_char() != ",":
                break
            source.skip(",")
        source.skip("]")
    if source.next_char():
        raise source.error("there is more behind the end of the array")


def _object(path: Path, line: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataFileError(f"{path}:{line}: a JSON object is expected, not {type(row).__name__}")
    return row


class _Source:
    """JSON text that comes in pieces."""

    def __init__(self, path: Path, pieces: Iterator[str]) -> None:
        self._path, self._pieces = path, pieces
        self._text, self._at, self._line = "", 0, 1
        self._decoder = json.JSONDecoder()

    def error(self, problem: str) -> DataFileError:
        """Return an error that names the line."""
        return DataFileError(f"{self._path}:{self._line}: not JSON: {problem}")

    def next_char(self) -> str:
        """Return the next character that is not blank, without going behind it; empty at the end."""
        while True:
            while self._at < len(self._text):
                char = self._text[self._at]
                if not char.isspace():
                    return char
                self._line += char == "\n"
                self._at += 1
            if not self._fill():
                return ""

    def skip(self, char: str) -> None:
        """Go behind the next character, which must be this one."""
        found = self.next_char()
        if found != char:
            what = repr(found) if found else "the end: the file is cut short"
            raise self.error(f"{char!r} is expected, not {what}")
        self._at += 1

    def value(self) -> tuple[int, Any]:
        """Return the next value and the line on which it begins."""
        if not self.next_char():
            raise self.error("the file is cut short")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # more text does not mend an error far before the end
                position = error.pos if isinstance(error, json.JSONDecodeError) else 0
                near_end = position > len(self._text) - 16 or "Unterminated string" in str(error)
                if isinstance(error, RecursionError) or not near_end or not self._fill():
                    raise self.error(f"{error}") from error
                continue
            line = self._line
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            return line, value

    def _fill(self) -> bool:
        """Read on, at least as much as is left over: a long value is not decoded too often."""
        left = self._text[self._at :]
        if len(left) > MAX_ELEMENT_CHARS:
            raise self.error(f"an object of more than {MAX_ELEMENT_CHARS} characters")
        pieces, size = [left], 0
        for piece in self._pieces:
            pieces.append(piece)
            size += len(piece)
            if size >= max(len(left), CHUNK_CHARS):
                break
        self._text, self._at = "".join(pieces), 0
        return size > 0
