"""Check the columns of a table row by row and return them as ids, times and outcomes."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sasrec.data.column_types import TEXT, as_integers, first_misfit, is_text
from sasrec.data.formats import OUTCOME, TIMESTAMP, DataFileError
from sasrec.data.tables import Data

TIMES = "give integers or datetimes"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# datetime.fromisoformat takes any character between date and time: it would read "20240131.12" as noon
ISO_SHAPE = re.compile(r"[\dW-]{7,10}([Tt ].+)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def ids(data: Data, name: str) -> tuple[list[str], bool]:
    """Return the ids of a column as text, and whether they were integers.

    Raises:
        DataFileError: an id is missing or empty, or the column has another type.
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
            texts = coded.dictionary.cast(TEXT).to_pylist()
        except UnicodeDecodeError as error:
            raise DataFileError(f"{data.name}: {data.label(name)} is not UTF-8 text: {error}") from error
        if "" in texts:
            raise data.error(places.index(texts.index("")), f"{data.label(name)} is empty; {remedy}")
        return [texts[place] for place in places], integer
    raise data.type_error(name, "give strings or integers")


def timestamps(data: Data) -> NDArray[np.int64]:
    """Return the times (N,): integers as they are, datetimes as Unix ms, and all in ms where the unit is seconds.

    Raises:
        DataFileError: a time is missing or is no time, or the column has another type.
    """
    column, kind = data.table[TIMESTAMP], data.table[TIMESTAMP].type
    data.refuse_nulls(TIMESTAMP, f"{TIMES}, or remove the row")
    if is_text(kind):
        return _text_times(data, column)
    if pa.types.is_floating(kind):
        values = column.to_numpy()
        return _second_times(data, values) if data.timestamp_unit == "s" else _float_times(data, values)
    if pa.types.is_timestamp(kind):
        units = _numpy(column.cast(pa.int64()))
        return units * 1000 if kind.unit == "s" else units // {"ms": 1, "us": 1000, "ns": 1_000_000}[kind.unit]
    if pa.types.is_date(kind):
        return _numpy(column.cast(pa.date64()).cast(pa.int64()))
    if not pa.types.is_integer(kind):
        raise data.type_error(TIMESTAMP, TIMES)
    return _scaled(data, _numpy(data.cast(TIMESTAMP, pa.int64(), f"does not fit 64 bits; {TIMES}")))


def in_ms(data: Data) -> Data:
    """Return data whose timestamps in seconds, if they are, have become ms."""
    if data.timestamp_unit != "s" or TIMESTAMP not in data.table.column_names:
        return data
    at = data.table.column_names.index(TIMESTAMP)
    table = data.table.set_column(at, TIMESTAMP, pa.chunked_array([timestamps(data)]))
    return replace(data, table=table, timestamp_unit=None)


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


def _scaled(data: Data, values: NDArray[np.int64]) -> NDArray[np.int64]:
    if data.timestamp_unit != "s":
        return values
    beyond = (values > (2**63 - 1) // 1000) | (values < -(2**63 // 1000))
    if beyond.any():
        row = int(beyond.argmax())
        raise data.error(row, f"{data.label(TIMESTAMP)} {values[row]} does not fit 64 bits in ms; {TIMES}")
    return values * 1000


def _float_times(data: Data, values: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    # beyond this, neighbouring integers share one float: the value was rounded before it came here
    exact = np.abs(values) <= 2.0 ** (np.finfo(values.dtype).nmant + 1)
    bad = ~exact | (np.where(exact, values, 0) % 1 != 0)
    if bad.any():
        row = int(bad.argmax())
        raise data.error(row, f"{data.label(TIMESTAMP)} {values[row]} is not an exact whole number; {TIMES}")
    return values.astype(np.int64)


def _second_times(data: Data, values: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    ms = np.rint(values.astype(np.float64) * 1000)
    bad = ~(np.abs(ms) < 2.0**63)
    if bad.any():
        row = int(bad.argmax())
        raise data.error(row, f"{data.label(TIMESTAMP)} {values[row]} is not a time in seconds; {TIMES}")
    return ms.astype(np.int64)


def _text_times(data: Data, column: pa.ChunkedArray) -> NDArray[np.int64]:
    whole = as_integers(column)
    if whole is not column:
        return _scaled(data, _numpy(whole))
    times: list[int] = []
    for row, text in enumerate(column.to_pylist()):
        time = _parse_time(text, data.timestamp_unit == "s")
        if time is None:
            label = data.label(TIMESTAMP)
            raise data.error(row, f"{label} {text!r} is neither an integer nor an ISO-8601 time; {TIMES}")
        times.append(time)
    return np.array(times, np.int64)


def _parse_time(text: str, in_seconds: bool) -> int | None:
    text = text.strip()
    try:
        if WHOLE.fullmatch(text):
            value = int(text.partition(".")[0]) * (1000 if in_seconds else 1)
        elif in_seconds and NUMBER.fullmatch(text):
            value = round(float(text) * 1000)
        elif ISO_SHAPE.fullmatch(text):
            time = datetime.fromisoformat(text)
            value = ((time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH) // timedelta(milliseconds=1)
        else:
            return None
    except (ValueError, OverflowError):
        return None
    return value if -(2**63) <= value < 2**63 else None


def _numpy(column: pa.ChunkedArray) -> NDArray[np.int64]:
    values: NDArray[np.int64] = np.array(column.to_numpy(), np.int64)  # a copy: Arrow's buffers are read-only
    return values
