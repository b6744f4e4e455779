"""Ranking metrics over the full catalogue, computed through the Engine that serves.

A target's rank is the number of allowed items that score at least as high, itself left out, so ties count
against the model: constant scores earn nothing. Sampled candidates are not offered here, since sampled
metrics can reorder models (Krichene & Rendle, KDD 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sasrec.data import Holdout
from sasrec.engine import Engine
from sasrec.vocab import PADDING

EVALUATE_ROWS = 256


@dataclass(frozen=True)
class Metrics:
    """Means over all cases, by cut-off k. HR is hit rate (recall, with one target a case)."""

    cases: int
    hr: dict[int, float]
    ndcg: dict[int, float]
    mrr: dict[int, float]

    def as_dict(self) -> dict[str, float]:
        """Flat: {"hr@10": ..., "ndcg@10": ..., "mrr@10": ..., "cases": ...}."""
        flat: dict[str, float] = {"cases": self.cases}
        for name, by_k in (("hr", self.hr), ("ndcg", self.ndcg), ("mrr", self.mrr)):
            flat |= {f"{name}@{k}": value for k, value in by_k.items()}
        return flat


def metrics_from_ranks(ranks: NDArray[np.float64], ks: Iterable[int]) -> Metrics:
    """Metrics of 0-based ranks (N,); infinity means the target was not in the list at all."""
    if not len(ranks):
        raise ValueError("there is no case to judge; give at least one history with a target")
    hr, ndcg, mrr = {}, {}, {}
    for k in ks:
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        hit = ranks < k
        hr[k] = float(hit.mean())
        ndcg[k] = float(np.where(hit, 1 / np.log2(np.where(hit, ranks, 0) + 2), 0).mean())
        mrr[k] = float(np.where(hit, 1 / (np.where(hit, ranks, 0) + 1), 0).mean())
    return Metrics(len(ranks), hr, ndcg, mrr)


@torch.inference_mode()
def target_ranks(engine: Engine, holdout: Holdout, filter_seen: bool = True) -> NDArray[np.float64]:
    """0-based rank of every target, (N,).

    Infinite where no list can hold the target: it is outside the vocabulary (0), it was seen and seen items
    are filtered, or the history has no known item.

    Raises:
        ValueError: the model scores a target NaN or infinite.
    """
    ranks = np.full(len(holdout), np.inf)
    windows = [engine.window(history) for history in holdout.histories]
    judged = [
        i
        for i, target in enumerate(holdout.targets)
        if windows[i] and target != PADDING and not (filter_seen and target in holdout.histories[i])
    ]
    for begin in range(0, len(judged), EVALUATE_ROWS):
        rows = judged[begin : begin + EVALUATE_ROWS]
        scores = engine.model.logits(engine.encode([windows[i] for i in rows]))  # (B, num_items + 1)
        scores[:, PADDING] = -torch.inf
        target = torch.as_tensor(holdout.targets[rows], device=scores.device)[:, None]
        wanted = scores.gather(1, target)  # (B, 1)
        if not wanted.isfinite().all():
            raise ValueError("the model scores items NaN or infinite; train it again with a lower learning rate")
        if filter_seen:
            _forbid(scores, [holdout.histories[i] for i in rows])
        ranks[rows] = ((scores >= wanted).sum(1) - 1).cpu().numpy()
    return ranks


def evaluate(engine: Engine, holdout: Holdout, ks: Sequence[int] = (10,), filter_seen: bool = True) -> Metrics:
    """HR, NDCG and MRR @k over the full catalogue; seen items left out or not."""
    return metrics_from_ranks(target_ranks(engine, holdout, filter_seen), ks)


def _forbid(scores: torch.Tensor, seen: Sequence[NDArray[np.int64]]) -> None:
    row = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    scores[torch.as_tensor(row), torch.as_tensor(np.concatenate(seen))] = -torch.inf
