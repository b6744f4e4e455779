"""One round of retraining: archive -> sequences -> fit -> compare -> publish -> promote.

A round is full or incremental. A full round trains from scratch on the last ``retrain_days``. An incremental round
trains the champion further with the clicks that are new to it and a sample of older ones; known items keep their
embeddings, new items get rows.

The newest clicks are held out (timeline.py) and decide whether the new model, the challenger, is promoted (gate.py).
A challenger that is not promoted remains in the registry with its report and the reason.

Between training and champion stands promotion.py: a person has the last word.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sasrec import (
    Interactions,
    ItemVocab,
    Metrics,
    ModelMetadata,
    SASRec,
    SASRecConfig,
    SavedModel,
    Sequences,
    TrainConfig,
    TrainingError,
    resize_model,
    train,
)
from sasrec.data.sequences import Indices
from sasrec.data.times import TimeBounds
from sasrec.training.objectives import Loss
from streamrec.archive.segments import EventArchive
from streamrec.errors import RetrainError, RetrainStopped
from streamrec.event_times import usable
from streamrec.registry import Registry
from streamrec.retraining.gate import compare, refusal
from streamrec.retraining.promotion import Promotion, Verdict, load_champion, prune
from streamrec.retraining.timeline import recent, sessions, split
from streamrec.settings import Settings
from streamrec.source import git

log = logging.getLogger(__name__)

# Validation uses the last click of a tenth of the users, at least of these. It chooses the epoch.
MIN_VALIDATION_USERS = 500
MANY_ITEMS = 10_000  # above this, ranking all items at every click is slow


@dataclass(frozen=True)
class _Start:
    """What training starts from: a vocabulary alone, or the champion with a vocabulary that has the new items too."""

    vocab: ItemVocab
    why: str
    rounds_since_full: int = 0  # after this round
    champion: SASRec | None = None
    is_new: NDArray[np.bool_] | None = None  # (N,) which training events the champion was not trained on

    @property
    def mode(self) -> str:
        return "full" if self.champion is None else "incremental"


def retrain(
    settings: Settings,
    *,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
    may_promote: Callable[[], bool] = lambda: True,
) -> Verdict:
    """Train on the archive, compare with the champion, publish, and promote if the gate allows it.

    Over 40 lines: the steps of a round, one after the other.

    Args:
        progress: draw a progress bar on stderr.
        stop: called after every batch; True ends the round without a model.
        may_promote: called last of all; False: another worker has the lock.

    Raises:
        RetrainError: there are too few clicks to train or to compare on.
        RetrainStopped: ``stop`` returned True.
        StreamrecError: archive or registry cannot be used.
    """
    assert settings.archive.dir is not None and settings.registry.dir is not None
    registry = Registry(settings.registry.dir)
    archive = EventArchive(settings.archive.dir, settings.kafka.topic_epoch)
    claimed = registry.claim()
    next_offsets = archive.next_offsets()
    bounds = settings.events.bounds(time.time() * 1000)
    archived = archive.read()
    clicks = recent(archived.where(usable(archived.timestamps_ms, bounds, archive.store)), settings.retrain.days)
    champion = load_champion(registry, claimed)
    until_ms = _trained_until_ms(champion, bounds)
    past, held_out = split(clicks, settings.retrain.holdout_share, until_ms)
    start = _choose_start(settings, past, champion, until_ms, _rounds_since_full(registry))
    train_config = _train_config(settings, len(start.vocab), start.mode)
    _log_start(start, len(past), len(held_out))

    gap_ms = settings.sequences.session_gap_s * 1000
    started_s = time.monotonic()
    model, validation = _fit(sessions(past, gap_ms), start, settings.model_shape, train_config, progress, stop)
    if stop():
        raise RetrainStopped("stopped during training; nothing was published")
    train_s = round(time.monotonic() - started_s, 1)

    challenger = SavedModel(model, start.vocab, {}, "challenger")
    report = compare(challenger, champion, sessions(clicks, gap_ms), len(held_out), settings.lists.filter_seen)
    refused = refusal(report, settings.retrain.gate_tolerance)
    metadata: ModelMetadata = {
        "validation": validation.as_dict() if validation else {},
        "report": report,
        **_lineage(start, champion, past),
        "train_s": train_s,
        "topic_epoch": archive.topic_epoch,
        "next_offsets": {str(partition): offset for partition, offset in next_offsets.items()},
        "train_config": asdict(train_config),
        "git_commit": git("rev-parse", "HEAD"),
        "refused": refused,
    }
    verdict = Promotion(registry, claimed, may_promote).publish(model, start.vocab, metadata)
    prune(registry, settings.registry.keep_versions)
    return verdict


def loss_for(num_items: int) -> Loss:
    """Return the loss that ranks best at an acceptable cost for a catalogue of this size."""
    return "cross_entropy" if num_items <= MANY_ITEMS else "sampled_softmax"


def _train_config(settings: Settings, num_items: int, mode: str) -> TrainConfig:
    """Return the training settings of a round; loss and skip_seen are derived unless they are set."""
    config = settings.training
    if "train_loss" not in settings.given:
        config = replace(config, loss=loss_for(num_items))
    if "train_skip_seen" not in settings.given:
        config = replace(config, skip_seen=settings.lists.filter_seen)
    if mode == "incremental":
        update = settings.retrain
        config = replace(config, epochs=update.update_epochs, learning_rate=update.update_learning_rate)
    return config


def _choose_start(
    settings: Settings, past: Interactions, champion: SavedModel | None, until_ms: int | None, rounds_since_full: int
) -> _Start:
    """Start from the champion if settings, shape and metadata allow it, else from scratch.

    Raises:
        RetrainError: the champion was trained on all of these clicks.
    """
    if settings.retrain.mode == "full":
        why = "retrain_mode is full"
    elif champion is None:
        why = "there is no champion to train further"
    elif until_ms is None:
        why = f"the metadata of the champion {champion.version} do not say on which clicks it was trained"
    elif not champion.model.config.same_shape(settings.model_shape):
        why = f"the champion {champion.version} has another shape than the settings"
    elif rounds_since_full + 1 >= settings.retrain.full_every:
        why = f"{rounds_since_full} rounds since the last full one"
    else:
        is_new = past.timestamps_ms > until_ms
        if not is_new.any():
            raise RetrainError(
                f"the champion {champion.version} was trained on all clicks that are not held out: wait for more"
            )
        vocab = champion.vocab.extended(past.where(is_new).item_ids)
        return _Start(vocab, f"the champion is {champion.version}", rounds_since_full + 1, champion.model, is_new)
    return _Start(ItemVocab.from_items(past.item_ids), why)


def _log_start(start: _Start, events: int, held_out: int) -> None:
    log.info(
        "training",
        extra={
            "mode": start.mode,
            "why": start.why,
            "events": events,
            "new": events if start.is_new is None else start.is_new.sum(),
            "held_out": held_out,
            "items": len(start.vocab),
        },
    )


def _fit(
    past: Interactions,
    start: _Start,
    shape: SASRecConfig,
    train_config: TrainConfig,
    progress: bool,
    stop: Callable[[], bool],
) -> tuple[SASRec, Metrics | None]:
    """Return the trained model and its validation figures.

    Raises:
        RetrainError: training failed, or there is nothing to learn from.
    """
    everything = Sequences.build(past, start.vocab)
    sequences, validation = everything.leave_last_out(max(MIN_VALIDATION_USERS, len(everything) // 10))
    config = replace(shape, num_items=len(start.vocab))
    initial = None if start.champion is None else resize_model(start.champion, config, sequences)
    new_events = None if start.is_new is None else _new_events(past, start.is_new, everything, sequences)
    try:
        model, result = train(
            config,
            sequences,
            train_config,
            validation,
            initial=initial,
            new_events=new_events,
            progress=progress,
            stop=stop,
        )
    except (TrainingError, ValueError) as error:
        raise RetrainError(str(error)) from None
    return model, result.best.validation


def _new_events(past: Interactions, is_new: NDArray[np.bool_], everything: Sequences, sequences: Sequences) -> Indices:
    """Return how many of the last events of each sequence are new, without those left out for validation."""
    counts = Counter(user for user, new in zip(past.user_ids, is_new.tolist(), strict=True) if new)
    new = np.array([counts[user] for user in everything.user_ids], np.int64)  # (U,)
    left_out: Indices = np.diff(everything.offsets) - np.diff(sequences.offsets)
    return new - left_out


def _lineage(start: _Start, champion: SavedModel | None, past: Interactions) -> ModelMetadata:
    """Return the part of the metadata that names the clicks and the model from which the new one comes."""
    return {
        "mode": start.mode,
        "rounds_since_full": start.rounds_since_full,
        "parent": champion.version if champion else None,
        "trained_from_ms": int(past.timestamps_ms.min()),
        "trained_until_ms": int(past.timestamps_ms.max()),
    }


def _trained_until_ms(champion: SavedModel | None, bounds: TimeBounds) -> int | None:
    """Return the time of the newest click that the champion was trained on; None if its metadata do not say."""
    until_ms = champion.metadata.get("trained_until_ms") if champion else None
    if champion is None or not isinstance(until_ms, int):
        return None
    if until_ms > bounds.latest_ms:  # no click would ever be new to it
        log.warning(
            "the champion %s is taken as trained on unknown clicks: %s",
            champion.version,
            bounds.problem("trained_until_ms", until_ms),
        )
        return None
    return until_ms


def _rounds_since_full(registry: Registry) -> int:
    """Count the rounds after the last full one, promoted or not."""
    known = [version.metadata.get("rounds_since_full") for version in registry.versions()]
    return next((count for count in reversed(known) if isinstance(count, int)), 0)
