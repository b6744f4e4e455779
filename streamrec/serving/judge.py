"""Online quality: every click is a free label. Was it in the list that its user saw before it?

What was published before is what the publish script returns, so judging costs no round trip. Of a user
without a list the popular list was shown, and is judged. Beside each, the popular list as this user would
have seen it is judged on the same click.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamrec.errors import StreamrecError
from streamrec.schemas import UserSequence, parse_published
from streamrec.serving.lists import POPULAR, SharedLists
from streamrec.serving.online import OnlineCounts

K = 10


@dataclass(frozen=True, slots=True)
class Judged:
    """Clicks that judged a published list, and what their user could see, or might have seen, before them.

    ``n`` is the number of the user's events before these clicks; ``popular_hits`` of them were in the popular list.
    """

    user_id: str
    n: int
    clicks: list[str]
    items: list[str]
    popular_hits: int


class OnlineJudge:
    """Counts, by the model version that made the list: clicks judged, hits@10, reciprocal ranks@10."""

    def __init__(self, lists: SharedLists, counts: OnlineCounts, filter_seen: bool) -> None:
        self._lists = lists
        self._counts = counts
        self._filter_seen = filter_seen

    def judge(self, sequences: Sequence[UserSequence], before: Sequence[bytes | None]) -> list[Judged]:
        """Judge the clicks that were newly applied.

        Args:
            before: the value of each user's list before this batch was published, None where there was none.
        """
        judged = []
        for sequence, value in zip(sequences, before, strict=True):
            if sequence.clicks:
                judged += self._judge(sequence, value)
        return judged

    def _judge(self, sequence: UserSequence, value: bytes | None) -> list[Judged]:
        seen = sequence.before if self._filter_seen else b""
        n = sequence.n - sequence.applied
        if value:
            try:
                listed = parse_published(sequence.user_id, value)
            except StreamrecError:  # somebody else wrote there; it has just been replaced
                return []
            if listed.n > n:
                return []  # the answer to an earlier try was lost: this list knows the clicks already
            model, items = listed.model, listed.items[:K]
        else:
            model, items = POPULAR, self._lists.popular_for(seen, K).items
        judged = Judged(sequence.user_id, n, sequence.clicks, items, self._lists.popular_hits(sequence.clicks, seen, K))
        self._counts.count(model, judged.clicks, judged.items, judged.popular_hits)
        return [judged]
