"""Sort interactions in time, group them into sequences of model indices per user, and split off test cases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from sasrec.data.formats import DataFileError
from sasrec.data.readers import Event
from sasrec.data.vocab import PADDING, ItemVocab

Indices = NDArray[np.int64]
Outcomes = NDArray[np.float32]


@dataclass(frozen=True)
class Interactions:
    """Events as columns, each (N,), in stream order: by time, ties in file order.

    ``outcomes`` say how good an event was, for example a rating; None where all events count alike.
    """

    user_ids: list[str]
    item_ids: list[str]
    timestamps_ms: Indices
    outcomes: Outcomes | None = None

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Interactions:
        """Collect and sort events. The sort is stable: most neighbours in ML-1M share a timestamp.

        Raises:
            DataFileError: there are no events, or only some rows have a timestamp.
        """
        rows = list(events)
        if not rows:
            raise DataFileError("there are no interactions in the data")
        untimed = sum(row.timestamp_ms is None for row in rows)
        if 0 < untimed < len(rows):
            raise DataFileError(f"{untimed} of {len(rows)} rows have no timestamp; give all of them one, or none")
        times = np.array([row.timestamp_ms or 0 for row in rows], np.int64)
        unrated = rows[0].outcome is None
        outcomes = None if unrated else np.array([row.outcome for row in rows], np.float32)
        return cls([row.user_id for row in rows], [row.item_id for row in rows], times, outcomes).in_order()

    def in_order(self, by: Indices | None = None) -> Interactions:
        """Return the events sorted by time, or by other keys (N,); ties keep their order."""
        order = np.argsort(self.timestamps_ms if by is None else by, kind="stable")
        outcomes = None if self.outcomes is None else self.outcomes[order]
        places = order.tolist()
        users, items = [self.user_ids[i] for i in places], [self.item_ids[i] for i in places]
        return Interactions(users, items, self.timestamps_ms[order], outcomes)

    def __len__(self) -> int:
        return len(self.item_ids)

    def at_least_outcome(self, least: float) -> Interactions:
        """Return the events with an outcome of at least ``least``.

        Raises:
            ValueError: there are no outcomes.
        """
        if self.outcomes is None:
            raise ValueError("these interactions have no outcomes to compare")
        return self.where(self.outcomes >= least)

    def at_least(self, user_events: int = 1, item_events: int = 1) -> Interactions:
        """Drop items with fewer events, then users with fewer events."""
        frequent = self._with_frequent(self.item_ids, item_events)
        return frequent._with_frequent(frequent.user_ids, user_events)

    def split_at(self, fraction: float) -> tuple[Interactions, Interactions]:
        """Return the first ``fraction`` of the events, and the rest."""
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction={fraction}: must lie between 0 and 1")
        cut = int(len(self) * fraction)
        return self._take(slice(0, cut)), self._take(slice(cut, None))

    def first(self, count: int) -> Interactions:
        """Return the first ``count`` events."""
        return self._take(slice(0, count))

    def newest(self, count: int) -> Interactions:
        """Return the last ``count`` events."""
        return self._take(slice(max(0, len(self) - count), None))

    def _take(self, part: slice) -> Interactions:
        outcomes = None if self.outcomes is None else self.outcomes[part]
        return Interactions(self.user_ids[part], self.item_ids[part], self.timestamps_ms[part], outcomes)

    def _with_frequent(self, ids: list[str], events: int) -> Interactions:
        _, codes, counts = np.unique(np.array(ids, dtype=object), return_inverse=True, return_counts=True)
        return self.where(counts[codes] >= events)

    def where(self, mask: NDArray[np.bool_]) -> Interactions:
        """Return the events that a mask (N,) marks."""
        users, items = compress(self.user_ids, mask), compress(self.item_ids, mask)
        outcomes = None if self.outcomes is None else self.outcomes[mask]
        return Interactions(list(users), list(items), self.timestamps_ms[mask], outcomes)


@dataclass(frozen=True)
class Sequences:
    """Every user's events as model indices, oldest first, in one flat array.

    ``items[offsets[u]:offsets[u + 1]]`` is the sequence of ``user_ids[u]``. Events on items outside the
    vocabulary are dropped, as in the engine.
    """

    vocab: ItemVocab
    user_ids: tuple[str, ...]
    offsets: Indices  # (U + 1,)
    items: Indices  # (N,)
    outcomes: Outcomes | None = None  # (N,)

    @classmethod
    def build(cls, interactions: Interactions, vocab: ItemVocab) -> Sequences:
        """Group interactions by user, each user's in their order."""
        codes: dict[str, int] = {}
        users = np.array([codes.setdefault(user, len(codes)) for user in interactions.user_ids], np.int64)
        items = np.array(vocab.encode(interactions.item_ids), np.int64)
        known = items != PADDING
        users, items = users[known], items[known]
        order = np.argsort(users, kind="stable")
        offsets = np.concatenate(([0], np.cumsum(np.bincount(users, minlength=len(codes)))))
        outcomes = None if interactions.outcomes is None else interactions.outcomes[known][order]
        return cls(vocab, tuple(codes), offsets.astype(np.int64), items[order], outcomes)

    def __len__(self) -> int:
        return len(self.user_ids)

    def __getitem__(self, user: int) -> Indices:
        if not 0 <= user < len(self):
            raise IndexError(user)
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def leave_last_out(self, users: int | None = None, seed: int = 0) -> tuple[Sequences, Holdout]:
        """Split off each user's last event as a target; return the events before it and the targets.

        Users with fewer than two events give no target, as nothing predicts it; their events are all returned.

        Args:
            users: take targets of this number of users, drawn at random; of all users by default.
        """
        lengths = np.diff(self.offsets)
        split = lengths >= 2  # (U,) users who give a target
        if users is not None and split.sum() > users:
            chosen = np.random.default_rng(seed).choice(np.flatnonzero(split), users, replace=False)
            split = np.isin(np.arange(len(lengths)), chosen)
        train_lengths = lengths - split
        offsets = np.concatenate(([0], np.cumsum(train_lengths)))
        within = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], lengths)
        rest = within < np.repeat(train_lengths, lengths)
        outcomes = None if self.outcomes is None else self.outcomes[rest]
        train = Sequences(self.vocab, self.user_ids, offsets, self.items[rest], outcomes)
        histories = [train[int(user)] for user in np.flatnonzero(split)]
        return train, Holdout(histories, self.items[self.offsets[1:][split] - 1])

    def each_after_the_first(self, which: NDArray[np.bool_] | None = None) -> Holdout:
        """Return every event but each user's first as a target, with the user's earlier events as history.

        Args:
            which: (N,) marks the events to return; all by default.
        """
        starts = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        later = np.arange(len(starts)) > starts
        targets = np.flatnonzero(later if which is None else later & which)
        return Holdout([self.items[starts[at] : at] for at in targets], self.items[targets])


@dataclass(frozen=True)
class Holdout:
    """Test cases: ``targets[i]`` followed ``histories[i]`` (indices, oldest first)."""

    histories: list[Indices]
    targets: Indices

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, size: int, seed: int) -> Holdout:
        """Return at most ``size`` cases, drawn at random by ``seed``."""
        if len(self) <= size:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), size, replace=False))
        return Holdout([self.histories[i] for i in chosen], self.targets[chosen])
