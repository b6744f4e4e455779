"""One round of retraining: archive -> sequences -> fit -> judge -> gate -> publish -> promote.

The newest slice of the time line is held out: no model has been trained on it when it judges challenger and
champion, on the same clicks, over the full catalogue, through the Engine that serves. The counted baselines
stand beside them. A challenger that is not promoted stays in the registry with its report and the reason.

A round is full, from scratch on the last ``retrain_days``, or incremental: the champion is trained on with the
clicks that it has not seen and a sample of older ones, known items keep their embeddings, new ones get rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sasrec import (
    Engine,
    Holdout,
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
    evaluate,
    resize_model,
    train,
)
from sasrec.data.sequences import Indices
from sasrec.evaluation.baselines import MarkovChain, Popularity
from sasrec.training.objectives import Loss
from streamrec.archive.segments import EventArchive
from streamrec.errors import RegistryError, RetrainError, RetrainStopped
from streamrec.registry import Registry
from streamrec.settings import Settings
from streamrec.source import git

log = logging.getLogger(__name__)

K = 10
JUDGED_CASES = 5_000
JUDGED_AT_LEAST = 500  # clicks, where there are so many
LISTED_CASES = 500  # of which the lists themselves are compared
VALIDATION_USERS = 500  # at least, or a tenth of all: their last clicks choose the epoch, and train nothing
MANY_ITEMS = 10_000  # ranking all of them at every click becomes slow: a sample of the catalogue stands for it
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Verdict:
    """What became of a challenger."""

    version: str
    mode: str
    promoted: bool
    reason: str
    report: dict[str, Any]


@dataclass(frozen=True)
class _Beginning:
    """What a training begins with: nothing but a vocabulary, or the champion's weights and what is new to them."""

    vocab: ItemVocab
    why: str
    champion: SASRec | None = None
    new: Indices | None = None  # (N,) 1 where an event of the past is new to the champion


def retrain(settings: Settings, *, progress: bool = False, stop: Callable[[], bool] = lambda: False) -> Verdict:
    """Train on the archive, judge, and promote if it is good enough.

    Args:
        progress: draw a progress bar on stderr.
        stop: asked after every batch; True ends the round without a model.

    Raises:
        RetrainError: there is too little to train or to judge on.
        RetrainStopped: ``stop`` said so.
        StreamrecError: archive or registry cannot be used.
    """
    assert settings.archive.dir is not None and settings.registry.dir is not None
    registry = Registry(settings.registry.dir)
    archive = EventArchive(settings.archive.dir, settings.kafka.topic_epoch)
    next_offsets = archive.next_offsets()
    events = _window(archive.read(), settings.retrain.days)
    champion = _champion(registry)
    past, new = _split(events, settings.retrain.holdout_share, _trained_until_ms(champion))
    config = settings.model_shape
    rounds_since_full = _rounds_since_full(registry)
    begin = _beginning(settings, past, champion, config, rounds_since_full)
    mode = "full" if begin.champion is None else "incremental"
    how = _train_config(settings, len(begin.vocab), mode)
    gap_ms = settings.sequences.session_gap_s * 1000
    log.info(
        "training",
        extra={
            "mode": mode,
            "why": begin.why,
            "events": len(past),
            "new": len(past) if begin.new is None else begin.new.sum(),
            "held_out": len(new),
            "items": len(begin.vocab),
        },
    )
    started = time.monotonic()
    model, validation = _fit(sessions(past, gap_ms), begin, config, how, progress, stop)
    if stop():
        raise RetrainStopped("told to stop while it trained; nothing was published")
    train_s = time.monotonic() - started
    challenger = SavedModel(model, begin.vocab, {}, "challenger")
    report = judge(challenger, champion, sessions(events, gap_ms), len(new), settings.lists.filter_seen)
    reason = refusal(report, settings.retrain.gate_tolerance)
    metadata: ModelMetadata = {
        "validation": validation.as_dict() if validation else {},
        "report": report,
        "mode": mode,
        "rounds_since_full": 0 if mode == "full" else rounds_since_full + 1,
        "parent": champion.version if champion else None,
        "trained_from_ms": int(past.timestamps_ms.min()),
        "trained_until_ms": int(past.timestamps_ms.max()),
        "train_s": round(train_s, 1),
        "next_offsets": {str(partition): offset for partition, offset in next_offsets.items()},
        "train_config": asdict(how),
        "git_commit": git("rev-parse", "HEAD"),
        "refused": reason,
    }
    version = registry.publish(model, begin.vocab, metadata)
    if reason is None:
        registry.promote(version, f"NDCG@{K} {report['challenger']['ndcg@10']:.4f} on the newest clicks")
    registry.prune(settings.registry.keep_versions)
    log.info(
        "promoted" if reason is None else "not promoted",
        extra={
            "model": version,
            "reason": reason or "better",
            "train_s": round(train_s, 1),
        },
    )
    return Verdict(version, mode, reason is None, reason or "it passed the gate", report)


def loss_for(num_items: int) -> Loss:
    """The loss that ranks best and can still be paid for with so many items."""
    return "cross_entropy" if num_items <= MANY_ITEMS else "sampled_softmax"


def _train_config(settings: Settings, num_items: int, mode: str) -> TrainConfig:
    """Return how a round trains a catalogue of this size; loss and skip_seen follow from it unless they are set."""
    config = settings.training
    if "train_loss" not in settings.given:
        config = replace(config, loss=loss_for(num_items))
    if "train_skip_seen" not in settings.given:
        config = replace(config, skip_seen=settings.lists.filter_seen)
    if mode == "incremental":
        update = settings.retrain
        config = replace(config, epochs=update.update_epochs, learning_rate=update.update_learning_rate)
    return config


def _beginning(
    settings: Settings, past: Interactions, champion: SavedModel | None, config: SASRecConfig, rounds_since_full: int
) -> _Beginning:
    """The champion, if the settings and its lineage allow it to be trained on."""
    until_ms = _trained_until_ms(champion)
    if settings.retrain.mode == "full":
        why = "the settings say so"
    elif champion is None:
        why = "there is no champion that could be trained on"
    elif until_ms is None:
        why = f"nothing tells what the champion {champion.version} was trained on"
    elif not champion.model.config.same_shape(config):
        why = f"the champion {champion.version} has another shape than the settings ask for"
    elif rounds_since_full + 1 >= settings.retrain.full_every:
        why = f"{rounds_since_full} rounds since the last full one"
    else:
        new = past.timestamps_ms > until_ms
        if not new.any():
            raise RetrainError(
                f"all clicks but the newest, which judge, were seen by the champion {champion.version}: wait for more"
            )
        vocab = champion.vocab.extended(past.where(new).item_ids)
        return _Beginning(vocab, f"on from {champion.version}", champion.model, new.astype(np.int64))
    return _Beginning(ItemVocab.from_items(past.item_ids), why)


def _fit(
    past: Interactions,
    begin: _Beginning,
    config: SASRecConfig,
    how: TrainConfig,
    progress: bool,
    stop: Callable[[], bool],
) -> tuple[SASRec, Metrics | None]:
    sequences = Sequences.build(past, begin.vocab)
    rest, validation = sequences.leave_last_out(max(VALIDATION_USERS, len(sequences) // 10))
    new_events = None
    if begin.new is not None:
        counts = Counter(user for user, new in zip(past.user_ids, begin.new, strict=True) if new)
        held = np.diff(sequences.offsets) - np.diff(rest.offsets)
        new_events = np.array([counts[user] for user in sequences.user_ids], np.int64) - held
    config = replace(config, num_items=len(begin.vocab))
    initial = None if begin.champion is None else resize_model(begin.champion, config, rest)
    try:
        model, result = train(
            config,
            rest,
            how,
            validation,
            initial=initial,
            new_events=new_events,
            progress=progress,
            stop=stop,
        )
    except (TrainingError, ValueError) as error:
        raise RetrainError(str(error)) from None
    return model, result.best.validation


def sessions(events: Interactions, gap_ms: float) -> Interactions:
    """Events with a user id for each session, as the daemon begins a new sequence after a longer pause."""
    if not gap_ms:
        return events
    number: dict[str, int] = {}
    last: dict[str, int] = {}
    users = []
    for user, ts_ms in zip(events.user_ids, events.timestamps_ms.tolist(), strict=True):
        if user in last and ts_ms - last[user] > gap_ms:
            number[user] = number.get(user, 0) + 1
        last[user] = ts_ms
        users.append(f"{number.get(user, 0)}\0{user}")
    return replace(events, user_ids=users)


def judge(
    challenger: SavedModel, champion: SavedModel | None, events: Interactions, held_out: int, filter_seen: bool
) -> dict[str, Any]:
    """Challenger, champion and baselines on the last ``held_out`` of the events, each after its own history.

    The catalogue is the challenger's and the champion's together: an item that one of them does not know is a
    miss of that one.
    """
    ids = dict.fromkeys(challenger.vocab.ids)
    if champion is not None:
        ids |= dict.fromkeys(champion.vocab.ids)
    everything = ItemVocab(ids)
    cases = _holdout(events, held_out, everything).sample(JUDGED_CASES, seed=0)
    if not len(cases):
        raise RetrainError("none of the newest clicks follows an earlier one of its user: there is nothing to judge by")
    report: dict[str, Any] = {"cases": len(cases)}
    lists: dict[str, list[set[str]]] = {}
    for name, saved in (("challenger", challenger), ("champion", champion)):
        if saved is not None:
            engine = Engine(saved.model, saved.vocab, cache_bytes=0, index="exact")
            report[name] = _metrics(engine, _translated(cases, everything, saved.vocab), filter_seen)
            lists[name] = _lists(engine, cases, everything, filter_seen)
            report[name]["coverage@10"] = len(set().union(*lists[name])) / len(saved.vocab)
    before = Sequences.build(events.first(len(events) - held_out), challenger.vocab)
    translated = _translated(cases, everything, challenger.vocab)
    for name, baseline in (("popularity", Popularity()), ("markov", MarkovChain())):
        report[name] = _flat(evaluate(baseline.fit(before), translated, (K,), filter_seen))
    if champion is not None:
        shared = [len(a & b) / K for a, b in zip(lists["challenger"], lists["champion"], strict=True)]
        report["overlap@10"] = float(np.mean(shared))
    return report


def refusal(report: dict[str, Any], tolerance: float) -> str | None:
    """Why a challenger must not go live; None if it may."""
    ours, popular = report["challenger"]["ndcg@10"], report["popularity"]["ndcg@10"]
    if not math.isfinite(ours):
        return "its scores are NaN or infinite"
    if ours <= popular:
        return f"NDCG@{K} {ours:.4f} is no better than popularity's {popular:.4f}"
    champion = report.get("champion")
    if champion and ours < champion["ndcg@10"] * (1 - tolerance):
        return f"NDCG@{K} {ours:.4f} is below the champion's {champion['ndcg@10']:.4f} by more than {tolerance:.0%}"
    return None


def _window(events: Interactions, days: float) -> Interactions:
    if not len(events):
        raise RetrainError(
            "the archive is empty; fill it with: streamrec archive follow, or streamrec archive import FILE"
        )
    recent = events.timestamps_ms >= events.timestamps_ms.max() - days * DAY_MS
    return timeline(events.where(recent))


def timeline(events: Interactions) -> Interactions:
    """Events of all users in one order of time, each user's in the order in which they came.

    A click that came late, with an older timestamp than the one before it of its user, stays behind that one:
    the daemon has applied it there.
    """
    latest: dict[str, int] = {}
    times = []
    for user, ts_ms in zip(events.user_ids, events.timestamps_ms.tolist(), strict=True):
        latest[user] = max(ts_ms, latest.get(user, ts_ms))
        times.append(latest[user])
    return events.in_order(np.array(times, np.int64))


def _split(events: Interactions, held_out: float, seen_until_ms: int | None) -> tuple[Interactions, Interactions]:
    """What is trained on, and the newest clicks, which judge: none of them may the champion have been trained on.

    Where few clicks are new to the champion half of them judge: a share of a long archive would be all of them, and
    what is new would be learned late.
    """
    begin = int(len(events) * (1 - held_out))
    if seen_until_ms is not None:
        unseen = np.flatnonzero(np.maximum.accumulate(events.timestamps_ms) > seen_until_ms)
        if not len(unseen):
            raise RetrainError("the champion has been trained on all clicks there are: wait for new ones to judge by")
        begin = max(begin, int(unseen[0]), len(events) - max(JUDGED_AT_LEAST, len(unseen) // 2))
    if not 0 < begin < len(events):
        raise RetrainError(f"{len(events)} events are too few to train on and to hold {held_out:.0%} out")
    return events.first(begin), events.newest(len(events) - begin)


def _holdout(events: Interactions, held_out: int, vocab: ItemVocab) -> Holdout:
    """Each of the last events as a target, after all of its user before it; first events of a user give none."""
    histories, targets = [], []
    so_far: dict[str, list[int]] = {}
    begin = len(events) - held_out
    for at, (user, item) in enumerate(zip(events.user_ids, vocab.encode(events.item_ids), strict=True)):
        history = so_far.setdefault(user, [])
        if at >= begin and history:
            histories.append(np.array(history, np.int64))
            targets.append(item)
        history.append(item)
    return Holdout(histories, np.array(targets, np.int64))


def _translated(cases: Holdout, everything: ItemVocab, vocab: ItemVocab) -> Holdout:
    """The same cases in another vocabulary's indices; what it does not know becomes 0."""
    to = np.array([0, *vocab.encode(everything.ids)], np.int64)
    return Holdout([to[history] for history in cases.histories], to[cases.targets])


def _metrics(engine: Engine, cases: Holdout, filter_seen: bool) -> dict[str, float]:
    try:
        return _flat(evaluate(engine, cases, (K,), filter_seen))
    except ValueError:  # NaN or infinite scores
        return dict.fromkeys((f"hr@{K}", f"ndcg@{K}", f"mrr@{K}"), math.nan)


def _flat(metrics: Metrics) -> dict[str, float]:
    return {name: value for name, value in metrics.as_dict().items() if name != "cases"}


def _lists(engine: Engine, cases: Holdout, everything: ItemVocab, filter_seen: bool) -> list[set[str]]:
    histories = [everything.decode(history[history > 0].tolist()) for history in cases.histories[:LISTED_CASES]]
    rankings = engine.recommend(histories, K, filter_seen=filter_seen)
    return [set(ranking.items) if ranking else set() for ranking in rankings]


def _champion(registry: Registry) -> SavedModel | None:
    champion = registry.champion()
    if champion is None:
        return None
    try:
        return registry.load(champion.version)
    except RegistryError as error:  # a damaged champion must not keep a better one away
        log.warning("the champion cannot be judged: %s", error)
        return None


def _trained_until_ms(champion: SavedModel | None) -> int | None:
    until_ms = champion.metadata.get("trained_until_ms") if champion else None
    return until_ms if isinstance(until_ms, int) else None


def _rounds_since_full(registry: Registry) -> int:
    """Rounds that came after the last full one, promoted or not."""
    known = [version.metadata.get("rounds_since_full") for version in registry.versions()]
    return next((count for count in reversed(known) if isinstance(count, int)), 0)
