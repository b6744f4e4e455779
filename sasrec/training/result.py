"""The result of a training: figures of each epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sasrec.evaluation.metrics import Metrics
from sasrec.training.plots import new_figure

VALIDATION_K = 10


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch: the mean training loss, and loss and metrics of held-out targets, None without any."""

    loss: float
    seconds: float
    validation: Metrics | None
    validation_loss: float | None = None


@dataclass
class TrainResult:
    """The epochs, in order; the model has the weights of ``best_epoch`` (0-based)."""

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def best(self) -> Epoch:
        """The epoch whose weights the model has."""
        return self.epochs[self.best_epoch]

    def plot(self, path: str | Path) -> None:
        """Draw loss and validation NDCG by epoch into an image file, in the format of its suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = new_figure(7, 4)
        axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
        at = range(1, len(self.epochs) + 1)
        axes.plot(at, [epoch.loss for epoch in self.epochs], color="tab:blue", label="training loss")
        validation_losses = [epoch.validation_loss for epoch in self.epochs if epoch.validation_loss is not None]
        ndcg = [epoch.validation.ndcg[VALIDATION_K] for epoch in self.epochs if epoch.validation is not None]
        if ndcg:
            axes.plot(at, validation_losses, color="tab:blue", linestyle="--", label="validation loss")
            right = axes.twinx()
            right.set_ylabel(f"NDCG@{VALIDATION_K}")
            right.plot(at, ndcg, color="tab:orange", label=f"validation NDCG@{VALIDATION_K}")
            right.axvline(self.best_epoch + 1, color="gray", linewidth=0.8, label=f"best: epoch {self.best_epoch + 1}")
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
        figure.savefig(path)
