"""The training objectives: one table with an entry per loss.

To add a loss, write its function in losses.py, and its name and entry below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sasrec.data.vocab import PADDING
from sasrec.training import losses

Loss = Literal["bce", "mse", "full_mse", "gbce", "info_nce", "cross_entropy", "sampled_softmax"]
OutcomeRange = Literal["none", "0 to 1", "any number"]

# Most times that a negative is drawn again because it is a seen item.
REDRAWS = 5


@dataclass(frozen=True)
class Positions:
    """Training positions: hidden states and the items that they should predict.

    Args:
        hidden: (M, D).
        embedding: (num_items + 1, D), row 0 padding.
        targets: (M,) indices >= 1.
        num_negatives: as in ``TrainConfig``.
        outcomes: (M,) how good each target was; None where all are equal.
        seen: (M, C) items that are no negatives of a position, ascending, and padding.
        window_targets: (M, T) all targets of the position's window, and padding.
        target_share: (num_items + 1,) share of each item in all training targets.
    """

    hidden: Tensor
    embedding: Tensor
    targets: Tensor
    num_negatives: int
    outcomes: Tensor | None = None
    seen: Tensor | None = None
    window_targets: Tensor | None = None
    target_share: Tensor | None = None

    @property
    def num_items(self) -> int:
        """The size of the catalogue."""
        return len(self.embedding) - 1

    @property
    def left_out(self) -> Tensor | None:
        """Items that the target is not ranked against, (M, C), the target in the place of padding."""
        return None if self.seen is None else self._pad_with_targets(self.seen)

    @property
    def certain(self) -> Tensor:
        """Items that are in the position's sample for sure: the targets of its window, (M, T)."""
        assert self.window_targets is not None
        return self._pad_with_targets(self.window_targets)

    def draw_negatives(self) -> Tensor:
        """Draw items uniformly, (M, num_negatives): never the target, and no seen item unless nearly all are seen."""
        negatives = self._draw(self.targets, self.num_negatives)
        if self.seen is not None and negatives.numel():
            for _ in range(REDRAWS):
                at = torch.searchsorted(self.seen, negatives).clamp_(max=self.seen.shape[1] - 1)
                again = self.seen.gather(1, at) == negatives  # (M, K)
                negatives[again] = self._draw(self.targets[again.nonzero()[:, 0]], 1)[:, 0]
        return negatives

    def _draw(self, targets: Tensor, count: int) -> Tensor:
        drawn = torch.randint(1, self.num_items, (len(targets), count), device=targets.device)
        return drawn + (drawn >= targets[:, None])  # from one item fewer, stepping over the target

    def _pad_with_targets(self, items: Tensor) -> Tensor:
        return torch.where(items == PADDING, self.targets[:, None], items)


@dataclass(frozen=True)
class Objective:
    """A loss and its facts.

    Args:
        loss: the mean loss of positions, a scalar.
        default_negatives: of a position; for sampled_softmax of a batch, for full_mse the weight of all other items.
        fewest_negatives: the least that makes sense. Without negatives a loss that does not rank the catalogue needs
            outcomes that differ.
        outcomes: the outcomes that it can learn from.
        ranks_catalogue: whether it scores the catalogue, or a large sample of it, for each position. Most of its time
            then goes into products of matrices, which autocast makes faster.
        held_out_loss: the loss of held-out targets; ``loss`` by default.
    """

    loss: Callable[[Positions], Tensor]
    default_negatives: int
    fewest_negatives: int = 0
    outcomes: OutcomeRange = "0 to 1"
    ranks_catalogue: bool = False
    held_out_loss: Callable[[Positions], Tensor] | None = None


def _bce(p: Positions) -> Tensor:
    return losses.bce(p.hidden, p.embedding, p.targets, p.draw_negatives(), p.outcomes)


def _mse(p: Positions) -> Tensor:
    return losses.mse(p.hidden, p.embedding, p.targets, p.draw_negatives(), p.outcomes)


def _full_mse(p: Positions) -> Tensor:
    return losses.full_mse(p.hidden, p.embedding, p.targets, p.num_negatives, p.outcomes, p.left_out)


def _gbce(p: Positions) -> Tensor:
    return losses.gbce(p.hidden, p.embedding, p.targets, p.draw_negatives())


def _info_nce(p: Positions) -> Tensor:
    return losses.info_nce(p.hidden, p.embedding, p.targets, p.draw_negatives(), p.outcomes)


def _cross_entropy(p: Positions) -> Tensor:
    return losses.cross_entropy(p.hidden, p.embedding, p.targets, p.outcomes, p.left_out)


def _sampled_softmax(p: Positions) -> Tensor:
    assert p.target_share is not None
    drawn = torch.randint(1, p.num_items + 1, (p.num_negatives,), device=p.targets.device)
    candidates = torch.unique(torch.cat((p.targets, drawn)))
    log_inclusion = losses.inclusion(candidates, p.target_share, len(p.targets), p.num_negatives)
    return losses.sampled_softmax(
        p.hidden, p.embedding, p.targets, candidates, log_inclusion, p.certain, p.outcomes, p.left_out
    )


OBJECTIVES: dict[Loss, Objective] = {
    "bce": Objective(_bce, default_negatives=1),
    "mse": Objective(_mse, default_negatives=1, outcomes="any number"),
    "full_mse": Objective(
        _full_mse, default_negatives=10, fewest_negatives=1, outcomes="any number", ranks_catalogue=True
    ),
    "gbce": Objective(_gbce, default_negatives=256, fewest_negatives=1, outcomes="none"),
    "info_nce": Objective(_info_nce, default_negatives=4, fewest_negatives=1),
    "cross_entropy": Objective(_cross_entropy, default_negatives=0, ranks_catalogue=True),
    # it estimates cross-entropy, so that is the loss of held-out targets
    "sampled_softmax": Objective(
        _sampled_softmax, default_negatives=1024, ranks_catalogue=True, held_out_loss=_cross_entropy
    ),
}


def objective_of(loss: Loss) -> Objective:
    """Return the entry of a loss.

    Raises:
        ValueError: there is no loss of this name.
    """
    if loss not in OBJECTIVES:
        raise ValueError(f"loss={loss!r}: must be one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[loss]
