"""Stream interactions from a file, one event at a time: any format of :mod:`sasrec.data.formats`, or Parquet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from sasrec.data import checks
from sasrec.data.formats import (
    DEFAULT_COLUMNS,
    ITEM_ID,
    OUTCOME,
    RATING,
    TIMESTAMP,
    USER_ID,
    Columns,
    DataFileError,
)
from sasrec.data.layouts import Request
from sasrec.data.lines import open_rows, reading, rows, text_of
from sasrec.data.tables import data_files, is_parquet, parquet_batches
from sasrec.data.times import LIBRARY_BOUNDS, TimeBounds

log = logging.getLogger(__name__)

ROWS_PER_REPORT = 1000


class Event(NamedTuple):
    """One interaction. ``timestamp_ms`` is None where the file has none, ``outcome`` where it was not requested."""

    user_id: str
    item_id: str
    timestamp_ms: int | None
    outcome: float | None = None


def read_events(
    path: str | Path,
    columns: Columns = DEFAULT_COLUMNS,
    on_bytes: Callable[[int], None] | None = None,
    outcomes: bool = False,
    bounds: TimeBounds | None = None,
) -> Iterator[Event]:
    """Yield the events of a file in file order, or of the files in a folder in the order of their names.

    Args:
        columns: column names, separator and unit of timestamps where they are not the format's own.
        on_bytes: called with the bytes read so far (as they are on disk), for a progress bar.
        outcomes: read column outcome or rating, too.
        bounds: refuse times outside these. By default a time after ``LATEST_MS`` is refused, and earlier ones than
            ``EARLIEST_MS`` cause a warning, unless the unit was given: numbers that only order the rows may be small.

    Raises:
        DataFileError: a file is missing or of unknown format, a row is damaged, or a time is out of bounds.
    """
    names: tuple[str, ...] = (USER_ID, ITEM_ID, TIMESTAMP)
    if outcomes:
        names += (OUTCOME,) if columns.outcome else (OUTCOME, RATING)
    request = Request(names, frozenset((USER_ID, ITEM_ID)), columns)
    before = 0  # bytes of the files before
    for file in data_files(Path(path)):
        with reading(file), file.open("rb") as raw:

            def report(position: int, before: int = before) -> None:
                if on_bytes is not None:
                    on_bytes(before + position)

            events = _parquet_events if is_parquet(file, raw) else _text_events
            check = _TimeCheck(columns.timestamp_unit is None, bounds)
            yield from events(file, raw, request, check, None if on_bytes is None else report)
            before += file.stat().st_size


Report = Callable[[int], None] | None


class _TimeCheck:
    """Refuses times outside the bounds, or warns once.

    Args:
        guessed: whether the unit was not given.
        bounds: None: those of the library; times before them only cause a warning.
    """

    def __init__(self, guessed: bool, bounds: TimeBounds | None) -> None:
        self._bounds = bounds or LIBRARY_BOUNDS
        self._strict = bounds is not None
        self._warns = guessed
        self._low, self._high = self._bounds.earliest_ms, self._bounds.latest_ms

    def passes(self, time_ms: int | None) -> bool:
        """Return whether there is nothing to say about a time."""
        if time_ms is None or self._low <= time_ms <= self._high:
            return True
        # 0 is none to many writers
        return not self._strict and time_ms < self._low and (not self._warns or not time_ms)

    def report(self, where: str, time_ms: int, label: str, unit: str) -> None:
        """Refuse a time that does not pass, or warn of it.

        Raises:
            DataFileError: it is refused.
        """
        value = time_ms if unit == "ms" else time_ms / 1000 if time_ms % 1000 else time_ms // 1000
        problem = self._bounds.problem(label, value, unit)
        if self._strict or time_ms > self._high:
            raise DataFileError(f"{where}: {problem}; give the right unit (s or ms), or correct the row")
        log.warning("%s: %s; give the unit if it is wrong", where, problem)
        self._warns = False


def _parquet_events(
    path: Path, raw: BufferedReader, request: Request, check: _TimeCheck, report: Report
) -> Iterator[Event]:
    size, is_empty = path.stat().st_size, True
    for data, share in parquet_batches(path, raw, request):
        present = data.table.column_names
        users, items = checks.ids(data, USER_ID)[0], checks.ids(data, ITEM_ID)[0]
        times = [None] * len(users) if TIMESTAMP not in present else checks.timestamps(data).tolist()
        for row, time in enumerate(times):
            if time is not None and not check.passes(time):
                check.report(data.where(row), time, data.label(TIMESTAMP), data.timestamp_unit or "ms")
        good: list[float] | list[None] = [None] * len(users)
        if OUTCOME in request.names:
            if RATING in present and OUTCOME not in present:
                data = data.renamed(RATING, OUTCOME)
            elif OUTCOME not in present:
                raise DataFileError(f"{path}: there is no column outcome or rating; give every row one")
            good = checks.outcomes(data).tolist()
        yield from map(Event, users, items, times, good)
        is_empty = False
        if report is not None:
            report(int(size * share))
    if is_empty:
        raise DataFileError(f"{path} has no rows")


def _text_events(
    path: Path, raw: BufferedReader, request: Request, check: _TimeCheck, report: Report
) -> Iterator[Event]:
    with text_of(path, raw) as text:
        layout, lines = open_rows(path, text, request)
        labels = layout.labels
        factor = 1000 if layout.timestamp_unit == "s" else 1
        number = -1
        for number, (line, (user_id, item_id, time, *outcome)) in enumerate(rows(path, layout, lines)):
            if user_id is None or item_id is None or user_id == "" or item_id == "":
                which = labels[USER_ID if user_id is None or user_id == "" else ITEM_ID]
                raise DataFileError(f"{path}:{line}: {which} is empty; give every row both ids, or remove the row")
            timestamp_ms = None if time is None or time == "" else _timestamp(path, line, time, factor)
            if timestamp_ms is not None and not check.passes(timestamp_ms):
                check.report(f"{path}:{line}", timestamp_ms, labels[TIMESTAMP], layout.timestamp_unit)
            good = _outcome(path, line, outcome) if outcome else None
            yield Event(str(user_id), str(item_id), timestamp_ms, good)
            if report is not None and number % ROWS_PER_REPORT == 0:
                report(raw.tell())
        if number < 0:
            raise DataFileError(f"{path} has a header but no interactions")
        if report is not None:
            report(raw.tell())


def _timestamp(path: Path, line: int, time: object, factor: int) -> int:
    try:
        if isinstance(time, (bool, list, dict)):
            raise ValueError
        value = int(time) if isinstance(time, (int, str)) and str(time).lstrip("-").isdigit() else float(time)  # type: ignore[arg-type]
        timestamp_ms = round(value * factor)
        if not -(2**63) <= timestamp_ms < 2**63:
            raise OverflowError
    except (ValueError, OverflowError):
        raise DataFileError(
            f"{path}:{line}: timestamp {time!r} is not a Unix time in seconds or milliseconds"
        ) from None
    return timestamp_ms


def _outcome(path: Path, line: int, found: list[object]) -> float:
    value = next((one for one in found if one is not None), None)  # outcome before rating
    if value is None or value == "":
        raise DataFileError(f"{path}:{line}: the row has no outcome or rating; give every row one")
    try:
        if isinstance(value, (list, dict)):
            raise ValueError
        outcome = float(value)  # type: ignore[arg-type]
        if not math.isfinite(outcome):
            raise ValueError
    except (ValueError, OverflowError):
        raise DataFileError(f"{path}:{line}: outcome {value!r} is not a number") from None
    return outcome
