"""List the formats of interaction files and the names of their columns.

The first line tells the format of a text file, its name does not:

    user_id,item_id,timestamp               CSV (comma, semicolon) or TSV, columns in any order, others ignored
    {"user_id": ..., "item_id": ...}        JSON lines
    userId,movieId,rating,timestamp         MovieLens ratings.csv
    1::1193::5::978300760                   MovieLens 1M and 10M ratings.dat
    196 <tab> 242 <tab> 3 <tab> 881250949   MovieLens 100K u.data
    user_id:token <tab> item_id:token ...   RecBole .inter

A new text format is one entry of FORMATS. Parquet files and frames name and type their columns: they need no entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

USER_ID, ITEM_ID, OUTCOME, TIMESTAMP = "USER_ID", "ITEM_ID", "OUTCOME", "TIMESTAMP"
RATING = "RATING"  # streams of events take it for OUTCOME
TimestampUnit = Literal["s", "ms"]


class DataFileError(ValueError):
    """A data file cannot be read; the message names file, line and remedy."""


@dataclass(frozen=True)
class Columns:
    """Describe the columns of a source where they differ from what its format says.

    Args:
        user: name of the column of user ids. The default is USER_ID in any case, and likewise for the others.
        item: name of the column of item ids.
        timestamp: name of the column of times.
        outcome: name of the column of outcomes.
        separator: characters between the fields of a text file. Fields may be quoted where it is one character.
        timestamp_unit: "s" or "ms" for numeric timestamps. The default is the format's unit.

    Raises:
        ValueError: the separator or the unit is not usable.
    """

    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    outcome: str | None = None
    separator: str | None = None
    timestamp_unit: TimestampUnit | None = None

    def __post_init__(self) -> None:
        if self.timestamp_unit not in (None, "s", "ms"):
            raise ValueError(f"timestamp_unit={self.timestamp_unit!r}: must be 's' or 'ms'")
        if self.separator is not None and (not self.separator or set(self.separator) & set('"\r\n')):
            raise ValueError(f"separator={self.separator!r}: must be characters other than quotes and line breaks")

    def given(self, column: str) -> str | None:
        """Return the name given for USER_ID, ITEM_ID, OUTCOME or TIMESTAMP; None: the default."""
        names = {USER_ID: self.user, ITEM_ID: self.item, OUTCOME: self.outcome, TIMESTAMP: self.timestamp}
        return names.get(column)


DEFAULT_COLUMNS = Columns()


@dataclass(frozen=True)
class Format:
    """Describe one text format.

    Args:
        name: the format's name in messages.
        shape: "objects": a JSON object on each line; "header": the first line names the columns; "bare": no header.
        timestamp_unit: the unit of its timestamps.
        recognised: tells from a file's first line, stripped, and the names in it whether this is the format.
        separator: between the fields; None: comma, tab or semicolon; empty: there are none.
        fields: names of the columns of a file without a header.
        names: names of columns that are not the default, in lower case.
    """

    name: str
    shape: Literal["objects", "header", "bare"]
    timestamp_unit: TimestampUnit
    recognised: Callable[[str, Sequence[str]], bool]
    separator: str | None = None
    fields: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)


def plain_name(field: str) -> str:
    """Return a header's column name without surrounding spaces and without RecBole's type behind a colon."""
    return field.strip().split(":")[0]


def _is_json(line: str, fields: Sequence[str]) -> bool:
    return line.startswith("{")


def _is_ratings_dat(line: str, fields: Sequence[str]) -> bool:
    return line.count("::") == 3


def _is_u_data(line: str, fields: Sequence[str]) -> bool:
    return line.count("\t") == 3 and line.split("\t")[0].isdigit()


def _is_ratings_csv(line: str, fields: Sequence[str]) -> bool:
    return {"userid", "movieid"} <= {plain_name(name).lower() for name in fields}


def _is_inter(line: str, fields: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[^:]+:(token|float)(_seq)?", name.strip()) for name in fields)


def _is_header(line: str, fields: Sequence[str]) -> bool:
    return False  # a header of any names is what remains when nothing else is recognised


MOVIELENS = ("user_id", "item_id", "rating", "timestamp")
CSV = Format("CSV or TSV", "header", "ms", _is_header)
# The first format that recognises the line wins.
FORMATS = (
    Format("JSON lines", "objects", "ms", _is_json, ""),
    Format("MovieLens ratings.dat", "bare", "s", _is_ratings_dat, "::", MOVIELENS),
    Format("MovieLens u.data", "bare", "s", _is_u_data, "\t", MOVIELENS),
    Format("MovieLens ratings.csv", "header", "s", _is_ratings_csv, names={USER_ID: "userid", ITEM_ID: "movieid"}),
    Format("RecBole .inter", "header", "s", _is_inter),
    CSV,
)
