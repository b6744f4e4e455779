"""The newest time of a user, where a session begins, and archived times that are none.

    The newest time of a user is the largest timestamp of the applied clicks, in whatever order these came.
    A click begins a new session if its timestamp lies more than the gap after the newest time of the clicks before it.
    Every other click belongs to the current session, however late it came.

append.lua applies this rule click by click, and this module to all past clicks.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from sasrec.data.times import TimeBounds

log = logging.getLogger(__name__)


def newest_ms(users: NDArray[np.integer], times_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the newest time of each click's user up to and including this click, (N,).

    Args:
        users: (N,) a number of the user of each click, at least 0; the clicks of a user in the order of arrival.
        times_ms: (N,) timestamps.
    """
    order = np.argsort(users, kind="stable")
    values, ranks = np.unique(times_ms[order], return_inverse=True)
    begins = users[order].astype(np.int64) * len(values)  # the maximum of a user never reaches into the next one's
    newest = np.empty_like(times_ms)
    newest[order] = values[np.maximum.accumulate(begins + ranks.reshape(-1)) - begins]
    return newest


def pauses_ms(users: NDArray[np.integer], times_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how far each click lies after the newest time of its user before it, (N,); 0 for a user's first click.

    A late click has a negative pause. Arguments as for ``newest_ms``.
    """
    order = np.argsort(users, kind="stable")
    newest, times = newest_ms(users, times_ms)[order], times_ms[order]
    pauses = np.zeros(len(times), np.int64)
    pauses[1:] = np.where(np.diff(users[order]) == 0, times[1:] - newest[:-1], 0)
    found = np.empty_like(pauses)
    found[order] = pauses
    return found


def usable(times_ms: NDArray[np.int64], bounds: TimeBounds, archive: object) -> NDArray[np.bool_]:
    """Return which clicks of an archive to use, (N,): those after the bounds are skipped, with a warning.

    One click of the year 55,000 would make all others too old. Times before the bounds cause a warning only: they are
    old in any case. New clicks cannot bring either; an archive may have them from before their import was checked.

    Args:
        archive: where the clicks are, for the warning.
    """
    late, early = times_ms > bounds.latest_ms, times_ms < bounds.earliest_ms
    for wrong, what in ((late, "skipped"), (early, "very old")):
        if wrong.any():
            log.warning(
                "%d clicks in %s are %s: %s; if a file was imported with the wrong unit, remove it "
                "(`streamrec archive remove`) and import it again with --timestamp-unit; else check this clock",
                wrong.sum(),
                archive,
                what,
                bounds.problem("timestamp_ms", int(times_ms[wrong.argmax()])),
            )
    return ~late
