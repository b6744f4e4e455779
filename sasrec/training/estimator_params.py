"""The hyper-parameters of the estimators: scikit-rec's names and defaults for SASRecConfig and TrainConfig."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np

from sasrec.model import SASRecConfig
from sasrec.training.config import TrainConfig, Windows
from sasrec.training.objectives import Loss


@dataclass(eq=False)
class EstimatorParams:
    """The hyper-parameters of an estimator.

    Args:
        num_negatives: per position for "bce", "mse", "gbce" and "info_nce"; per batch for "sampled_softmax"; for
            "full_mse" the weight of all other items.
        early_stopping_patience: epochs without a better NDCG@10 on held-out targets; None never stops early,
            and any number needs validation data.
        restore_best_weights: return the weights of the best epoch on validation data, whether stopped early or not.
        random_state: equal number, data and thread count give equal weights. No global state is changed.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        verbose: 1 draws a progress bar.
        loss: see sasrec.training.losses.
        position: "learned" is the paper's; "rope" can be served with one token per click.
        scale_embeddings: multiply item embeddings by sqrt(hidden_units), as the paper's code does; pays off where items
            are rare.
        item_dropout_rate: share of a history's items hidden in training; pays off in long training.
        ema_decay: validate and return an exponential moving average of the weights, with this decay per batch; 0: none.
        reminder: added to the scores of a history's newest max_len items; pays off where people return to items.
        windows: "newest" trains only the newest max_len events of a longer history, as the paper's code does.
        skip_seen: never use the items of a history as negatives; pays off where lists do not recommend seen items.
        autocast: compute in bfloat16 where that is safe; pays off on a GPU.
    """

    hidden_units: int = 50
    num_blocks: int = 2
    num_heads: int = 1
    dropout_rate: float = 0.2
    num_negatives: int = 1
    max_len: int = 50
    learning_rate: float = 0.001
    epochs: int = 200
    batch_size: int = 128
    weight_decay: float = 0.0
    early_stopping_patience: int | None = 5
    restore_best_weights: bool = True
    random_state: int | None = 42
    device: str | None = None
    verbose: int = 0
    loss: Loss = "bce"
    position: Literal["learned", "rope"] = "learned"
    scale_embeddings: bool = False
    item_dropout_rate: float = 0.0
    reminder: float = 0.0
    windows: Windows = "all"
    skip_seen: bool = False
    ema_decay: float = 0.0
    autocast: bool = False

    # sklearn.base.clone needs get_params and set_params
    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the hyper-parameters by name."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.init}

    def set_params(self, **params: Any) -> Self:
        """Change hyper-parameters; they take effect at the next fit.

        Raises:
            ValueError: a name is not that of a hyper-parameter.
        """
        unknown = params.keys() - self.get_params().keys()
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(
                f"{names}: no hyper-parameter of {type(self).__name__}; it has {', '.join(self.get_params())}"
            )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def configs(self, num_items: int) -> tuple[SASRecConfig, TrainConfig]:
        """Build both configurations; scikit-rec has other names for three hyper-parameters."""
        seed = int(np.random.default_rng().integers(2**31)) if self.random_state is None else self.random_state
        given = self.get_params() | {
            "num_items": num_items,
            "patience": self.early_stopping_patience or 0,
            "restore_best": self.restore_best_weights,
            "seed": seed,
        }
        shape, training = (
            {spec.name: given[spec.name] for spec in fields(kind) if spec.name in given}
            for kind in (SASRecConfig, TrainConfig)
        )
        return SASRecConfig(**shape), TrainConfig(**training)
