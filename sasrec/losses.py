"""Training losses: pure functions of hidden states, the item embedding and targets.

Shapes throughout: hidden (M, D), one row a real (not padded) training position; embedding (num_items + 1, D)
with row 0 = padding; targets (M,) indices >= 1. ``outcomes`` (M,) say how good a target was, 1 where not
given. Each returns a scalar, the mean over positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of so many position-item pairs are held at once: in a core's cache, or enough to fill a GPU.
CHUNK_SCORES = {"cpu": 2**18, "cuda": 2**26}

# Of so few items a row their products with it are added up, of more a matrix product takes less time and memory.
FEW_ITEMS = 64


def bce(
    hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor, outcomes: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of Kang & McAuley 2018, section III.F, with K negatives a position.

    The negative part is the *mean* over the K negatives, so that positives and negatives weigh 1:1 at any K.

    Args:
        negatives: (M, K) item indices, none equal to the row's target; K may be 0.
        outcomes: soft labels in [0, 1] of the targets.
    """
    positive = _scores(hidden, embedding, targets[:, None])[:, 0]  # (M,)
    loss = F.softplus(-positive) if outcomes is None else F.softplus(positive) - outcomes * positive
    return (loss + _mean_over_negatives(F.softplus(_scores(hidden, embedding, negatives)))).mean()


def mse(
    hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor, outcomes: Tensor | None = None
) -> Tensor:
    """Squared error of the score against the outcome, and of K negatives' scores against 0, weighing 1:1.

    Args:
        negatives: (M, K) item indices, none equal to the row's target; K may be 0.
        outcomes: what the score is to become.
    """
    wanted = 1.0 if outcomes is None else outcomes
    positive = _scores(hidden, embedding, targets[:, None])[:, 0]  # (M,)
    return ((positive - wanted) ** 2 + _mean_over_negatives(_scores(hidden, embedding, negatives) ** 2)).mean()


def gbce(hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor, calibration: float = 0.75) -> Tensor:
    """Generalised binary cross-entropy of gSASRec (Petrov & Macdonald, RecSys 2023, section 4).

    Few negatives of many items make a model over-confident; the positive's probability is raised to the
    power beta, which ``calibration`` t moves from 1 (t = 0, plain BCE) to the negatives' sampling rate (t = 1).

    Args:
        negatives: (M, K) item indices, none equal to the row's target.
    """
    count = negatives.shape[1]
    rate = count / (len(embedding) - 2)  # of all items but padding and target
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    positive = _scores(hidden, embedding, targets[:, None])[:, 0]  # (M,)
    negative = _scores(hidden, embedding, negatives)  # (M, K)
    return ((beta * F.softplus(-positive) + F.softplus(negative).sum(-1)) / (count + 1)).mean()


def info_nce(
    hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor, outcomes: Tensor | None = None
) -> Tensor:
    """Softmax of a position's target and K items of its own (InfoNCE: van den Oord, Li & Vinyals 2018, section 2.3).

    What it learns is to tell the target from few random items, as sampled evaluation asks; ``cross_entropy`` from the
    best ones, as a list does.

    Args:
        negatives: (M, K) item indices, none equal to the row's target, K at least 1.
        outcomes: weights of the positions, at least 0; the mean is over all positions all the same.
    """
    scores = _scores(hidden, embedding, torch.cat((targets[:, None], negatives), 1))  # (M, 1 + K)
    loss = scores.logsumexp(1) - scores[:, 0]
    return (loss if outcomes is None else outcomes * loss).mean()


def cross_entropy(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    outcomes: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """Softmax over the whole catalogue (Klenitskiy & Vasilev 2023, "Turning Dross Into Gold Loss").

    Args:
        outcomes: weights of the positions, at least 0; the mean is over all positions all the same.
        left_out: (M, C) items that a row's target is not ranked against; the target among them does not count.
    """
    left_out = None if left_out is None else left_out - 1
    loss: Tensor = _CrossEntropy.apply(hidden, embedding[1:], targets - 1, outcomes, left_out, None, None)  # type: ignore[no-untyped-call]
    return loss


def sampled_softmax(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    candidates: Tensor,
    log_inclusion: Tensor,
    certain: Tensor,
    outcomes: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """Softmax over a sample of the catalogue that all rows share: ``cross_entropy`` for a part of the work.

    A candidate that was in the sample by chance stands for 1 / its probability of being there (Horvitz &
    Thompson 1952), so that the sum below the fraction is estimated without bias; on scores that is the logQ
    correction of Bengio & Senecal 2008. What is there for sure, given the row, is not corrected: its own target
    and the other targets of its window. Corrected, they would be ranked down wherever people come back to items.

    Args:
        candidates: (K,) item indices, ascending and distinct, every target among them.
        log_inclusion: (K,) logarithm of the probability that a candidate is in a sample.
        certain: (M, C) items that are in the row's sample for sure, among them its target.
        outcomes: weights of the positions, at least 0.
        left_out: (M, C) items that a row's target is not ranked against; the target among them does not count.
    """
    at, sure = torch.searchsorted(candidates, targets), torch.searchsorted(candidates, certain)
    if left_out is not None:
        found = torch.searchsorted(candidates, left_out).clamp_(max=len(candidates) - 1)
        left_out = torch.where(candidates[found] == left_out, found, at[:, None])
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, embedding[candidates], at, outcomes, left_out, log_inclusion, sure
    )
    return loss


def inclusion(candidates: Tensor, target_share: Tensor, positions: int, drawn: int) -> Tensor:
    """Logarithm of the probability that items are among a batch's targets, or among uniform draws beside them.

    Args:
        candidates: (K,) item indices.
        target_share: (num_items + 1,) share of each item in all training targets.
        positions: targets in the batch.
        drawn: items drawn uniformly, with repetition, beside them.
    """
    none_is = torch.log1p(-target_share[candidates].double()) * positions
    if drawn:
        none_is += math.log1p(-1 / (len(target_share) - 1)) * drawn if len(target_share) > 2 else -math.inf
    return torch.log(-torch.expm1(none_is))


def _scores(hidden: Tensor, embedding: Tensor, items: Tensor) -> Tensor:
    """Of items (M, K) of each row, (M, K). The gradients of ``embedding[items]`` and einsum take twice as long."""
    chosen = F.embedding(items, embedding)  # (M, K, D)
    if items.shape[1] > FEW_ITEMS:
        return torch.bmm(chosen, hidden[:, :, None])[..., 0]
    return (hidden[:, None] * chosen).sum(-1)


def _mean_over_negatives(losses: Tensor) -> Tensor:
    """(M, K) -> (M,); 0 where K is 0."""
    return losses.sum(-1) / max(1, losses.shape[-1])


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over all items given, gradients made in the forward pass, a chunk of rows at a time.

    The logits (M, K) never exist as a whole: at ML-1M's size they would be hundreds of MB a batch,
    written and read several times. It is 2.4 times as fast at 64 dimensions on one core, for the same numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        items: Tensor,
        targets: Tensor,
        outcomes: Tensor | None,
        left_out: Tensor | None,
        correction: Tensor | None,
        exempt: Tensor | None,
    ) -> Tensor:
        """hidden (M, D), items (K, D); of rows of items: targets (M,), left_out (M, C), correction (K,) of the
        scores, but not of the exempt (M, C).
        """
        # under autocast the products are of bfloat16 numbers, four times as fast where the processor knows them;
        # what is between them, and all sums, stay exact
        half = torch.is_autocast_enabled(hidden.device.type)
        kind = torch.bfloat16 if half else hidden.dtype
        d_hidden, d_items = torch.empty_like(hidden), torch.zeros_like(items)
        total = hidden.new_zeros(())
        rows = max(64 if half else 16, CHUNK_SCORES.get(hidden.device.type, CHUNK_SCORES["cuda"]) // len(items))
        correction = None if correction is None else correction.to(hidden.dtype)
        factors = items.to(kind)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), rows):
                part = slice(begin, begin + rows)
                h, target = hidden[part].to(kind), targets[part, None]
                p = (h @ factors.T).to(hidden.dtype)  # (rows, K): logits, then probabilities, then their gradient
                wanted = p.gather(1, target)
                if correction is not None and exempt is not None:
                    kept = p.gather(1, exempt[part])
                    p.sub_(correction).scatter_(1, exempt[part], kept)
                if left_out is not None:
                    p.scatter_(1, left_out[part], -torch.inf).scatter_(1, target, wanted)
                highest = p.amax(1, keepdim=True)
                p.sub_(highest).exp_()
                mass = p.sum(1, keepdim=True)
                each = mass.log() + highest - wanted  # (rows, 1)
                p.div_(mass).scatter_add_(1, target, torch.full_like(each, -1.0))
                if outcomes is not None:
                    each, p = each * outcomes[part, None], p.mul_(outcomes[part, None])
                total += each.sum()
                slope = p.to(kind)
                if half:
                    d_hidden[part] = slope @ factors
                    d_items += slope.T @ h
                else:
                    torch.mm(slope, factors, out=d_hidden[part])
                    d_items.addmm_(slope.T, h)
        ctx.save_for_backward(d_hidden.div_(len(hidden)), d_items.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        d_hidden, d_items = ctx.saved_tensors
        return d_hidden * grads[0], d_items * grads[0], None, None, None, None, None
