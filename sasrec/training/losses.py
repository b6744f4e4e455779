"""Training losses: pure functions of hidden states, the item embedding and targets.

Shapes throughout: hidden (M, D), one row a real (not padded) training position; embedding (num_items + 1, D)
with row 0 = padding; targets (M,) indices >= 1. ``outcomes`` (M,) say how good a target was, 1 where not
given. Each returns a scalar, the mean over positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of so many position-item pairs are held at once: in a core's cache, or enough to fill a GPU.
CHUNK_SCORES = {"cpu": 2**18, "cuda": 2**26}

# Of a slice of the rows and their scores (rows, K) the losses (rows, 1); scores become the losses' gradient.
Slope = Callable[[slice, Tensor], Tensor]

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


def full_mse(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weight: float,
    outcomes: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """Squared error of the score against the outcome, and of all other items' scores against 0 (as for sets of items in
    Hu, Koren & Volinsky, ICDM 2008).

    Where the others weigh as much as the target (``mse``), the score of everything likely comes close to its outcome,
    and says no more what is likelier. The more they weigh, the nearer it is to outcome times probability.

    Args:
        weight: of the mean of the others' squares; as of so many random negatives, were they added up.
        outcomes: what the score of the target is to become.
        left_out: (M, C) items of which nothing is asked; the target among them does not count.
    """
    left_out = None if left_out is None else left_out - 1
    return _over_catalogue(hidden, embedding[1:], _squares(targets - 1, weight, outcomes, left_out))


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
    return _over_catalogue(hidden, embedding[1:], _softmax(targets - 1, outcomes, left_out))


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
    return _over_catalogue(hidden, embedding[candidates], _softmax(at, outcomes, left_out, log_inclusion, sure))


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


def _over_catalogue(hidden: Tensor, items: Tensor, slope: Slope) -> Tensor:
    loss: Tensor = _OverCatalogue.apply(hidden, items, slope)  # type: ignore[no-untyped-call]
    return loss


def _mean_over_negatives(losses: Tensor) -> Tensor:
    """(M, K) -> (M,); 0 where K is 0."""
    return losses.sum(-1) / max(1, losses.shape[-1])


def _softmax(
    targets: Tensor,
    outcomes: Tensor | None,
    left_out: Tensor | None,
    correction: Tensor | None = None,
    exempt: Tensor | None = None,
) -> Slope:
    """Cross-entropy of rows of scores. Of rows of items: targets (M,), left_out (M, C), correction (K,) of the scores,
    but not of the exempt (M, C).
    """

    def slope(part: slice, p: Tensor) -> Tensor:
        target = targets[part, None]
        wanted = p.gather(1, target)
        if correction is not None and exempt is not None:
            kept = p.gather(1, exempt[part])
            p.sub_(correction.to(p.dtype)).scatter_(1, exempt[part], kept)
        if left_out is not None:
            p.scatter_(1, left_out[part], -torch.inf).scatter_(1, target, wanted)
        highest = p.amax(1, keepdim=True)
        p.sub_(highest).exp_()
        mass = p.sum(1, keepdim=True)
        each = mass.log() + highest - wanted  # (rows, 1)
        p.div_(mass).scatter_add_(1, target, torch.full_like(each, -1.0))
        if outcomes is not None:
            each, p = each * outcomes[part, None], p.mul_(outcomes[part, None])
        return each

    return slope


def _squares(targets: Tensor, weight: float, outcomes: Tensor | None, left_out: Tensor | None) -> Slope:
    """Squared errors of rows of scores, as ``full_mse`` adds them up."""

    def slope(part: slice, p: Tensor) -> Tensor:
        target = targets[part, None]
        error = p.gather(1, target) - (1.0 if outcomes is None else outcomes[part, None])  # (rows, 1)
        if left_out is not None:
            p.scatter_(1, left_out[part], 0.0)
        p.scatter_(1, target, 0.0)
        share = weight / p.shape[1]
        each = error**2 + share * p.square().sum(1, keepdim=True)
        p.mul_(2 * share).scatter_(1, target, 2 * error)
        return each

    return slope


class _OverCatalogue(torch.autograd.Function):
    """A loss of the scores of all items given, gradients made in the forward pass, a chunk of rows at a time.

    The scores (M, K) never exist as a whole: at ML-1M's size they would be hundreds of MB a batch,
    written and read several times. Cross-entropy is 2.4 times as fast so at 64 dimensions on one core, for the same
    numbers.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, items: Tensor, slope: Slope) -> Tensor:
        """hidden (M, D), items (K, D)."""
        # under autocast the products are of bfloat16 numbers, four times as fast where the processor knows them;
        # what is between them, and all sums, stay exact
        half = torch.is_autocast_enabled(hidden.device.type)
        kind = torch.bfloat16 if half else hidden.dtype
        d_hidden, d_items = torch.empty_like(hidden), torch.zeros_like(items)
        total = hidden.new_zeros(())
        rows = max(64 if half else 16, CHUNK_SCORES.get(hidden.device.type, CHUNK_SCORES["cuda"]) // len(items))
        factors = items.to(kind)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), rows):
                part = slice(begin, begin + rows)
                h = hidden[part].to(kind)
                scores = (h @ factors.T).to(hidden.dtype)  # (rows, K)
                total += slope(part, scores).sum()
                gradient = scores.to(kind)
                if half:
                    d_hidden[part] = gradient @ factors
                    d_items += gradient.T @ h
                else:
                    torch.mm(gradient, factors, out=d_hidden[part])
                    d_items.addmm_(gradient.T, h)
        ctx.save_for_backward(d_hidden.div_(len(hidden)), d_items.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_items = ctx.saved_tensors
        return d_hidden * grads[0], d_items * grads[0], None
