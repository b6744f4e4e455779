"""Read the times of a table as Unix ms, and refuse those that are probably in another unit.

integers         in the unit that the caller gives, else the layout, else ms
fractions        in seconds only
datetimes, dates
text             RFC 3339 (no zone: UTC), the layout's own format, or a number
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sasrec.data.column_types import as_integers, is_text
from sasrec.data.formats import TIME_OFFSET, TIMESTAMP, DataFileError
from sasrec.data.tables import Data
from sasrec.data.times import LATEST_MS, LIBRARY_BOUNDS, MS_OF_UNIT, UNITS, TimeBounds, option_of

TIMES = "give integers or datetimes"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# datetime.fromisoformat takes any character between date and time: it would read "20240131.12" as noon
ISO_SHAPE = re.compile(r"[\dW-]{7,10}([Tt ].+)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
COMPACT_DATES = ((1, "dates (YYYYMMDD)"), (10**6, "times (YYYYMMDDhhmmss)"))
JANUARY_MS = 31 * 86_400_000
MAX_NUMBER_CHARS = 40
Times = NDArray[np.int64]


def timestamps(data: Data, bounds: TimeBounds | None = None) -> Times:
    """Return the times in ms (N,).

    Args:
        bounds: refuse times outside these, too.

    Raises:
        DataFileError: a time is missing, is no time, is after the year 5138 or out of bounds, or looks like another
            unit and the caller gave none; or the column has another type.
    """
    times = _timestamps(data, bounds)
    if TIME_OFFSET in data.table.column_names:
        data = data.typed(ids=False)
        data.refuse_nulls(TIME_OFFSET, "give every row its time, or remove the row")
        offsets = data.table[TIME_OFFSET]
        if not pa.types.is_integer(offsets.type):
            raise data.type_error(TIME_OFFSET, "give integers")
        times = times + _numpy(offsets)
    return times


def _timestamps(data: Data, bounds: TimeBounds | None) -> Times:
    column, kind = data.table[TIMESTAMP], data.table[TIMESTAMP].type
    data.refuse_nulls(TIMESTAMP, f"{TIMES}, or remove the row")
    if is_text(kind):
        return _text_times(data, column, bounds)
    if pa.types.is_floating(kind):
        return _float_times(data, column.to_numpy(), bounds)
    if pa.types.is_timestamp(kind):
        units = _numpy(column.cast(pa.int64()))
        times = units * 1000 if kind.unit == "s" else units // {"ms": 1, "us": 1000, "ns": 1_000_000}[kind.unit]
        _refuse_january_1970(data, times)
        return _dates(data, times, bounds)
    if pa.types.is_date(kind):
        return _dates(data, _numpy(column.cast(pa.date64()).cast(pa.int64())), bounds)
    if not pa.types.is_integer(kind):
        raise data.type_error(TIMESTAMP, TIMES)
    return _whole_times(data, _numpy(data.cast(TIMESTAMP, pa.int64(), f"does not fit 64 bits; {TIMES}")), bounds)


def _whole_times(data: Data, values: Times, bounds: TimeBounds | None) -> Times:
    factor, divisor = MS_OF_UNIT[data.timestamp_unit]
    beyond = (values > (2**63 - 1) // factor) | (values < -(2**63 // factor))
    if beyond.any():
        row = int(beyond.argmax())
        raise data.error(row, f"{data.label(TIMESTAMP)} {values[row]} does not fit 64 bits in ms; {TIMES}")
    times: Times = values * factor if divisor == 1 else values // divisor
    _check(data, values, times, bounds)
    return times


def _float_times(data: Data, values: NDArray[np.floating[Any]], bounds: TimeBounds | None) -> Times:
    label, unit = data.label(TIMESTAMP), data.timestamp_unit
    factor, divisor = MS_OF_UNIT[unit]
    # beyond this, neighbouring integers share one float: the value was rounded before it came here
    exact = np.abs(values) <= 2.0 ** (np.finfo(values.dtype).nmant + 1)
    if unit == "ms":
        bad = ~exact | (np.where(exact, values, 0) % 1 != 0)
        problem = f"is not an exact whole number; {TIMES}"
    else:
        bad = ~(np.abs(values.astype(np.float64) * factor / divisor) < 2.0**63)
        problem = f"is not a time in {UNITS[unit][2]}; {TIMES}"
    if bad.any():
        row = int(bad.argmax())
        raise data.error(row, f"{label} {values[row]} {problem}")
    scaled = values.astype(np.float64) * factor / divisor
    times: Times = (np.rint(scaled) if divisor == 1 else np.floor(scaled)).astype(np.int64)
    _check(data, values.astype(np.float64), times, bounds)
    return times


def _text_times(data: Data, column: pa.ChunkedArray, bounds: TimeBounds | None) -> Times:
    whole = as_integers(column)
    if whole is not column:
        return _whole_times(data, _numpy(whole), bounds)
    if data.known.time_format and not data.unit:
        return _formatted_times(data, column, data.known.time_format, bounds)
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return _dates(data, _numpy(column.cast(kind).cast(pa.int64())) // 1000, bounds)
        except pa.ArrowInvalid:
            continue
    times, numbers = [], []
    for row, text in enumerate(column.to_pylist()):
        time, number = _parse_time(text, data.timestamp_unit)
        if time is None:
            raise data.error(row, f"{data.label(TIMESTAMP)} {text!r} is neither an integer nor {_no_time(text)}")
        times.append(time)
        numbers.append(number)
    found = np.array(times, np.int64)
    _check(data, np.array(numbers, np.float64), found, bounds)
    return found


def _no_time(text: str) -> str:
    """Return the rest of an error about text that is no time."""
    likely = option_of(float(text)) if NUMBER.fullmatch(text.strip()) and len(text) < MAX_NUMBER_CHARS else "..."
    if likely == "s":
        return "an ISO-8601 time; it looks like seconds: give --timestamp-unit s or Columns(timestamp_unit='s')"
    return f"an ISO-8601 time; {TIMES}, or correct --timestamp-unit"


def _formatted_times(data: Data, column: pa.ChunkedArray, form: str, bounds: TimeBounds | None) -> Times:
    found = pc.strptime(column, format=form, unit="ms", error_is_null=True)
    if found.null_count:
        row = pc.index(pc.is_null(found), True).as_py()
        raise data.error(
            row, f"{data.label(TIMESTAMP)} {column[row].as_py()!r} is no time like {form}; correct the row"
        )
    return _dates(data, _numpy(found.cast(pa.int64())), bounds)


def _parse_time(text: str, unit: str) -> tuple[int | None, float]:
    """Return a time in ms, None if it is none; and the number that it was, NaN if it was none."""
    text, (factor, divisor) = text.strip(), MS_OF_UNIT[unit]
    number = np.nan
    try:
        if WHOLE.fullmatch(text):
            whole = int(text.partition(".")[0])
            value, number = whole * factor // divisor, float(whole)
        elif unit == "s" and NUMBER.fullmatch(text):
            number = float(text)
            value = round(number * 1000)
        elif ISO_SHAPE.fullmatch(text):
            time = datetime.fromisoformat(text.upper())  # RFC 3339 takes t and z, too
            value = ((time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH) // timedelta(milliseconds=1)
        else:
            return None, number
    except (ValueError, OverflowError):
        return None, number
    return (value if -(2**63) <= value < 2**63 else None), number


def _check(data: Data, values: NDArray[Any], times: Times, bounds: TimeBounds | None) -> None:
    """Raise DataFileError for a number that is a time after the bounds, or that looks like another unit.

    Args:
        values: (N,) as they are written, in the unit; NaN: no number.
    """
    unit, refused = data.timestamp_unit, times > LATEST_MS
    if bounds is not None:
        refused |= (times < bounds.earliest_ms) | (times > bounds.latest_ms)
    if data.unit is None:
        for key, (low, high, _) in UNITS.items():
            if key != unit:
                refused |= (values >= low) & (values < high)
        _refuse_compact_dates(data, values)
    if refused.any():
        row = int(refused.argmax())
        value = values[row].item()
        if np.isnan(value):
            raise _date_error(data, row, int(times[row]), bounds)
        value = int(value) if value == int(value) else value
        problem = (bounds and bounds.problem(data.label(TIMESTAMP), value, unit)) or LIBRARY_BOUNDS.problem(
            data.label(TIMESTAMP), value, unit
        )
        likely = option_of(value)
        raise data.error(
            row,
            f"{problem}; give the right unit with --timestamp-unit {likely} or Columns(timestamp_unit={likely!r}), or "
            "correct the row",
        )


def _refuse_compact_dates(data: Data, values: NDArray[Any]) -> None:
    """Raise DataFileError where all numbers are dates without separators: 20240131 is not 5.6 hours after 1970."""
    for scale, name in COMPACT_DATES:
        if not len(values) or not 19700101 <= values[0] // scale <= 21001231:
            continue
        dates = values // scale
        months, days = dates // 100 % 100, dates % 100
        valid = (dates >= 19700101) & (dates <= 21001231) & (months >= 1) & (months <= 12) & (days >= 1) & (days <= 31)
        if valid.all():
            raise data.error(
                0,
                f"{data.label(TIMESTAMP)} {int(values[0])}: the times look like {name}; write them as "
                "2024-01-31T12:00:00Z, or say with --timestamp-unit that they are numbers",
            )


def _refuse_january_1970(data: Data, times: Times) -> None:
    """Raise DataFileError where numbers became datetimes in a wrong unit: 1.7e12 ns are 28 minutes."""
    if data.unit is None and len(times) and (times > 0).all() and (times < JANUARY_MS).all():
        raise data.error(
            0,
            f"{data.label(TIMESTAMP)} {str(data.table[TIMESTAMP][0].as_py())!r}: the times are all in January 1970; "
            "numbers in another unit became datetimes: convert them with their unit",
        )


def _dates(data: Data, times: Times, bounds: TimeBounds | None) -> Times:
    """Return times that are no numbers, if they are in the bounds."""
    refused = times > LATEST_MS
    if bounds is not None:
        refused |= (times < bounds.earliest_ms) | (times > bounds.latest_ms)
    if refused.any():
        row = int(refused.argmax())
        raise _date_error(data, row, int(times[row]), bounds)
    return times


def _date_error(data: Data, row: int, time_ms: int, bounds: TimeBounds | None) -> DataFileError:
    problem = (bounds or LIBRARY_BOUNDS).problem(data.label(TIMESTAMP), time_ms)
    return data.error(row, f"{problem} (it is written {str(data.table[TIMESTAMP][row].as_py())!r}); correct the row")


def _numpy(column: pa.ChunkedArray) -> Times:
    values: Times = np.array(column.to_numpy(), np.int64)  # a copy: Arrow's buffers are read-only
    return values
