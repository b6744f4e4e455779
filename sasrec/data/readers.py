"""Stream interactions from a file, one event at a time: any format of :mod:`sasrec.data.presets`, or Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from sasrec.data import checks
from sasrec.data.formats import (
    DEFAULT_COLUMNS,
    EVENT_TYPE,
    ITEM_ID,
    OUTCOME,
    RATING,
    TIMESTAMP,
    USER_ID,
    Columns,
    DataFileError,
)
from sasrec.data.layouts import Request
from sasrec.data.sources import batches
from sasrec.data.tables import Data
from sasrec.data.times import TimeBounds
from sasrec.data.timestamps import timestamps


class Event(NamedTuple):
    """One interaction. ``timestamp_ms`` is None where the file's order is the time, ``outcome`` if not requested."""

    user_id: str
    item_id: str
    timestamp_ms: int | None
    outcome: float | None = None
    event_type: str | None = None


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
        bounds: refuse times outside these.

    Raises:
        DataFileError: a file is missing or of unknown format, a row is damaged, a time is out of bounds or probably in
            another unit, or there are no rows. The events before a damaged row were yielded.
    """
    names: tuple[str, ...] = (USER_ID, ITEM_ID, TIMESTAMP, EVENT_TYPE)
    if outcomes:
        names += (OUTCOME,) if columns.outcome else (OUTCOME, RATING)
    request = Request.of(names, (USER_ID, ITEM_ID, TIMESTAMP), columns)
    order, before, rows = checks.FileOrder(str(path)), 0, 0
    last: Data | None = None
    for data in batches(Path(path), request):
        rows += len(data.table)
        yield from _events(data, outcomes, bounds, order)
        before += last.read_bytes if last is not None and last.name != data.name else 0
        last = data
        if on_bytes is not None:
            on_bytes(before + data.read_bytes)
    if not rows:
        raise DataFileError(f"{path} has no rows") if last is None else last.no_rows(path, columns.event_types)
    order.finish()


def _events(data: Data, outcomes: bool, bounds: TimeBounds | None, order: checks.FileOrder) -> Iterator[Event]:
    """Yield the events of a batch; where a row is damaged, yield those before it first."""
    failure: DataFileError | None = None
    if outcomes:
        data = checks.with_outcome(data)
    while True:
        try:
            typed = data.typed(ids=False)
            checks.refuse_header(typed)
            users, items = checks.ids(typed, USER_ID)[0], checks.ids(typed, ITEM_ID)[0]
            times = None if TIMESTAMP not in typed.table.column_names else timestamps(typed, bounds)
            good = checks.outcomes(typed).tolist() if outcomes else repeat(None)
            break
        except DataFileError as error:
            if error.row is None:
                raise
            failure, data = error, data.up_to(error.row)  # an earlier row may be damaged, too
    if times is not None:
        order.add(times)
    kinds = checks.event_types(data)
    yield from map(Event, users, items, repeat(None) if times is None else times.tolist(), good, kinds)
    if failure is not None:
        raise failure
