"""Training losses: pure functions of hidden states, the item embedding and targets.

Shapes throughout: hidden (M, D), one row a real (not padded) training position; embedding (num_items + 1, D)
with row 0 = padding; targets (M,) indices >= 1. Each returns a scalar, the mean over positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy of Kang & McAuley 2018, section III.F, with K negatives a position.

    The negative part is the *mean* over the K negatives, so that positives and negatives weigh 1:1 at any K.

    Args:
        negatives: (M, K) item indices, none equal to the row's target.
    """
    positive = (hidden * embedding[targets]).sum(-1)  # (M,)
    negative = torch.einsum("md,mkd->mk", hidden, embedding[negatives])  # (M, K)
    return (F.softplus(-positive) + F.softplus(negative).mean(-1)).mean()


def cross_entropy(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Softmax over the whole catalogue (Klenitskiy & Vasilev 2023, "Turning Dross Into Gold Loss")."""
    return F.cross_entropy(hidden @ embedding[1:].T, targets - 1)


def sampled_softmax(hidden: Tensor, embedding: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Softmax over the target and K negatives shared by the whole batch (Jean et al. 2015, section 3).

    The sampling correction log(K q) is the same for every item when negatives are drawn uniformly, so it
    cancels and does not appear. A negative that is a row's target is hidden from that row.

    Args:
        negatives: (K,) item indices drawn uniformly.
    """
    positive = (hidden * embedding[targets]).sum(-1, keepdim=True)  # (M, 1)
    negative = hidden @ embedding[negatives].T  # (M, K)
    negative = negative.masked_fill(negatives == targets[:, None], float("-inf"))
    return (torch.logsumexp(torch.cat((positive, negative), -1), -1) - positive[:, 0]).mean()
