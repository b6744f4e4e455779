"""Training: an importable loop, no argument parsing, no side effect on anybody's random state."""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from sasrec.data.sequences import Holdout, Indices, Outcomes, Sequences, TrainingWindows
from sasrec.data.vocab import PADDING
from sasrec.evaluation.metrics import Metrics, evaluate
from sasrec.inference.engine import Engine
from sasrec.inference.packed import pad_rows
from sasrec.model import SASRec, SASRecConfig, option
from sasrec.training import losses
from sasrec.training.plots import new_figure

log = logging.getLogger(__name__)

Loss = Literal["bce", "mse", "full_mse", "gbce", "info_nce", "cross_entropy", "sampled_softmax"]
Schedule = Literal["constant", "cosine"]
Windows = Literal["all", "newest"]
DEFAULT_NEGATIVES: dict[Loss, int] = {
    "bce": 1, "mse": 1, "full_mse": 10, "gbce": 256, "info_nce": 4, "cross_entropy": 0, "sampled_softmax": 1024,
}  # fmt: skip
# The paper's implementation has 0.98. It forgets a rare item's gradients between two of its batches, so that each
# of them, however small, then moves the item by a whole step: R@20 .453 against .471 on Diginetica's week 4.
ADAM_BETAS = (0.9, 0.999)
COSINE_FLOOR = 0.05
NEIGHBOURS = 3
REDRAWS = 5
NEED_NO_NEGATIVES: tuple[Loss, ...] = ("bce", "mse", "cross_entropy", "sampled_softmax")
OF_NUMBERS: tuple[Loss, ...] = ("mse", "full_mse")  # their outcomes may be any number
# Their time goes into products of matrices.
RANK_MANY: tuple[Loss, ...] = ("full_mse", "cross_entropy", "sampled_softmax")
VALIDATION_K = 10
VALIDATION_CASES = 5_000
VALIDATION_LOSS_CASES = 1_000


class TrainingError(ValueError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ``patience`` counts epochs without a better validation NDCG@10; 0 never stops early.

    ``num_negatives`` is by default 1 for ``bce`` and ``mse``, 256 for ``gbce``, and 4 for ``info_nce``. ``bce`` and
    ``mse`` can do without any where outcomes tell good events from bad. ``sampled_softmax`` ranks against the targets
    of the whole batch, and against so many random items beside them, by default 1,024. ``full_mse`` draws none: all
    items but the target weigh as much as so many, by default 10.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = option(100, "most epochs")
    batch_size: int = option(128, "windows in a batch")
    learning_rate: float = option(1e-3, "of AdamW")
    weight_decay: float = option(0.0, "of AdamW, on matrices only")
    ema_decay: float = option(
        0.0, "judge and keep an exponential moving average of the weights with this decay a batch, .999 say; 0: none"
    )
    schedule: Schedule = option("constant", "cosine lowers the learning rate over all epochs, stopped early or not")
    warmup_steps: int = option(0, "batches over which the learning rate rises to its full height")
    loss: Loss = option("cross_entropy", "cross_entropy and full_mse are of all items, the others of negatives")
    num_negatives: int | None = option(
        None, "a position [bce, mse: 1; full_mse: 10; gbce: 256; info_nce: 4; sampled_softmax, a batch: 1024]"
    )
    skip_seen: bool = option(
        False, "the other items of a window are no negatives of a target; pays where lists leave seen items out"
    )
    patience: int = option(5, "stop after so many epochs without a better validation NDCG@10; 0: never")
    replay: float = option(
        1.0, "trained on from a model: windows of old events an epoch, for each window with new ones"
    )
    windows: Windows = option(
        "all", "of histories longer than max_len, train all windows or only the newest, as the paper's own code does"
    )
    restore_best: bool = option(True, "keep the weights of the best epoch, not of the last")
    autocast: bool = option(False, "compute in bfloat16 where that is safe; pays on a GPU")
    seed: int = option(42, "same seed, same data, same thread count: same weights")

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not 0 <= self.replay < math.inf:
            raise ValueError(f"replay={self.replay}: must be at least 0 and finite")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be at least 0 and below 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} and weight_decay={self.weight_decay}: "
                "the first must be above 0, the second at least 0"
            )
        if self.loss not in DEFAULT_NEGATIVES:
            raise ValueError(f"loss={self.loss!r}: must be one of {', '.join(DEFAULT_NEGATIVES)}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule={self.schedule!r}: must be one of {', '.join(get_args(Schedule))}")
        if self.windows not in get_args(Windows):
            raise ValueError(f"windows={self.windows!r}: must be one of {', '.join(get_args(Windows))}")
        least_negatives = 0 if self.loss in NEED_NO_NEGATIVES else 1
        if self.negatives < least_negatives:
            raise ValueError(f"num_negatives={self.num_negatives}: {self.loss} needs at least {least_negatives}")

    @property
    def negatives(self) -> int:
        """``num_negatives``, or the loss's own default."""
        return DEFAULT_NEGATIVES[self.loss] if self.num_negatives is None else self.num_negatives

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """What the learning rate of a batch (0-based, of ``steps`` in all) is multiplied by."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return warm
        return warm * (COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * step / steps)) / 2)


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean training loss, and on held-out targets loss and metrics, None without hold-out."""

    loss: float
    seconds: float
    validation: Metrics | None
    validation_loss: float | None = None


@dataclass
class TrainResult:
    """The epochs, in order; the model keeps the weights of ``best_epoch`` (0-based)."""

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def best(self) -> Epoch:
        """The epoch whose weights the model keeps."""
        return self.epochs[self.best_epoch]

    def plot(self, path: str | Path) -> None:
        """Draw loss and validation NDCG by epoch into an image file; the ending of its name is its format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = new_figure(7, 4)
        axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
        at = range(1, len(self.epochs) + 1)
        axes.plot(at, [epoch.loss for epoch in self.epochs], color="tab:blue", label="training loss")
        held_out = [epoch.validation_loss for epoch in self.epochs if epoch.validation_loss is not None]
        ndcg = [epoch.validation.ndcg[VALIDATION_K] for epoch in self.epochs if epoch.validation is not None]
        if ndcg:
            axes.plot(at, held_out, color="tab:blue", linestyle="--", label="validation loss")
            right = axes.twinx()
            right.set_ylabel(f"NDCG@{VALIDATION_K}")
            right.plot(at, ndcg, color="tab:orange", label=f"validation NDCG@{VALIDATION_K}")
            right.axvline(self.best_epoch + 1, color="gray", linewidth=0.8, label=f"best: epoch {self.best_epoch + 1}")
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
        figure.savefig(path)


def train(
    config: SASRecConfig,
    sequences: Sequences,
    how: TrainConfig,
    validation: Holdout | None = None,
    *,
    initial: SASRec | None = None,
    new_events: Indices | None = None,
    device: str = "cpu",
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[SASRec, TrainResult]:
    """Train a model; the same seed, data and thread count give the same weights.

    Validation judges held-out targets alone, over the full catalogue, seen items filtered unless most of
    the held-out targets repeat an item. The best weights by NDCG@10 are restored; without validation the
    last ones are kept.

    Args:
        initial: begin with the weights of this model, of the same shape, instead of random ones; it is not changed.
        new_events: (U,) how many of each user's last events the initial model has not been trained on. An epoch
            then takes the windows that hold one, and ``how.replay`` times as many of the others, drawn afresh for
            each epoch, lest what was learned be forgotten.
        progress: draw a progress bar on stderr.
        stop: asked after every batch; True ends training at once, with the best weights so far.

    Raises:
        TrainingError: the loss or the scores are not finite, the data hold no two events of a user, or
            outcomes are not what the loss can learn from, or no event is new.
    """
    try:
        windows = TrainingWindows(sequences, config.max_len, newest=how.windows == "newest")
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if how.negatives and config.num_items < 2:
        raise TrainingError(f"{how.loss} needs negatives, but there is only one item; use loss='cross_entropy'")
    _check_outcomes(sequences, how)
    if new_events is not None and not windows.with_new(new_events).any():
        raise TrainingError("no user has a new event that follows an earlier one: there is nothing to train on")
    if validation is not None:
        validation = validation.sample(VALIDATION_CASES, how.seed)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _progress(progress) as bar:
        torch.manual_seed(how.seed)
        model = SASRec(config)
        if initial is not None:
            model.load_state_dict(initial.state_dict())
        trainer = _Trainer(model.to(device), windows, how, new_events, bar, stop)
        result = trainer.fit(sequences, validation)
    return trainer.model, result


def grown(model: SASRec, config: SASRecConfig, sequences: Sequences) -> SASRec:
    """A model with the weights of another one, and room for more items.

    The embedding of a new item begins as the mean of those of the known items within NEIGHBOURS events of it,
    nearer ones weighing more. Begun at random it lags behind those that have been trained for long: R@20 .488
    against .498 on Diginetica's week 2, where a model of week 0 was trained on with week 1.

    Args:
        config: of the same shape but for the number of items.
        sequences: in which the new items stand among known ones.

    Raises:
        ValueError: the shape differs in more, or there are fewer items.
    """
    old = model.config
    if not old.same_shape(config):
        raise ValueError(f"the shape of the model cannot change from {old} to {config}; train from the beginning")
    if config.num_items < old.num_items:
        raise ValueError(f"the model knows {old.num_items} items already; {config.num_items} cannot hold them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        larger = SASRec(config)
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    embedding = larger.item_embedding.weight.detach().clone()
    embedding[: old.num_items + 1] = weights["item_embedding.weight"]
    means, total = torch.zeros_like(embedding), torch.zeros(len(embedding))
    user = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    for distance in range(1, NEIGHBOURS + 1):
        one = np.flatnonzero(user[distance:] == user[:-distance])
        for at, beside in ((one, one + distance), (one + distance, one)):
            item, neighbour = torch.as_tensor(sequences.items[at]), torch.as_tensor(sequences.items[beside])
            counts = (item > old.num_items) & (neighbour <= old.num_items)
            means.index_add_(0, item[counts], embedding[neighbour[counts]] / distance)
            total.index_add_(0, item[counts], torch.full((int(counts.sum()),), 1 / distance))
    embedding[total > 0] = means[total > 0] / total[total > 0, None]
    larger.load_state_dict(weights | {"item_embedding.weight": embedding})
    return larger


def _check_outcomes(sequences: Sequences, how: TrainConfig) -> None:
    outcomes = sequences.outcomes
    if how.loss in ("bce", "mse") and not how.negatives and (outcomes is None or np.ptp(outcomes) == 0):
        raise TrainingError(f"num_negatives=0: {how.loss} has nothing to tell items apart by; give at least 1")
    if outcomes is None:
        return
    if how.loss == "gbce":
        raise TrainingError("loss='gbce' knows no outcomes; use 'bce' or 'mse', or leave them out")
    if how.loss not in OF_NUMBERS and not (outcomes.min() >= 0 and outcomes.max() <= 1):
        raise TrainingError(
            f"outcomes from {outcomes.min():g} to {outcomes.max():g}: loss='{how.loss}' takes 0 to 1; "
            "divide them by their largest value, or use loss='mse'"
        )


class _Trainer:
    def __init__(
        self,
        model: SASRec,
        windows: TrainingWindows,
        how: TrainConfig,
        new_events: Indices | None,
        bar: Progress,
        stop: Callable[[], bool],
    ) -> None:
        self.model, self.windows, self.how = model, windows, how
        self.rng = np.random.default_rng(how.seed)
        new = np.ones(len(windows), bool) if new_events is None else windows.with_new(new_events)
        self.new, self.old = np.flatnonzero(new), np.flatnonzero(~new)
        self.replayed = min(len(self.old), round(how.replay * len(self.new)))
        decay: list[Tensor] = []
        plain: list[Tensor] = []
        for parameter in model.parameters():
            (decay if parameter.dim() > 1 else plain).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=how.learning_rate,
            betas=ADAM_BETAS,
            fused=True,
        )
        self.average = None
        if how.ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=functools.partial(_average, how.ema_decay))
        self.stop = stop
        self.bar = bar
        self.batches = -(-(len(self.new) + self.replayed) // how.batch_size)  # an epoch
        steps = how.epochs * self.batches
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: how.learning_rate_factor(step, steps)
        )
        self.task: TaskID = bar.add_task("training", total=how.epochs * self.batches, status="")

    @property
    def judged(self) -> SASRec:
        """The model that is validated and kept: the one trained, or the average of its weights."""
        return self.model if self.average is None else cast(SASRec, self.average.module)

    def fit(self, sequences: Sequences, validation: Holdout | None) -> TrainResult:
        result = TrainResult()
        best_ndcg, best_weights = -math.inf, None
        for number in range(self.how.epochs):
            started = time.perf_counter()
            loss = self.epoch(number, f"NDCG@{VALIDATION_K} {best_ndcg:.4f}" if best_weights else "")
            metrics, held_out = self.validate(sequences, validation)
            result.epochs.append(Epoch(loss, time.perf_counter() - started, metrics, held_out))
            ndcg = float(number) if metrics is None else metrics.ndcg[VALIDATION_K]
            log.info("epoch %d: loss %.4f%s", number + 1, loss,
                     "" if metrics is None else f", validation NDCG@{VALIDATION_K} {ndcg:.4f}")  # fmt: skip
            if ndcg > best_ndcg:
                best_ndcg, result.best_epoch = ndcg, number
                best_weights = copy.deepcopy(self.judged.state_dict()) if metrics is not None else None
            if self.stop() or (metrics is not None and 0 < self.how.patience <= number - result.best_epoch):
                break
        kept = best_weights if best_weights is not None and self.how.restore_best else self.judged.state_dict()
        self.model.load_state_dict(kept)
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise TrainingError(f"the last step made weights NaN; lower learning_rate={self.how.learning_rate}")
        self.model.eval()
        self.bar.update(self.task, completed=self.how.epochs * self.batches)
        return result

    def epoch(self, number: int, status: str) -> float:
        self.model.train()
        total, count = 0.0, 0
        which = np.concatenate((self.new, self.rng.choice(self.old, self.replayed, replace=False)))
        share = torch.as_tensor(self.windows.target_share(which), device=self.model.item_embedding.weight.device)
        for items, targets, outcomes in self.windows.batches(self.how.batch_size, self.rng, which):
            loss, positions = self.batch(items, targets, outcomes, share)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} in epoch {number + 1}; lower learning_rate={self.how.learning_rate}"
                )
            total, count = total + loss * positions, count + positions
            self.bar.update(
                self.task, advance=1, description=f"epoch {number + 1}", status=f"loss {total / count:.3f}  {status}"
            )
            if self.stop():
                break
        return total / count

    def batch(
        self, items: Indices, targets: Indices, outcomes: Outcomes | None, target_share: Tensor
    ) -> tuple[float, int]:
        device = self.model.item_embedding.weight.device
        x = torch.as_tensor(items, device=device)  # (B, T)
        y = torch.as_tensor(targets, device=device)  # (B, T)
        at = y.flatten().nonzero()[:, 0]  # (M,) the real positions
        row, target = at // y.shape[1], y.flatten()[at]  # (M,) the window of each, its target
        seen = torch.cat((x[:, :1], y), 1).sort(1).values[row] if self.how.skip_seen else None  # (M, T + 1)
        good = None if outcomes is None else torch.as_tensor(outcomes, device=device).flatten()[at]
        half = self.how.autocast
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            # index_select: the gradient of x[mask] takes four times as long
            hidden = self.model(x).flatten(0, 1).index_select(0, at)  # (M, D)
        hidden = hidden.to(self.model.item_embedding.weight.dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=half and self.how.loss in RANK_MANY):
            if self.how.loss == "sampled_softmax":
                loss = self.sampled_softmax(hidden, target, y[row], good, target_share, seen)
            else:
                loss = self.loss(hidden, target, good, seen)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.schedule.step()
        return loss.item(), len(hidden)

    def loss(
        self, hidden: Tensor, targets: Tensor, outcomes: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """hidden (M, D), targets (M,), outcomes (M,), seen (M, C): items, ascending, or padding, no negatives."""
        embedding = self.model.item_embedding.weight
        if self.how.loss in RANK_MANY:  # sampled softmax estimates cross-entropy
            left_out = None if seen is None else _filled(seen, targets)
            if self.how.loss == "full_mse":
                return losses.full_mse(hidden, embedding, targets, self.how.negatives, outcomes, left_out)
            return losses.cross_entropy(hidden, embedding, targets, outcomes, left_out)
        negatives = self.negatives(targets, seen)
        if self.how.loss == "gbce":
            return losses.gbce(hidden, embedding, targets, negatives)
        of_few = {"bce": losses.bce, "mse": losses.mse, "info_nce": losses.info_nce}[self.how.loss]
        return of_few(hidden, embedding, targets, negatives, outcomes)

    def negatives(self, targets: Tensor, seen: Tensor | None) -> Tensor:
        """(M, K) items drawn uniformly, never a row's target, nor what it has seen unless that is nearly all."""

        def draw(targets: Tensor, count: int) -> Tensor:
            drawn = torch.randint(1, self.model.config.num_items, (len(targets), count), device=targets.device)
            return drawn + (drawn >= targets[:, None])  # from one item fewer, stepping over the target

        negatives = draw(targets, self.how.negatives)
        if seen is not None and negatives.numel():
            for _ in range(REDRAWS):
                at = torch.searchsorted(seen, negatives).clamp_(max=seen.shape[1] - 1)
                again = seen.gather(1, at) == negatives  # (M, K)
                negatives[again] = draw(targets[again.nonzero()[:, 0]], 1)[:, 0]
        return negatives

    def sampled_softmax(
        self,
        hidden: Tensor,
        targets: Tensor,
        of_window: Tensor,
        outcomes: Tensor | None,
        target_share: Tensor,
        seen: Tensor | None,
    ) -> Tensor:
        """As ``loss``; of_window (M, T): the targets of a position's window, or padding, all in its sample."""
        embedding, drawn = self.model.item_embedding.weight, self.how.negatives
        certain = _filled(of_window, targets)
        left_out = None if seen is None else _filled(seen, targets)
        negatives = torch.randint(1, self.model.config.num_items + 1, (drawn,), device=targets.device)
        candidates = torch.unique(torch.cat((targets, negatives)))
        log_inclusion = losses.inclusion(candidates, target_share, len(targets), drawn)
        return losses.sampled_softmax(
            hidden, embedding, targets, candidates, log_inclusion, certain, outcomes, left_out
        )

    def validate(self, sequences: Sequences, validation: Holdout | None) -> tuple[Metrics | None, float | None]:
        if validation is None or not len(validation):
            return None, None
        engine = Engine(self.judged, sequences.vocab, cache_bytes=0, index="exact")
        try:
            metrics = evaluate(engine, validation, (VALIDATION_K,), filter_seen=not _mostly_repeats(validation))
        except ValueError as error:  # the last step of the epoch blew the weights up: no loss has shown it yet
            raise TrainingError(f"{error}; it was learning_rate={self.how.learning_rate}") from error
        return metrics, self.held_out_loss(engine, validation.sample(VALIDATION_LOSS_CASES, self.how.seed))

    @torch.no_grad()
    def held_out_loss(self, engine: Engine, validation: Holdout) -> float | None:
        """Loss on held-out targets, each an outcome of 1, with the same negatives in every epoch."""
        windows = [engine.window(history) for history in validation.histories]
        known = [i for i, window in enumerate(windows) if len(window) and validation.targets[i] != PADDING]
        if not known:
            return None
        hidden = engine.encode([windows[i] for i in known]).clone()  # out of inference mode
        device = hidden.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.how.seed)
            targets = torch.as_tensor(validation.targets[known], device=device)
            seen = pad_rows([windows[i] for i in known], device).sort(1).values if self.how.skip_seen else None
            return self.loss(hidden, targets, seen=seen).item()


def _average(decay: float, averaged: list[Tensor], current: list[Tensor], batches: Tensor | int) -> None:
    """Move the average towards the current weights; faster in the beginning, when it knows of few batches."""
    torch._foreach_lerp_(averaged, current, 1 - min(decay, (2 + int(batches)) / (11 + int(batches))))


def _filled(items: Tensor, targets: Tensor) -> Tensor:
    """Items (M, C) of each row, its target (M,) in the place of padding."""
    return torch.where(items == PADDING, targets[:, None], items)


def _mostly_repeats(validation: Holdout) -> bool:
    repeats = sum(target in history for history, target in zip(validation.histories, validation.targets, strict=True))
    return repeats > len(validation) / 2


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
