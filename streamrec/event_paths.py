"""Paths to the fields of an event: how a setting writes one, and how a JSON object is read by several at once.

    payload.user.id        names joined by dots
    products[].id          [] behind a name goes through a list: one value for each element, in order
    userId|anonymousId     alternatives: the first that is present and not null
    site\\.user             a backslash takes ``.``, ``|``, ``[`` or ``]`` as part of a name

Alternatives through one list are chosen for each element of its own. A list without elements counts as missing as long
as another alternative has a value.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import GenericAlias
from typing import Any, NamedTuple, NotRequired, TypedDict

import msgspec

NAME = r'(?:[^\\.|\[\]"\x00-\x1f]|\\[.|\[\]])+'
STEP = re.compile(rf"({NAME})(\[\])?")
PATHS = re.compile(rf"{STEP.pattern}(?:[.|]{STEP.pattern})*")
FORM = (
    "a path is names joined by dots, [] behind the name of a list, | between alternatives; a backslash before one of "
    ". | [ ] takes it as part of a name, which holds no quotes, other backslashes or control characters"
)


class Step(NamedTuple):
    """A name in a path, and whether its value is a list to go through."""

    name: str
    many: bool = False


Path = tuple[Step, ...]


def parse(text: str) -> tuple[Path, ...]:
    """Return the alternatives that a setting names.

    Raises:
        ValueError: the text is no path.
    """
    alternatives = [part.strip() for part in re.split(r"(?<!\\)\|", text)]
    if not all(PATHS.fullmatch(part) for part in alternatives):
        raise ValueError(FORM)
    return tuple(
        tuple(Step(re.sub(r"\\(.)", r"\1", name), bool(many)) for name, many in STEP.findall(part))
        for part in alternatives
    )


def put(event: dict[str, Any], path: Path, value: object) -> None:
    """Set the value at a path of an event; lists get one element."""
    *outer, last = path
    for step in outer:
        inner = event.setdefault(step.name, [{}] if step.many else {})
        event = inner[0] if step.many else inner
    event[last.name] = [value] if last.many else value


@dataclass
class _Node:
    """One place of an event that is read."""

    kind: Any = None  # of a value that a path ends with
    label: str = ""  # of the field that this place belongs to
    many: bool = False
    required: bool = False
    inner: dict[str, _Node] = field(default_factory=dict)

    def add(self, label: str, path: Path, kind: Any, required: bool) -> None:
        """Add a path.

        Raises:
            ValueError: another path ends here, or passes through, so that a value would have to be two things.
        """
        if self.kind is not None or (self.inner and not path):
            raise ValueError(f"{label} and {self.label} name one place of an event, or one within the other")
        self.label = self.label or label
        self.required |= required
        if not path:
            self.kind = kind
            return
        step, *rest = path
        node = self.inner.setdefault(step.name, _Node(many=step.many))
        if node.many != step.many:
            raise ValueError(f"{label} and {node.label} disagree whether {step.name} is a list")
        node.add(label, tuple(rest), kind, required)

    def decoded_type(self) -> Any:
        """Return the type to decode, without fields that no path names."""
        kind = self.kind
        if kind is None:
            kinds = {name: (node.decoded_type(), node.required) for name, node in self.inner.items()}
            fields = {name: of if required else NotRequired[of] for name, (of, required) in kinds.items()}
            kind = typing.cast(Any, TypedDict)("Event", fields)
        if not self.required:
            kind = kind | None
        if not self.many:
            return kind
        found: Any = GenericAlias(list, (kind,))
        return found if self.required else found | None


class Field(NamedTuple):
    """A field to read: the setting's text, the type of its values, and whether an event must have one."""

    text: str
    kind: Any
    required: bool = False


def reader_of(fields: Mapping[str, Field]) -> Callable[[bytes], tuple[Any, ...]]:
    """Return a function that reads the fields of an event, in this order; None for an optional one that is missing.

    A field whose path goes through a list is a list. The function raises as msgspec does.

    Raises:
        ValueError: a text is no path, or two fields have one place.
    """
    paths = {label: parse(wanted.text) for label, wanted in fields.items()}
    event = _Node(required=True)
    for label, wanted in fields.items():
        for path in paths[label]:
            event.add(label, path, wanted.kind, wanted.required and len(paths[label]) == 1)
    decode = msgspec.json.Decoder(event.decoded_type()).decode
    required = {label: wanted.text for label, wanted in fields.items() if wanted.required}

    def read(value: bytes) -> tuple[Any, ...]:
        raw = decode(value)
        found = {label: first_value(raw, alternatives) for label, alternatives in paths.items()}
        for label, text in required.items():
            of = found[label]
            if of is None or (isinstance(of, list) and None in of):
                where = "" if of is None else f" in element {of.index(None)}"
                raise msgspec.ValidationError(f"none of `{text}` has a value{where}")
        return tuple(found.values())

    return read


def null_test(text: str) -> Callable[[bytes], bool]:
    """Return a function that tells whether an event has null at a path, which is more than no value there.

    The function raises as msgspec does.

    Raises:
        ValueError: the text is no path.
    """
    paths = parse(text)
    event = _Node(required=True)
    for path in paths:
        event.add("", path, Any, required=False)
    decode = msgspec.json.Decoder(event.decoded_type()).decode

    def has_null(value: bytes) -> bool:
        raw = decode(value)
        for *outer, last in paths:
            found = first_value(raw, [tuple(outer)])
            if isinstance(found, dict) and last.name in found and found[last.name] is None:
                return True
        return False

    return has_null


def first_value(raw: Any, paths: Sequence[Path]) -> Any:
    """Return the value of the first path that has one; a list if the path goes through lists; None if no path has."""
    is_empty = False
    for at, path in enumerate(paths):
        found = raw
        for depth, step in enumerate(path, 1):
            found = found.get(step.name)
            if found is None:
                break
            if step.many:
                inner = [other[depth:] for other in paths[at:] if other[:depth] == path[:depth]]
                found = _elements(found, inner)
                break
        if found is not None and found != []:
            return found
        is_empty |= found == []
    return [] if is_empty else None


def _elements(elements: Sequence[Any], paths: Sequence[Path]) -> list[Any]:
    """Return the values of the elements of a list, in order, those of inner lists in place."""
    values: list[Any] = []
    for element in elements:
        value = None if element is None else first_value(element, paths)
        values += value if isinstance(value, list) else [value]
    return values
