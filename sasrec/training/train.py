"""The training loop. It parses no arguments and leaves all global random state as it was."""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from sasrec.data.sequences import Holdout, Indices, Outcomes, Sequences
from sasrec.data.vocab import PADDING
from sasrec.data.windows import TrainingWindows
from sasrec.evaluation.metrics import Metrics, evaluate
from sasrec.inference.engine import Engine
from sasrec.inference.packed import pad_rows
from sasrec.model import SASRec, SASRecConfig
from sasrec.training.config import TrainConfig
from sasrec.training.objectives import Positions
from sasrec.training.result import VALIDATION_K, Epoch, TrainResult

log = logging.getLogger(__name__)

# The paper's code has 0.98. With it AdamW forgets a rare item's gradients between two batches with that item, so that
# each of them moves the item by a whole step, however small: R@20 .453 instead of .471 on Diginetica's week 4.
ADAM_BETAS = (0.9, 0.999)
VALIDATION_CASES = 5_000
VALIDATION_LOSS_CASES = 1_000


class TrainingError(ValueError):
    """Training cannot continue; the message gives the reason and the remedy."""


def train(
    config: SASRecConfig,
    sequences: Sequences,
    train_config: TrainConfig,
    validation: Holdout | None = None,
    *,
    initial: SASRec | None = None,
    new_events: Indices | None = None,
    device: str = "cpu",
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[SASRec, TrainResult]:
    """Train a model; equal seed, data and thread count give equal weights.

    Validation ranks held-out targets only, over the full catalogue. Seen items are filtered, unless most held-out
    targets repeat an item. The model gets the weights with the best NDCG@10; without validation, the last ones.

    Args:
        initial: start with the weights of this model, of the same shape, instead of random ones; it is not changed.
        new_events: (U,) number of each user's last events that the initial model has not been trained on. An epoch
            then trains the windows with new events, and a fresh sample of the others, ``train_config.replay`` times as
            many, so that the model does not forget.
        progress: draw a progress bar on stderr.
        stop: called after every batch; True ends training at once, with the best weights so far.

    Raises:
        TrainingError: the loss or the scores are not finite, no user has two events, the loss cannot learn from the
            outcomes, or no event is new.
    """
    try:
        windows = TrainingWindows(sequences, config.max_len, newest=train_config.windows == "newest")
    except ValueError as error:
        raise TrainingError(str(error)) from error
    if train_config.negatives and config.num_items < 2:
        raise TrainingError(
            f"{train_config.loss} needs negatives, but there is only one item; use loss='cross_entropy'"
        )
    _check_outcomes(sequences, train_config)
    if new_events is not None and not windows.with_new(new_events).any():
        raise TrainingError("no user has a new event that follows an earlier one: there is nothing to train on")
    if validation is not None:
        validation = validation.sample(VALIDATION_CASES, train_config.seed)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _progress(progress) as bar:
        torch.manual_seed(train_config.seed)
        model = SASRec(config)
        if initial is not None:
            model.load_state_dict(initial.state_dict())
        trainer = _Trainer(model.to(device), windows, train_config, new_events, bar, stop)
        result = trainer.fit(sequences, validation)
    return trainer.model, result


def _check_outcomes(sequences: Sequences, config: TrainConfig) -> None:
    outcomes, objective = sequences.outcomes, config.objective
    contrast = config.negatives or objective.ranks_catalogue
    if not contrast and (outcomes is None or np.ptp(outcomes) == 0):
        raise TrainingError(f"num_negatives=0: {config.loss} cannot tell items apart; give at least 1")
    if outcomes is None:
        return
    if objective.outcomes == "none":
        raise TrainingError(f"loss='{config.loss}' takes no outcomes; use 'bce' or 'mse', or leave them out")
    if objective.outcomes == "0 to 1" and not (outcomes.min() >= 0 and outcomes.max() <= 1):
        raise TrainingError(
            f"outcomes from {outcomes.min():g} to {outcomes.max():g}: loss='{config.loss}' takes 0 to 1; "
            "divide them by their largest value, or use loss='mse'"
        )


class _Trainer:
    def __init__(
        self,
        model: SASRec,
        windows: TrainingWindows,
        config: TrainConfig,
        new_events: Indices | None,
        bar: Progress,
        stop: Callable[[], bool],
    ) -> None:
        self.model, self.windows, self.config = model, windows, config
        self.rng = np.random.default_rng(config.seed)
        new = np.ones(len(windows), bool) if new_events is None else windows.with_new(new_events)
        self.new, self.old = np.flatnonzero(new), np.flatnonzero(~new)
        self.replayed = min(len(self.old), round(config.replay * len(self.new)))
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            fused=True,
        )
        self.average = None
        if config.ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=functools.partial(_move_average, config.ema_decay))
        self.stop = stop
        self.bar = bar
        self.batches = -(-(len(self.new) + self.replayed) // config.batch_size)  # of an epoch
        steps = config.epochs * self.batches
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: config.learning_rate_factor(step, steps)
        )
        self.task: TaskID = bar.add_task("training", total=steps, status="")

    @property
    def validated(self) -> SASRec:
        """The model that is validated and returned: the trained one, or the average of its weights."""
        return self.model if self.average is None else cast(SASRec, self.average.module)

    def fit(self, sequences: Sequences, validation: Holdout | None) -> TrainResult:
        result = TrainResult()
        best_ndcg, best_weights = -math.inf, None
        for number in range(self.config.epochs):
            started = time.perf_counter()
            loss = self.epoch(number, f"NDCG@{VALIDATION_K} {best_ndcg:.4f}" if best_weights else "")
            metrics, validation_loss = self.validate(sequences, validation)
            result.epochs.append(Epoch(loss, time.perf_counter() - started, metrics, validation_loss))
            ndcg = float(number) if metrics is None else metrics.ndcg[VALIDATION_K]
            figures = "" if metrics is None else f", validation NDCG@{VALIDATION_K} {ndcg:.4f}"
            log.info("epoch %d: loss %.4f%s", number + 1, loss, figures)
            if ndcg > best_ndcg:
                best_ndcg, result.best_epoch = ndcg, number
                best_weights = copy.deepcopy(self.validated.state_dict()) if metrics is not None else None
            if self.stop() or (metrics is not None and 0 < self.config.patience <= number - result.best_epoch):
                break
        if best_weights is None or not self.config.restore_best:
            best_weights = self.validated.state_dict()
        self.model.load_state_dict(best_weights)
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise TrainingError(f"the last step made weights NaN; lower learning_rate={self.config.learning_rate}")
        self.model.eval()
        self.bar.update(self.task, completed=self.config.epochs * self.batches)
        return result

    def epoch(self, number: int, status: str) -> float:
        """Train one epoch; return its mean loss."""
        self.model.train()
        total, count = 0.0, 0
        which = np.concatenate((self.new, self.rng.choice(self.old, self.replayed, replace=False)))
        share = torch.as_tensor(self.windows.target_share(which), device=self.model.item_embedding.weight.device)
        for items, targets, outcomes in self.windows.batches(self.config.batch_size, self.rng, which):
            loss, positions = self.batch(items, targets, outcomes, share)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss became {loss} in epoch {number + 1}; lower learning_rate={self.config.learning_rate}"
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
        """Train one batch of windows; return its loss and the number of its positions."""
        embedding = self.model.item_embedding.weight
        device, objective = embedding.device, self.config.objective
        x = torch.as_tensor(items, device=device)  # (B, T)
        y = torch.as_tensor(targets, device=device)  # (B, T)
        at = y.flatten().nonzero()[:, 0]  # (M,) positions with a target
        row = at // y.shape[1]  # (M,) the window of each position
        seen = torch.cat((x[:, :1], y), 1).sort(1).values[row] if self.config.skip_seen else None  # (M, T + 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast):
            # index_select: the gradient of x[mask] takes four times as long
            hidden = self.model(x).flatten(0, 1).index_select(0, at)  # (M, D)
        positions = Positions(
            hidden.to(embedding.dtype),
            embedding,
            y.flatten()[at],
            self.config.negatives,
            None if outcomes is None else torch.as_tensor(outcomes, device=device).flatten()[at],
            seen,
            y[row],
            target_share,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.autocast and objective.ranks_catalogue):
            loss = objective.loss(positions)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.schedule.step()
        return loss.item(), len(hidden)

    def validate(self, sequences: Sequences, validation: Holdout | None) -> tuple[Metrics | None, float | None]:
        """Return metrics and loss of held-out targets."""
        if validation is None or not len(validation):
            return None, None
        engine = Engine(self.validated, sequences.vocab, cache_bytes=0, index="exact")
        try:
            metrics = evaluate(engine, validation, (VALIDATION_K,), filter_seen=not _mostly_repeats(validation))
        except ValueError as error:  # the epoch's last step made the weights too large, and no loss has shown it yet
            raise TrainingError(f"{error}; it was learning_rate={self.config.learning_rate}") from error
        return metrics, self.held_out_loss(engine, validation.sample(VALIDATION_LOSS_CASES, self.config.seed))

    @torch.no_grad()
    def held_out_loss(self, engine: Engine, validation: Holdout) -> float | None:
        """Return the loss of held-out targets, each with an outcome of 1; the negatives are equal in every epoch."""
        windows = [engine.window(history) for history in validation.histories]
        known = [i for i, window in enumerate(windows) if len(window) and validation.targets[i] != PADDING]
        if not known:
            return None
        hidden = engine.encode([windows[i] for i in known]).clone()  # out of inference mode
        device, objective = hidden.device, self.config.objective
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            targets = torch.as_tensor(validation.targets[known], device=device)
            seen = None
            if self.config.skip_seen:
                seen = pad_rows([windows[i] for i in known], device).sort(1).values
            embedding = self.model.item_embedding.weight
            positions = Positions(hidden, embedding, targets, self.config.negatives, seen=seen)
            return (objective.held_out_loss or objective.loss)(positions).item()


def _move_average(decay: float, averaged: list[Tensor], current: list[Tensor], batches: Tensor | int) -> None:
    """Move the average towards the current weights; faster in the first batches."""
    torch._foreach_lerp_(averaged, current, 1 - min(decay, (2 + int(batches)) / (11 + int(batches))))


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
