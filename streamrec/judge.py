"""Online quality: every click is a free label. Was it in the list that its user saw before it?

What was published before is what the publish script returns, so judging costs no round trip. Of a user
without a list the popular list was shown, and is judged. Beside each, the popular list as this user would
have seen it is judged on the same click.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamrec.errors import StreamrecError
from streamrec.lists import POPULAR, SharedLists
from streamrec.metrics import Metrics
from streamrec.schemas import UserSequence, parse_published

K = 10


class OnlineJudge:
    """Counts, by the model version that made the list: clicks judged, hits@10, reciprocal ranks@10."""

    def __init__(self, lists: SharedLists, metrics: Metrics, filter_seen: bool) -> None:
        self._lists = lists
        self._metrics = metrics
        self._filter_seen = filter_seen

    def judge(self, sequences: Sequence[UserSequence], before: Sequence[bytes | None]) -> None:
        """Judge the clicks that were newly applied.

        Args:
            before: the value of each user's list before this batch was published, None where there was none.
        """
        for sequence, value in zip(sequences, before, strict=True):
            # of a new session, or of more clicks than are kept, only the items that are there can be judged
            clicks = sequence.items[-sequence.applied :] if sequence.applied else []
            if clicks:
                self._judge(sequence, clicks, value)

    def _judge(self, sequence: UserSequence, clicks: list[str], value: bytes | None) -> None:
        seen = sequence.items[: -len(clicks)] if self._filter_seen else []
        popular = self._lists.popular_for(seen, K).items
        model, items = POPULAR, popular
        if value:
            try:
                listed = parse_published(sequence.user_id, value)
            except StreamrecError:  # somebody else wrote there; it has just been replaced
                return
            if listed.n > sequence.n - sequence.applied:
                return  # the answer to an earlier try was lost: this list knows the clicks already
            model, items = listed.model, listed.items[:K]
        metrics = self._metrics
        metrics.judged.labels(model).inc(len(clicks))
        metrics.hits.labels(model).inc(sum(click in items for click in clicks))
        metrics.reciprocal_ranks.labels(model).inc(sum(1 / (items.index(c) + 1) for c in clicks if c in items))
        metrics.popularity_hits.labels(model).inc(sum(click in popular for click in clicks))
