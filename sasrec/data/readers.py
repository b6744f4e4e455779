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

log = logging.getLogger(__name__)

# A timestamp below this, read as ms, is before 1973: it was almost surely in seconds.
SECONDS_SUSPECTED_BELOW_MS = 100_000_000_000
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
) -> Iterator[Event]:
    """Yield the events of a file in file order, or of the files in a folder in the order of their names.

    Args:
        columns: column names, separator and unit of timestamps where they are not the format's own.
        on_bytes: called with the bytes read so far (as they are on disk), for a progress bar.
        outcomes: read column outcome or rating, too.

    Raises:
        DataFileError: a file is missing or of unknown format, or a row is damaged.
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
            yield from events(file, raw, request, None if on_bytes is None else report)
            before += file.stat().st_size


Report = Callable[[int], None] | None


def _parquet_events(path: Path, raw: BufferedReader, request: Request, report: Report) -> Iterator[Event]:
    size, is_empty = path.stat().st_size, True
    suspect = request.columns.timestamp_unit is None
    for data, share in parquet_batches(path, raw, request):
        present = data.table.column_names
        users, items = checks.ids(data, USER_ID)[0], checks.ids(data, ITEM_ID)[0]
        times = [None] * len(users) if TIMESTAMP not in present else checks.timestamps(data).tolist()
        if suspect and TIMESTAMP in present:
            row = next((row for row, time in enumerate(times) if time is not None and _is_suspect(time)), None)
            if row is not None:
                _warn(data.where(row), times[row])
                suspect = False
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


def _text_events(path: Path, raw: BufferedReader, request: Request, report: Report) -> Iterator[Event]:
    with text_of(path, raw) as text:
        layout, lines = open_rows(path, text, request)
        labels = layout.labels
        factor = 1000 if layout.timestamp_unit == "s" else 1
        suspect = request.columns.timestamp_unit is None and factor == 1
        number = -1
        for number, (line, (user_id, item_id, time, *outcome)) in enumerate(rows(path, layout, lines)):
            if user_id is None or item_id is None or user_id == "" or item_id == "":
                which = labels[USER_ID if user_id is None or user_id == "" else ITEM_ID]
                raise DataFileError(f"{path}:{line}: {which} is empty; give every row both ids, or remove the row")
            timestamp_ms = None if time is None or time == "" else _timestamp(path, line, time, factor)
            if suspect and timestamp_ms is not None and _is_suspect(timestamp_ms):
                _warn(f"{path}:{line}", time)
                suspect = False
            good = _outcome(path, line, outcome) if outcome else None
            yield Event(str(user_id), str(item_id), timestamp_ms, good)
            if report is not None and number % ROWS_PER_REPORT == 0:
                report(raw.tell())
        if number < 0:
            raise DataFileError(f"{path} has a header but no interactions")
        if report is not None:
            report(raw.tell())


def _is_suspect(timestamp_ms: int) -> bool:
    return 0 < timestamp_ms < SECONDS_SUSPECTED_BELOW_MS


def _warn(where: str, time: object) -> None:
    log.warning(
        "%s: timestamp %s looks like seconds, but is read as milliseconds; give the unit if it is wrong", where, time
    )


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
