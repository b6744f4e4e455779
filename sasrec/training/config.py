"""The hyper-parameters of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sasrec.model import option
from sasrec.training.objectives import OBJECTIVES, Loss, Objective, objective_of

Schedule = Literal["constant", "cosine"]
Windows = Literal["all", "newest"]
COSINE_FLOOR = 0.05
DEFAULT_NEGATIVES = ", ".join(f"{name} {objective.default_negatives}" for name, objective in OBJECTIVES.items())


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of training; objectives.py describes the losses.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = option(100, "most epochs")
    batch_size: int = option(128, "windows in a batch")
    learning_rate: float = option(1e-3, "of AdamW")
    weight_decay: float = option(0.0, "of AdamW, on matrices only", advanced=True)
    ema_decay: float = option(
        0.0,
        "validate and return an exponential moving average of the weights, which decays by this factor per batch "
        "(.999, for example); 0: no average",
        advanced=True,
    )
    schedule: Schedule = option(
        "constant", "cosine lowers the learning rate over all epochs, whether training stops early or not"
    )
    warmup_steps: int = option(0, "batches in which the learning rate rises to its full height", advanced=True)
    loss: Loss = option(
        "cross_entropy", "cross_entropy and full_mse compare a target with all items, the others with negatives"
    )
    num_negatives: int | None = option(
        None,
        "negatives of a position; sampled_softmax: of a batch; full_mse: weight of all other items "
        f"[{DEFAULT_NEGATIVES}]",
    )
    skip_seen: bool = option(
        False, "never use the items of a window as negatives; pays off where lists do not recommend seen items"
    )
    patience: int = option(5, "stop after this number of epochs without a better validation NDCG@10; 0: never")
    replay: float = option(
        1.0, "when a model is trained further: windows of old events per window with new events", advanced=True
    )
    windows: Windows = option(
        "all",
        "of histories longer than max_len, train all windows or, as the paper's code does, only the newest",
        advanced=True,
    )
    restore_best: bool = option(True, "return the weights of the best epoch, not of the last", advanced=True)
    autocast: bool = option(False, "compute in bfloat16 where that is safe; pays off on a GPU", advanced=True)
    seed: int = option(42, "equal seed, data and thread count give equal weights")

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "patience": 0, "warmup_steps": 0}
        for name, value in vars(self).items():
            if name in least and value < least[name]:
                raise ValueError(f"{name}={value}: must be at least {least[name]}")
        if not 0 <= self.replay < math.inf:
            raise ValueError(f"replay={self.replay}: must be at least 0 and finite")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be at least 0 and below 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} and weight_decay={self.weight_decay}: "
                "the first must be above 0, the second at least 0"
            )
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule={self.schedule!r}: must be one of {', '.join(get_args(Schedule))}")
        if self.windows not in get_args(Windows):
            raise ValueError(f"windows={self.windows!r}: must be one of {', '.join(get_args(Windows))}")
        fewest = self.objective.fewest_negatives
        if self.negatives < fewest:
            raise ValueError(f"num_negatives={self.num_negatives}: {self.loss} needs at least {fewest}")

    @property
    def objective(self) -> Objective:
        """The entry of ``loss`` in the table of objectives."""
        return objective_of(self.loss)

    @property
    def negatives(self) -> int:
        """``num_negatives``, or the loss's own default."""
        return self.objective.default_negatives if self.num_negatives is None else self.num_negatives

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate for a batch (0-based, of ``steps`` in all)."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return warm
        return warm * (COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * step / steps)) / 2)
