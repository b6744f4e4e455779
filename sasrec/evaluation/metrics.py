"""Ranking metrics over the full catalogue, for anything that scores it: an Engine, or a baseline.

A target's rank is the number of other allowed items that score at least as high. So ties count against the model, and
constant scores earn nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.sequences import Holdout, Indices
from sasrec.data.vocab import PADDING

EVALUATE_ROWS = 256


@dataclass(frozen=True)
class Metrics:
    """Means over all cases, by cut-off k. HR is the hit rate (recall, with one target per case)."""

    cases: int
    hr: dict[int, float]
    ndcg: dict[int, float]
    mrr: dict[int, float]

    def as_dict(self) -> dict[str, float]:
        """Return a flat dictionary: {"hr@10": ..., "ndcg@10": ..., "mrr@10": ..., "cases": ...}."""
        flat: dict[str, float] = {"cases": self.cases}
        for name, by_k in (("hr", self.hr), ("ndcg", self.ndcg), ("mrr", self.mrr)):
            flat |= {f"{name}@{k}": value for k, value in by_k.items()}
        return flat


def metrics_from_ranks(ranks: NDArray[np.float64], ks: Iterable[int]) -> Metrics:
    """Compute metrics from 0-based ranks (N,); infinity means that no list can contain the target."""
    if not len(ranks):
        raise ValueError("there is no case to evaluate; give at least one history with a target")
    hr, ndcg, mrr = {}, {}, {}
    for k in ks:
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        hit = ranks < k
        hr[k] = float(hit.mean())
        ndcg[k] = float(np.where(hit, 1 / np.log2(np.where(hit, ranks, 0) + 2), 0).mean())
        mrr[k] = float(np.where(hit, 1 / (np.where(hit, ranks, 0) + 1), 0).mean())
    return Metrics(len(ranks), hr, ndcg, mrr)


class Scorer(Protocol):
    """Anything that scores a catalogue: an Engine, or a baseline."""

    def scores(self, histories: Sequence[Indices]) -> Tensor:
        """Return scores of all items after each history, (B, num_items + 1), higher is better.

        Column 0 (padding) is -inf, and so is the whole row where the history allows no prediction.
        """


@torch.inference_mode()
def target_ranks(
    scorer: Scorer, holdout: Holdout, filter_seen: bool = True, candidates: Indices | None = None
) -> NDArray[np.float64]:
    """Return the 0-based rank of every target, (N,).

    It is infinite where no list can contain the target: the target is outside the vocabulary (0), it was seen and seen
    items are filtered, or the history allows no prediction.

    Args:
        candidates: (N, K) the only items that each target is ranked against; the whole catalogue by default.
            Sampled metrics are too high and can reorder models (Krichene & Rendle, KDD 2020).

    Raises:
        ValueError: a target's score is NaN or infinite.
    """
    ranks = np.full(len(holdout), np.inf)
    rankable = [
        i
        for i, (history, target) in enumerate(zip(holdout.histories, holdout.targets, strict=True))
        if target != PADDING and not (filter_seen and target in history)
    ]
    for begin in range(0, len(rankable), EVALUATE_ROWS):
        rows = rankable[begin : begin + EVALUATE_ROWS]
        scores = scorer.scores([holdout.histories[i] for i in rows])  # (B, num_items + 1)
        target = torch.as_tensor(holdout.targets[rows], device=scores.device)[:, None]
        wanted = scores.gather(1, target)  # (B, 1)
        no_prediction = (scores == -torch.inf).all(1, keepdim=True)
        if not (wanted.isfinite() | no_prediction).all():
            raise ValueError("the model scores items NaN or infinite; train it again with a lower learning rate")
        if candidates is not None:
            rivals = scores.gather(1, torch.as_tensor(candidates[rows], device=scores.device)) >= wanted
            rank = rivals.sum(1).double()
        else:
            if filter_seen:
                _filter(scores, [holdout.histories[i] for i in rows])
            rank = ((scores >= wanted).sum(1) - 1).double()
        ranks[rows] = rank.masked_fill(no_prediction[:, 0], torch.inf).cpu().numpy()
    return ranks


def sample_unseen(holdout: Holdout, num_items: int, count: int, seed: int) -> Indices:
    """Draw for each case items that are not in its history and not its target, without repetition, (N, count).

    Raises:
        ValueError: a case has fewer than ``count`` unseen items.
    """
    rng = np.random.default_rng(seed)
    rows = np.empty((len(holdout), count), np.int64)
    for row, (history, target) in enumerate(zip(holdout.histories, holdout.targets, strict=True)):
        unseen = np.setdiff1d(np.arange(1, num_items + 1), np.append(history, target), assume_unique=False)
        if len(unseen) < count:
            raise ValueError(f"{count} random unseen items are needed, but a user has only {len(unseen)}")
        rows[row] = rng.choice(unseen, count, replace=False)
    return rows


def evaluate(scorer: Scorer, holdout: Holdout, ks: Sequence[int] = (10,), filter_seen: bool = True) -> Metrics:
    """Compute HR, NDCG and MRR @k over the full catalogue, with seen items filtered or not."""
    return metrics_from_ranks(target_ranks(scorer, holdout, filter_seen), ks)


def _filter(scores: Tensor, seen: Sequence[Indices]) -> None:
    row = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    scores[torch.as_tensor(row), torch.as_tensor(np.concatenate(seen))] = -torch.inf
