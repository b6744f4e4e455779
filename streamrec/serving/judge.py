"""Online quality: each click is evaluated against the list that its user saw before the click.

The publish script returns the previous list, so this costs no round trip. A user without a list saw the popular list,
which is evaluated then. On every click the popular list, without the items this user has seen, is evaluated too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from streamrec.errors import StreamrecError
from streamrec.logs import LogOnce
from streamrec.schemas import NO_ITEMS, UserSequence, parse_published
from streamrec.serving.lists import POPULAR, SharedLists
from streamrec.serving.online import OnlineCounts

log = logging.getLogger(__name__)

K = 10


@dataclass(frozen=True, slots=True)
class EvaluatedClicks:
    """A user's new clicks, and the ``items`` that the user saw before them.

    ``n`` is the number of the user's events before these clicks. ``popular_hits`` clicks were in the popular list.
    """

    user_id: str
    n: int
    clicks: list[str]
    items: list[str]
    popular_hits: int


class OnlineJudge:
    """Counts evaluated clicks, hits@10 and reciprocal ranks@10 by the model version that made the list."""

    def __init__(self, lists: SharedLists, counts: OnlineCounts, filter_seen: bool) -> None:
        self._lists = lists
        self._counts = counts
        self._filter_seen = filter_seen
        self._warning = LogOnce(log)

    def evaluate(self, sequences: Sequence[UserSequence], previous: Sequence[bytes | None]) -> list[EvaluatedClicks]:
        """Evaluate the newly applied clicks.

        Args:
            previous: the value of each user's list before this batch was published; None if there was none.
        """
        try:
            evaluated = [
                self._evaluate(sequence, value)
                for sequence, value in zip(sequences, previous, strict=True)
                if sequence.clicks
            ]
        except Exception as error:  # figures are a help: clicks continue without them
            self._warning("the clicks of a batch are not judged: %s", repr(error))
            return []
        return [clicks for clicks in evaluated if clicks is not None]

    def _evaluate(self, sequence: UserSequence, previous: bytes | None) -> EvaluatedClicks | None:
        n = sequence.n - sequence.applied
        if previous:
            try:
                listed = parse_published(sequence.user_id, previous)
            except StreamrecError:  # another program wrote the value; the daemon has just replaced it
                return None
            if listed.n > n:  # the reply to an earlier attempt was lost: this list counts the clicks already
                return None
            model, items = listed.model, listed.items[:K]
        else:
            seen = sequence.before if self._filter_seen else NO_ITEMS
            model, items = POPULAR, self._lists.popular_for(seen, K).items
        popular_hits = self._lists.popular_hits(sequence, K, self._filter_seen)
        self._counts.count(model, sequence.clicks, items, popular_hits)
        return EvaluatedClicks(sequence.user_id, n, sequence.clicks, items, popular_hits)
