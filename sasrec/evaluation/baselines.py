"""Count-based recommenders, to compare the model with: popularity, Markov chain, sequential rules.

All three are one method. *Rules* "j came x events after i" are counted over the training sequences, with more weight
for smaller x. For a history, the rules of its newest items are looked up and their weights added per item: the item's
*evidence*. The Markov chain counts and looks up one step, popularity none.

Counts are often tied, and metrics count ties against a recommender. Hence scores are *levels*: the rank of an item's
evidence among the history's distinct values, with equal evidence ordered by popularity. Nothing is added to the
evidence, so popularity never reverses a real difference; items of equal evidence and equal popularity share a level.
Levels are whole numbers up to 2 * num_items, which float32 represents exactly for catalogues up to 8 million items.
They order the items of one history and cannot be compared across histories.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from sasrec.data.sequences import Indices, Sequences
from sasrec.data.vocab import PADDING

Floats = NDArray[np.float64]
Decay = Literal["linear", "reciprocal"]
# Evidence with a smaller relative difference is equal. It consists of sums and products of positive float64 numbers,
# whose rounding errors are far smaller (some 1e-15 a term).
TIE = 1e-12


class _Rules(NamedTuple):
    """Rules i -> j, sorted by (i, j): those of item i are at ``starts[i]:starts[i + 1]``."""

    starts: Indices  # (num_items + 2,)
    targets: Indices  # (R,)
    weights: Floats  # (R,) the weights of one item i sum to 1


class CountBaseline(ABC):
    """The common part of the baselines: ``fit`` counts, ``scores`` ranks. Fitting again starts anew."""

    _rules: _Rules | None = None
    _popularity: Indices  # (num_items + 1,) rank of each item's number of training events

    def fit(self, sequences: Sequences) -> Self:
        """Count the sequences, one per user; return self."""
        counts = np.bincount(sequences.items, minlength=len(sequences.vocab) + 1)
        counts[PADDING] = 0
        self._popularity = np.unique(counts, return_inverse=True)[1].astype(np.int64)
        self._rules = _count_rules(sequences, self._rule_weights())
        return self

    def scores(self, histories: Sequence[NDArray[np.int64]]) -> torch.Tensor:
        """Score every item after each history; higher is better.

        Items of a history without a known item, or without a rule, are ranked by popularity.

        Args:
            histories: item indices, oldest first; 0 stands for an unknown item and is ignored.

        Returns:
            (B, num_items + 1) float32: finite, except column 0 (padding), which is -inf.

        Raises:
            ValueError: nothing has been fitted, or a history holds an index outside the catalogue.
        """
        if self._rules is None:
            raise ValueError(f"{type(self).__name__} has counted nothing yet; call fit(sequences) before scores")
        items = len(self._popularity) - 1
        levels = np.tile(self._popularity.astype(np.float32), (len(histories), 1))  # (B, num_items + 1)
        for row, history in zip(levels, histories, strict=True):
            if len(history) and not 0 <= history.min() <= history.max() <= items:
                worst = history.min() if history.min() < 0 else history.max()
                raise ValueError(f"item index {worst} in a history; must lie between 0 and num_items={items}")
            evidence = self._evidence(self._rules, history[history != PADDING])
            found = np.flatnonzero(evidence)
            row[found] = self._popularity.max() + _levels(evidence[found], self._popularity[found])
        levels[:, PADDING] = -np.inf
        return torch.from_numpy(levels)

    @abstractmethod
    def _rule_weights(self) -> Floats:
        """Return the weights with which rules of distance 1, 2, ... are counted; longer ones are not."""

    @abstractmethod
    def _lookup_weights(self) -> Floats:
        """Return the weights of the newest item's rules, of the item before it, ...; older ones are not looked up."""

    def _evidence(self, rules: _Rules, history: Indices) -> Floats:
        """Return the evidence for each item, (num_items + 1,), at least 0, after a history of known items."""
        newest_first = history[::-1]
        evidence = np.zeros(len(self._popularity))
        for item, weight in zip(newest_first, self._lookup_weights(), strict=False):
            found = slice(rules.starts[item], rules.starts[item + 1])
            evidence[rules.targets[found]] += rules.weights[found] * weight  # one item's targets are distinct
        return evidence


@dataclass(kw_only=True)
class Popularity(CountBaseline):
    """Ranks items by their number of training events; ignores the history."""

    def _rule_weights(self) -> Floats:
        return np.zeros(0)

    def _lookup_weights(self) -> Floats:
        return np.zeros(0)


@dataclass(kw_only=True)
class MarkovChain(CountBaseline):
    """First-order Markov chain: counts which items directly followed the history's newest item.

    Source: Ludewig & Jannach, Evaluation of session-based recommendation algorithms, UMUAI 2018, baseline
    "Markov chains" (MC). Equal to SequentialRules(last=1).
    """

    def _rule_weights(self) -> Floats:
        return np.ones(1)

    def _lookup_weights(self) -> Floats:
        return np.ones(1)


@dataclass(kw_only=True)
class SequentialRules(CountBaseline):
    """Rules over up to ``last`` events, looked up for the newest ``last`` items of a history.

    A rule i -> j adds 1/x for every time that j came x events after i in a sequence, divided by the sum of all rules of
    i. The paper looks up only the newest item's rules, where this division changes no rank. Here the newest ``last``
    items are looked up, each weighted by ``decay``; without the division the rules of popular items would outweigh all
    others.

    Args:
        last: the longest distance of a rule, and the number of a history's items that are looked up.
        decay: weight of an item with d events after it: 1 - d / last ("linear") or 1 / (d + 1) ("reciprocal").
        remind: evidence added to each item of the history: remind / (d + 1) with d events after it. (The rules of the
            newest item sum to 1.) For click data, where many clicks repeat an item of the session.

    Raises:
        ValueError: an option is out of its range.

    Source: Ludewig & Jannach, Evaluation of session-based recommendation algorithms, UMUAI 2018, baseline
    "sequential rules" (SR), which normalises by a count of i's rules instead of by their weights.
    """

    last: int = 10
    decay: Decay = "reciprocal"
    remind: float = 0.0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"last={self.last}: must be at least 1")
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay={self.decay!r}: must be one of {', '.join(get_args(Decay))}")
        if not 0 <= self.remind < math.inf:
            raise ValueError(f"remind={self.remind}: must be at least 0 and finite")

    def _rule_weights(self) -> Floats:
        return _reciprocals(self.last)

    def _lookup_weights(self) -> Floats:
        linear = np.arange(self.last, 0, -1) / self.last
        return linear if self.decay == "linear" else _reciprocals(self.last)

    def _evidence(self, rules: _Rules, history: Indices) -> Floats:
        evidence = super()._evidence(rules, history)
        if self.remind:
            items, age = np.unique(history[::-1], return_index=True)  # if an item was clicked twice, the newer click
            evidence[items] += self.remind / (age + 1)
        return evidence


def all_baselines() -> dict[str, CountBaseline]:
    """Return every baseline, with default options and not yet fitted, by its name in tables."""
    return {"popularity": Popularity(), "Markov chain": MarkovChain(), "sequential rules": SequentialRules()}


def _reciprocals(last: int) -> Floats:
    """Return 1/1, 1/2, ... 1/last, (last,)."""
    return 1 / np.arange(1, last + 1)


def _levels(evidence: Floats, popularity: Indices) -> Indices:
    """Return each item's rank among the distinct (evidence, popularity) pairs, worst first, from 1; (N,)."""
    order = np.argsort(evidence)
    rises = evidence[order[1:]] > evidence[order[:-1]] * (1 + TIE)
    place = np.zeros(len(order), np.int64)
    place[order[1:]] = np.cumsum(rises)
    order = np.lexsort((popularity, place))
    rises = (np.diff(place[order]) > 0) | (np.diff(popularity[order]) > 0)
    levels = np.ones(len(order), np.int64)
    levels[order[1:]] += np.cumsum(rises)
    return levels


def _count_rules(sequences: Sequences, weights: Floats) -> _Rules:
    """Sum the weights of all pairs of one user's events at distances 1 to len(weights), normalised by source."""
    width = len(sequences.vocab) + 1
    user = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    keys, sums = np.zeros(0, np.int64), np.zeros(0)  # (R,) i * width + j, sorted; the rule's weight
    for distance, weight in enumerate(weights, start=1):
        same = user[distance:] == user[:-distance]
        pairs = sequences.items[:-distance][same] * width + sequences.items[distance:][same]
        found, counts = np.unique(pairs, return_counts=True)
        keys, sums = _merge(np.concatenate((keys, found)), np.concatenate((sums, counts * weight)))
    source, target = np.divmod(keys, width)
    totals = np.bincount(source, sums, minlength=width)
    starts = np.searchsorted(source, np.arange(width + 1))
    return _Rules(starts, target, sums / totals[source])


def _merge(keys: Indices, sums: Floats) -> tuple[Indices, Floats]:
    """Sort by key, and sum equal keys."""
    order = np.argsort(keys, kind="stable")  # two sorted runs: one merge
    keys, sums = keys[order], sums[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(sums, first) if len(first) else sums
