"""The clicks of a round: the last days, in one order of time, split into training and held-out clicks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sasrec import Interactions
from streamrec.errors import RetrainError

MIN_HOLDOUT_CLICKS = 500
DAY_MS = 86_400_000


def recent(events: Interactions, days: float) -> Interactions:
    """Return the events of the last days before the newest one, as a timeline.

    Raises:
        RetrainError: there are no events.
    """
    if not len(events):
        raise RetrainError(
            "the archive is empty; fill it with: streamrec archive follow, or streamrec archive import FILE"
        )
    return timeline(events.where(events.timestamps_ms >= events.timestamps_ms.max() - days * DAY_MS))


def timeline(events: Interactions) -> Interactions:
    """Sort the events of all users by time, and leave those of each user in the order of arrival.

    A click with an older timestamp than the user's click before it counts as simultaneous with that click: the
    daemon applied the two in this order.
    """
    latest: dict[str, int] = {}
    times = []
    for user, ts_ms in zip(events.user_ids, events.timestamps_ms.tolist(), strict=True):
        latest[user] = max(ts_ms, latest.get(user, ts_ms))
        times.append(latest[user])
    return events.in_order(np.array(times, np.int64))


def split(
    events: Interactions, holdout_share: float, trained_until_ms: int | None
) -> tuple[Interactions, Interactions]:
    """Return the clicks to train on, and the newest ones, held out to compare models.

    The champion was trained on none of the held-out clicks. If few clicks are new to the champion, half of them are
    held out, but at least MIN_HOLDOUT_CLICKS: the share of a long archive would leave no new click to train on.

    Args:
        trained_until_ms: time of the newest click that the champion was trained on.

    Raises:
        RetrainError: the champion was trained on all clicks, or one of the two parts would be empty.
    """
    begin = int(len(events) * (1 - holdout_share))
    if trained_until_ms is not None:
        new = np.flatnonzero(np.maximum.accumulate(events.timestamps_ms) > trained_until_ms)
        if not len(new):
            raise RetrainError(
                "the champion was trained on all clicks of the archive: wait for new clicks to compare models on"
            )
        begin = max(begin, int(new[0]), len(events) - max(MIN_HOLDOUT_CLICKS, len(new) // 2))
    if not 0 < begin < len(events):
        raise RetrainError(f"{len(events)} events are too few to hold {holdout_share:.0%} out and train on the rest")
    return events.first(begin), events.newest(len(events) - begin)


def sessions(events: Interactions, gap_ms: float) -> Interactions:
    """Give each session a user id of its own: the daemon begins a new sequence after a pause longer than the gap."""
    if not gap_ms:
        return events
    number: dict[str, int] = {}
    last: dict[str, int] = {}
    users = []
    for user, ts_ms in zip(events.user_ids, events.timestamps_ms.tolist(), strict=True):
        if user in last and ts_ms - last[user] > gap_ms:
            number[user] = number.get(user, 0) + 1
        last[user] = ts_ms
        users.append(f"{number.get(user, 0)}\0{user}")
    return replace(events, user_ids=users)
