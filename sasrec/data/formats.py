"""Say what a source's columns are: the names that a caller gives, and the formats that a file may have.

A format says what a caller would else have to give: the names of the columns, the separator, the unit of the times.
:mod:`sasrec.data.presets` lists them. A caller's names come first, then the format's, then the default names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

USER_ID, ITEM_ID, OUTCOME, TIMESTAMP = "USER_ID", "ITEM_ID", "OUTCOME", "TIMESTAMP"
EVENT_TYPE = "EVENT_TYPE"
RATING = "RATING"  # streams of events take it for OUTCOME
TIME_OFFSET = "TIME_OFFSET"  # ms to add to TIMESTAMP; only formats name such a column
TimestampUnit = Literal["s", "ms", "us", "ns"]
TIMESTAMP_UNITS: tuple[TimestampUnit, ...] = get_args(TimestampUnit)


class DataFileError(ValueError):
    """A data file cannot be read; the message names file, line and remedy.

    Args:
        row: the row of the batch that was checked; None: the error is not of one row.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Columns:
    """Describe the columns of a source where they differ from what its format says.

    Args:
        user: name of the column of user ids. The default is USER_ID in any case, and likewise for the others. In JSON
            a name may be a path: ``payload.user.id``; ``products[].id`` gives one event an element.
        item: name of the column of item ids.
        timestamp: name of the column of times.
        outcome: name of the column of outcomes.
        separator: characters between the fields of a text file. Fields may be quoted where it is one character.
        timestamp_unit: "s", "ms", "us" or "ns" for numeric timestamps. The default is the format's unit.
        event_type: name of the column of event types.
        event_types: read only events of these types, and events without a type [those that the format says, else all].
        format: name of a preset of :mod:`sasrec.data.presets`.
        header: whether the first line of a CSV file names the columns. If not, they are named "1", "2", ...
        fields: names of the columns of a CSV file without a header.
        in_file_order: the rows are in the order of time, oldest first: read no times.

    Raises:
        ValueError: the separator or the unit is not usable, or two of these exclude each other.
    """

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    outcome: str | None = None
    separator: str | None = None
    timestamp_unit: TimestampUnit | None = None
    event_type: str | None = None
    event_types: tuple[str, ...] = ()
    format: str | None = None
    header: bool = True
    fields: tuple[str, ...] = ()
    in_file_order: bool = False

    def __post_init__(self) -> None:
        if self.timestamp_unit not in (None, *TIMESTAMP_UNITS):
            raise ValueError(f"timestamp_unit={self.timestamp_unit!r}: must be 's', 'ms', 'us' or 'ns'")
        if self.separator is not None and (not self.separator or set(self.separator) & set('"\r\n')):
            raise ValueError(f"separator={self.separator!r}: must be characters other than quotes and line breaks")
        if self.in_file_order and self.timestamp is not None:
            raise ValueError(f"timestamp={self.timestamp!r} and in_file_order exclude each other; give one of them")
        if self.format is not None and not self.has_header:
            raise ValueError(f"format={self.format!r} says whether there is a header; give no header and no fields")

    @property
    def has_header(self) -> bool:
        """Whether the first line of a CSV file names its columns, unless its format says something else."""
        return self.header and not self.fields

    def given(self, column: str) -> str | None:
        """Return the name given for USER_ID, ITEM_ID, OUTCOME, TIMESTAMP or EVENT_TYPE; None: the default."""
        return {
            USER_ID: self.user,
            ITEM_ID: self.item,
            OUTCOME: self.outcome,
            TIMESTAMP: self.timestamp,
            EVENT_TYPE: self.event_type,
        }.get(column)


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True)
class Format:
    """Describe one published layout of files.

    Args:
        name: the format's name in messages.
        timestamp_unit: the unit of its numeric timestamps.
        names: the columns' names where they are not the default, in lower case; in JSON they are paths.
        signature: names of columns, in lower case, by which it is recognised.
        pattern: regular expression of the first line, by which it is recognised.
        fields: names of the columns of a file without a header.
        separator: between the fields; None: comma, tab, semicolon or vertical bar, found in the first line.
        quoted: whether fields may be quoted.
        literals: each line is a Python dict, not JSON.
        pairs: the field of items is a list of items and types: ``N1-0 N2-1``.
        time_format: of times as text, for ``strptime``; None: RFC 3339.
        event_types: the types that are events of use, where a caller does not say.
        automatic: regular expression of the file names for which a caller need not name the format; empty: none.
    """

    name: str
    timestamp_unit: TimestampUnit = "ms"
    names: Mapping[str, str] = field(default_factory=dict)
    signature: frozenset[str] = frozenset()
    pattern: str = ""
    fields: tuple[str, ...] = ()
    separator: str | None = None
    quoted: bool = True
    literals: bool = False
    pairs: bool = False
    time_format: str | None = None
    event_types: tuple[str, ...] = ()
    automatic: str = ""


def plain_name(field: str) -> str:
    """Return a header's column name without surrounding spaces and without RecBole's type behind a colon."""
    return field.strip().split(":")[0]
