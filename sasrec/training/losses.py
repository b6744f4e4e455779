"""Training losses: pure functions of hidden states, the item embedding and targets.

Shapes throughout: hidden (M, D), a row per training position (padding is left out); embedding (num_items + 1, D), row 0
padding; targets (M,) indices >= 1; outcomes (M,), how good each target was, 1 by default. Each function returns a
scalar, the mean over positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of position-item pairs that exist at once: they fit into a core's cache, or fill a GPU.
CHUNK_SCORES = {"cpu": 2**18, "cuda": 2**26}

# Computes the losses (rows, 1) of a slice of the rows from their scores (rows, K), and overwrites the scores with the
# losses' gradient.
RowLosses = Callable[[slice, Tensor], Tensor]

# Up to this number of items a row, elementwise products are summed; above it a matrix product is cheaper.
FEW_ITEMS = 64


def bce(
    hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor, outcomes: Tensor | None = None
) -> Tensor:
    """Return the binary cross-entropy of Kang & McAuley 2018, section III.F, with K negatives per position.

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
    """Return the squared error between score and outcome, plus that between K negatives' scores and 0, weighing 1:1.

    Args:
        negatives: (M, K) item indices, none equal to the row's target; K may be 0.
        outcomes: the wanted scores of the targets.
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
    """Return the squared error between score and outcome, plus that between all other items' scores and 0.

    Hu, Koren & Volinsky, ICDM 2008, do so for sets of items. With a weight of 1 (``mse``) the scores of all likely
    items approach their outcomes, and do not show which item is likelier. The larger the weight, the nearer a score is
    to outcome times probability.

    Args:
        weight: of the others' mean squared score; the number of random negatives whose squares it stands for.
        outcomes: the wanted scores of the targets.
        left_out: (M, C) items that a row's error leaves out; the target is never left out.
    """
    left_out = None if left_out is None else left_out - 1
    return _chunked_loss(hidden, embedding[1:], _squares(targets - 1, weight, outcomes, left_out))


def gbce(hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor, calibration: float = 0.75) -> Tensor:
    """Return the generalised binary cross-entropy of gSASRec (Petrov & Macdonald, RecSys 2023, section 4).

    With few negatives out of many items a model becomes over-confident. So the positive's probability is raised to the
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
    """Return the softmax loss over a position's target and its K negatives.

    InfoNCE: van den Oord, Li & Vinyals 2018, section 2.3. The model learns to rank the target above a few random
    items, as sampled evaluation measures; with ``cross_entropy`` above the best items, as a list needs.

    Args:
        negatives: (M, K) item indices, none equal to the row's target, K at least 1.
        outcomes: weights of the positions, at least 0; the mean divides by the number of positions.
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
    """Return the softmax loss over the whole catalogue (Klenitskiy & Vasilev 2023, "Turning Dross Into Gold Loss").

    Args:
        outcomes: weights of the positions, at least 0; the mean divides by the number of positions.
        left_out: (M, C) items that a row's target is not ranked against; the target is never left out.
    """
    left_out = None if left_out is None else left_out - 1
    return _chunked_loss(hidden, embedding[1:], _softmax(targets - 1, outcomes, left_out))


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
    """Return the softmax loss over a sample of the catalogue that all rows share: a cheaper ``cross_entropy``.

    A candidate that is in the sample by chance counts 1 / its probability of being there (Horvitz & Thompson 1952), so
    that the estimate of the softmax's denominator has no bias; on scores this is the logQ correction of Bengio &
    Senecal 2008. A row's own target and the other targets of its window are there for sure and are not corrected:
    otherwise they would be ranked down wherever people return to items.

    Args:
        candidates: (K,) item indices, ascending and distinct, every target among them.
        log_inclusion: (K,) log-probability that a candidate is in a sample.
        certain: (M, C) items that are in the row's sample for sure, among them its target.
        outcomes: weights of the positions, at least 0.
        left_out: (M, C) items that a row's target is not ranked against; the target is never left out.
    """
    at, certain_at = torch.searchsorted(candidates, targets), torch.searchsorted(candidates, certain)
    if left_out is not None:
        found = torch.searchsorted(candidates, left_out).clamp_(max=len(candidates) - 1)
        left_out = torch.where(candidates[found] == left_out, found, at[:, None])
    return _chunked_loss(hidden, embedding[candidates], _softmax(at, outcomes, left_out, log_inclusion, certain_at))


def inclusion(candidates: Tensor, target_share: Tensor, positions: int, drawn: int) -> Tensor:
    """Return the log-probability that items are among a batch's targets or among additional uniform draws, (K,).

    Args:
        candidates: (K,) item indices.
        target_share: (num_items + 1,) share of each item in all training targets.
        positions: targets in the batch.
        drawn: additional items, drawn uniformly with repetition.
    """
    log_absence = torch.log1p(-target_share[candidates].double()) * positions
    if drawn:
        log_absence += math.log1p(-1 / (len(target_share) - 1)) * drawn if len(target_share) > 2 else -math.inf
    return torch.log(-torch.expm1(log_absence))


def _scores(hidden: Tensor, embedding: Tensor, items: Tensor) -> Tensor:
    """Return the scores of each row's items (M, K).

    The gradients of ``embedding[items]`` and einsum would take twice as long.
    """
    chosen = F.embedding(items, embedding)  # (M, K, D)
    if items.shape[1] > FEW_ITEMS:
        return torch.bmm(chosen, hidden[:, :, None])[..., 0]
    return (hidden[:, None] * chosen).sum(-1)


def _chunked_loss(hidden: Tensor, items: Tensor, row_losses: RowLosses) -> Tensor:
    loss: Tensor = _ChunkedLoss.apply(hidden, items, row_losses)  # type: ignore[no-untyped-call]
    return loss


def _mean_over_negatives(losses: Tensor) -> Tensor:
    """Average (M, K) over K, (M,); 0 where K is 0."""
    return losses.sum(-1) / max(1, losses.shape[-1])


def _softmax(
    targets: Tensor,
    outcomes: Tensor | None,
    left_out: Tensor | None,
    correction: Tensor | None = None,
    certain: Tensor | None = None,
) -> RowLosses:
    """Compute cross-entropy. Items are columns of the scores.

    Args:
        targets: (M,).
        left_out: (M, C).
        correction: (K,) subtracted from the scores, except those of ``certain`` (M, C).
    """

    def losses(part: slice, p: Tensor) -> Tensor:
        target = targets[part, None]
        wanted = p.gather(1, target)
        if correction is not None and certain is not None:
            uncorrected = p.gather(1, certain[part])
            p.sub_(correction.to(p.dtype)).scatter_(1, certain[part], uncorrected)
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

    return losses


def _squares(targets: Tensor, weight: float, outcomes: Tensor | None, left_out: Tensor | None) -> RowLosses:
    """Compute the squared errors of ``full_mse``. Items are columns of the scores."""

    def losses(part: slice, p: Tensor) -> Tensor:
        target = targets[part, None]
        error = p.gather(1, target) - (1.0 if outcomes is None else outcomes[part, None])  # (rows, 1)
        if left_out is not None:
            p.scatter_(1, left_out[part], 0.0)
        p.scatter_(1, target, 0.0)
        share = weight / p.shape[1]
        each = error**2 + share * p.square().sum(1, keepdim=True)
        p.mul_(2 * share).scatter_(1, target, 2 * error)
        return each

    return losses


class _ChunkedLoss(torch.autograd.Function):
    """The mean loss of rows, with the gradients computed in the forward pass, a chunk of rows at a time.

    The scores (M, K) never exist as a whole: at ML-1M's size they would be hundreds of MB a batch, written and read
    several times. This makes cross-entropy 2.4 times as fast at 64 dimensions on one core, with equal results.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, items: Tensor, row_losses: RowLosses) -> Tensor:
        """Return the loss of hidden (M, D) and items (K, D)."""
        # under autocast only the matrix products are computed in bfloat16: four times as fast on processors that
        # support it
        half = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.bfloat16 if half else hidden.dtype
        d_hidden, d_items = torch.empty_like(hidden), torch.zeros_like(items)
        total = hidden.new_zeros(())
        rows = max(64 if half else 16, CHUNK_SCORES.get(hidden.device.type, CHUNK_SCORES["cuda"]) // len(items))
        factors = items.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(hidden), rows):
                part = slice(begin, begin + rows)
                h = hidden[part].to(dtype)
                scores = (h @ factors.T).to(hidden.dtype)  # (rows, K)
                total += row_losses(part, scores).sum()
                gradient = scores.to(dtype)
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
