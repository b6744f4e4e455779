"""Cut sequences into training windows, and windows into batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sasrec.data.sequences import Indices, Outcomes, Sequences

# Windows whose lengths differ by less than this may share a batch, so that batches vary from epoch to epoch.
BUCKET_NOISE_TOKENS = 8


class TrainingWindows:
    """Cut sequences into windows so that every event but each user's first is a target exactly once.

    Windows are cut from the newest end, so that the newest is the fullest. No prefix is expanded: a window of
    T tokens trains T predictions.

    Args:
        newest: cut only the newest window of each user; older events are not trained on.

    Raises:
        ValueError: no user has two events.
    """

    def __init__(self, sequences: Sequences, max_len: int, newest: bool = False) -> None:
        targets = np.maximum(np.diff(sequences.offsets) - 1, 0)  # (U,) predictions a user
        per_user = -(-targets // max_len)
        if newest:
            per_user = np.minimum(per_user, 1)
        if not per_user.sum():
            raise ValueError("no user has two or more known events; there is nothing to learn a next item from")
        user = np.repeat(np.arange(len(sequences)), per_user)
        nth = np.arange(len(user)) - np.repeat(np.cumsum(per_user) - per_user, per_user)  # 0 = newest window
        last = targets[user] - nth * max_len  # within the user: the window's targets end here
        first = np.maximum(last - max_len, 0)
        self.starts: Indices = sequences.offsets[user] + first
        self.lengths: Indices = last - first
        self._user, self._later = user, targets[user] - last  # the user's events that came after the window
        self._items = sequences.items
        self._num_items = len(sequences.vocab)
        self._outcomes = sequences.outcomes

    def __len__(self) -> int:
        return len(self.starts)

    def target_share(self, which: Indices | None = None) -> NDArray[np.float64]:
        """Return each item's share of the targets in these windows, or in all, (num_items + 1,)."""
        starts, lengths = (self.starts, self.lengths) if which is None else (self.starts[which], self.lengths[which])
        before = np.cumsum(lengths) - lengths
        targets = np.repeat(starts + 1 - before, lengths) + np.arange(lengths.sum())
        share: NDArray[np.float64] = np.bincount(self._items[targets], minlength=self._num_items + 1) / len(targets)
        return share

    def with_new(self, new_events: Indices) -> NDArray[np.bool_]:
        """Mark the windows (W,) with one of the last ``new_events[u]`` events of user u as a target."""
        marked: NDArray[np.bool_] = self._later < new_events[self._user]
        return marked

    def batches(
        self, batch_size: int, rng: np.random.Generator, which: Indices | None = None
    ) -> Iterator[tuple[Indices, Indices, Outcomes | None]]:
        """Yield one epoch of (items, targets, outcomes of the targets), each (B, T).

        Padding follows a row's tokens. The windows of a batch have similar lengths.

        Args:
            which: the windows of the epoch; all by default.
        """
        which = np.arange(len(self)) if which is None else which
        order = which[np.argsort(self.lengths[which] + rng.uniform(0, BUCKET_NOISE_TOKENS, len(which)))]
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for chosen in rng.permutation(len(chunks)):
            rows = chunks[chosen]
            columns = np.arange(self.lengths[rows].max())
            real = columns < self.lengths[rows, None]  # (B, T)
            at = np.where(real, self.starts[rows, None] + columns, 0)
            after = np.where(real, at + 1, 0)
            outcomes = None if self._outcomes is None else self._outcomes[after]
            yield self._items[at] * real, self._items[after] * real, outcomes
