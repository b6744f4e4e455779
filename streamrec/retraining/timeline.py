"""The clicks of a round: the last days, in one order of time, split into training and held-out clicks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sasrec import Interactions
from streamrec.errors import RetrainError
from streamrec.event_times import newest_ms, pauses_ms

MIN_HOLDOUT_CLICKS = 500
DAY_MS = 86_400_000


def recent(events: Interactions, days: float) -> Interactions:
    """Return the events of the last days before the newest one, as a timeline.

    Args:
        events: without times that are none, or all others would be too old.

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
    return events.in_order(newest_ms(_numbers(events.user_ids), events.timestamps_ms))


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
    users = _numbers(events.user_ids)
    begins = pauses_ms(users, events.timestamps_ms) > gap_ms
    number = [0] * len(set(events.user_ids))
    names = []
    for user_id, user, new in zip(events.user_ids, users.tolist(), begins.tolist(), strict=True):
        number[user] += new
        names.append(f"{number[user]}\0{user_id}")
    return replace(events, user_ids=names)


def _numbers(user_ids: list[str]) -> NDArray[np.int64]:
    """Return a number for each user."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(user, len(known)) for user in user_ids], np.int64)
