"""Check the columns of a table row by row and return them as ids, outcomes and event types."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sasrec.data.column_types import TEXT, first_misfit, is_text
from sasrec.data.formats import (
    EVENT_TYPE,
    ITEM_ID,
    OUTCOME,
    RATING,
    TIME_OFFSET,
    TIMESTAMP,
    USER_ID,
    DataFileError,
)
from sasrec.data.tables import Data
from sasrec.data.timestamps import timestamps

log = logging.getLogger(__name__)

# how a column of floats is written: 5.0 is the integer 5 if the column had none missing, and 1e+17 is rounded
FLOAT = r"^[+-]?(\d+\.0+|\d\.\d+[eE]\+?\d+)$"


def ids(data: Data, name: str) -> tuple[list[str], bool]:
    """Return the ids of a column as text, and whether they were integers.

    Raises:
        DataFileError: an id is missing, empty or a float, or the column has another type.
    """
    column = data.table[name]
    remedy = "give every row its id, or remove the row"
    integer = pa.types.is_integer(column.type)
    if pa.types.is_floating(column.type):
        # pandas turns integers with a missing one into floats: report the missing one
        values = column.to_numpy()
        holes = np.isnan(values)
        if holes.any() and np.all(np.mod(values[~holes], 1) == 0):
            raise data.error(int(holes.argmax()), f"{data.label(name)} is null; {remedy}")
    elif integer or is_text(column.type) or pa.types.is_null(column.type):
        data.refuse_nulls(name, remedy)
        coded = column.combine_chunks().dictionary_encode()
        places = coded.indices.to_numpy().tolist()
        try:
            # distinct ids are far fewer than rows: each becomes text once
            distinct = coded.dictionary.cast(TEXT)
            texts = distinct.to_pylist()
        except UnicodeDecodeError as error:
            raise DataFileError(f"{data.name}: {data.label(name)} is not UTF-8 text: {error}") from error
        if "" in texts:
            raise data.error(places.index(texts.index("")), f"{data.label(name)} is empty; {remedy}")
        if not integer:
            _refuse_floats(data, name, distinct, places)
        return [texts[place] for place in places], integer
    raise data.type_error(name, "give strings or integers")


def _refuse_floats(data: Data, name: str, distinct: pa.Array, places: list[int]) -> None:
    floats = pc.match_substring_regex(distinct, FLOAT)
    if pc.any(floats).as_py():
        place = pc.index(floats, True).as_py()
        text = distinct[place].as_py()
        raise data.error(
            places.index(place),
            f"{data.label(name)} {text!r} is a number with a fraction; give strings or integers: a column with a "
            "missing integer is often written so",
        )


def refuse_header(data: Data) -> None:
    """Raise DataFileError where files with a header were put behind each other, header and all."""
    if data.untyped and all(is_text(data.table[name].type) for name in (USER_ID, ITEM_ID)):
        again = pc.and_(*(pc.equal(data.table[name], data.label(name)) for name in (USER_ID, ITEM_ID)))
        if pc.any(again).as_py():
            row = pc.index(again, True).as_py()
            raise data.error(row, "the names of the columns are there again; remove the row")


def in_ms(data: Data) -> Data:
    """Return data whose timestamps, where they are in another unit or a format of their own, have become ms."""
    names, known = data.table.column_names, data.known
    if TIMESTAMP not in names or (
        data.timestamp_unit == "ms" and known.time_format is None and TIME_OFFSET not in names
    ):
        return data
    data = data.with_column(TIMESTAMP, pa.chunked_array([timestamps(data)])).without(TIME_OFFSET)
    return data.in_unit("ms")


def outcomes(data: Data) -> NDArray[np.float32]:
    """Return the outcomes (N,).

    Raises:
        DataFileError: an outcome is missing or not finite, or the column has another type.
    """
    column, remedy = data.table[OUTCOME], "give a finite number or a boolean"
    label, types = data.label(OUTCOME), pa.types
    if is_text(column.type):
        row = first_misfit(column, pa.float64())
        row = 0 if row == len(column) else row
        raise data.error(row, f"{label} {column[row].as_py()!r} is text; {remedy}")
    data.refuse_nulls(OUTCOME, f"{remedy}, or remove the row")
    if not any(test(column.type) for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)):
        raise data.type_error(OUTCOME, remedy)
    values = column.cast(pa.float64(), safe=False).to_numpy()
    with np.errstate(over="ignore"):
        found: NDArray[np.float32] = values.astype(np.float32)
    if not np.isfinite(found).all():
        row = int((~np.isfinite(found)).argmax())
        raise data.error(row, f"{label} {values[row]} is not finite as float32; {remedy}")
    return found


def with_outcome(data: Data) -> Data:
    """Return data whose column OUTCOME has the outcomes, and the ratings where there is no outcome.

    Raises:
        DataFileError: there is neither column.
    """
    names = data.table.column_names
    if RATING in names and OUTCOME in names:
        data, kind = data.typed(ids=False), TEXT if data.untyped else pa.float64()
        both = pc.coalesce(*(data.table[name].cast(kind) for name in (OUTCOME, RATING)))
        return data.with_column(OUTCOME, both).without(RATING)
    if RATING in names:
        return data.renamed(RATING, OUTCOME)
    if OUTCOME not in names:
        raise DataFileError(
            f"{data.name}: there is no column outcome or rating; name one with --outcome-column or Columns(outcome=...)"
        )
    return data


def event_types(data: Data) -> list[str | None]:
    """Return the event types (N,); None where a row has none."""
    if EVENT_TYPE not in data.table.column_names:
        return [None] * len(data.table)
    found: list[Any] = data.table[EVENT_TYPE].to_pylist()
    return [kind or None for kind in found]


@dataclass
class FileOrder:
    """Warns of rows that are newest first and share times: rows of one time keep the order of the file."""

    name: str
    newest_first: bool = True
    equal: bool = False
    steps: int = 0
    last_ms: int | None = None

    def add(self, times: NDArray[np.int64]) -> None:
        """Look at the next times of a file (N,)."""
        if not self.newest_first or not len(times):
            return
        steps = np.diff(times, prepend=times[0] if self.last_ms is None else self.last_ms)
        self.newest_first = bool((steps <= 0).all())
        self.equal |= bool((steps[1:] == 0).any())
        self.steps += int((steps < 0).sum())
        self.last_ms = int(times[-1])

    def finish(self) -> None:
        """Warn, if there is reason to."""
        if self.newest_first and self.equal and self.steps:
            log.warning(
                "%s: the rows are newest first; rows of one time keep the order of the file, so they may be read "
                "backwards: reverse the file if their order counts",
                self.name,
            )
