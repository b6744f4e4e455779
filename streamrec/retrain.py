"""One round of retraining: archive -> sequences -> fit -> judge -> gate -> publish -> promote.

The newest slice of the time line is held out: no model has been trained on it when it judges challenger and
champion, on the same clicks, over the full catalogue, through the Engine that serves. The counted baselines
stand beside them. A challenger that is not promoted stays in the registry with its report and the reason.
"""

from __future__ import annotations

import logging
import math
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sasrec import (
    Engine,
    Holdout,
    Interactions,
    ItemVocab,
    Metrics,
    SASRecConfig,
    SavedModel,
    Sequences,
    TrainConfig,
    TrainingError,
    evaluate,
    train,
)
from sasrec.baselines import MarkovChain, Popularity
from streamrec.archive import EventArchive
from streamrec.errors import RegistryError, RetrainError
from streamrec.registry import Registry
from streamrec.settings import Settings

log = logging.getLogger(__name__)

K = 10
JUDGED_CASES = 5_000
LISTED_CASES = 500  # of which the lists themselves are compared
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Verdict:
    """What became of a challenger."""

    version: str
    promoted: bool
    reason: str
    report: dict[str, Any]


def retrain(settings: Settings, *, progress: bool = False) -> Verdict:
    """Train on the archive, judge, and promote if it is good enough.

    Args:
        progress: draw a progress bar on stderr.

    Raises:
        RetrainError: there is too little to train or to judge on.
        StreamrecError: archive or registry cannot be used.
    """
    config = {
        name: getattr(settings, f"model_{name}")
        for name in ("max_len", "hidden_units", "num_blocks", "num_heads", "dropout_rate")
    }
    how = TrainConfig(
        epochs=settings.train_epochs, batch_size=settings.train_batch_size,
        learning_rate=settings.train_learning_rate, patience=settings.train_patience,
    )  # fmt: skip
    assert settings.archive_dir is not None and settings.registry_dir is not None
    registry = Registry(settings.registry_dir)
    archive = EventArchive(settings.archive_dir, settings.kafka_topic_epoch)
    events = _window(archive.read(), settings.train_days)
    past, new = _split(events, settings.holdout_share)
    vocab = ItemVocab.from_items(past.item_ids)
    gap_ms = settings.session_gap_s * 1000
    rest, validation = Sequences.build(sessions(past, gap_ms), vocab).leave_last_out()
    log.info("training", extra={"events": len(past), "held_out": len(new), "items": len(vocab)})
    try:
        model, result = train(SASRecConfig(num_items=len(vocab), **config), rest, how, validation, progress=progress)
    except (TrainingError, ValueError) as error:
        raise RetrainError(str(error)) from None
    challenger = SavedModel(model, vocab, {}, "challenger")
    champion = _champion(registry)
    report = judge(challenger, champion, sessions(events, gap_ms), len(new), settings.filter_seen)
    reason = refusal(report, settings.gate_tolerance)
    metadata = {
        "validation": result.best.validation.as_dict() if result.best.validation else {},
        "report": report,
        "parent": champion.version if champion else None,
        "trained_from_ms": int(past.timestamps_ms.min()),
        "trained_until_ms": int(past.timestamps_ms.max()),
        "next_offsets": {str(partition): offset for partition, offset in archive.next_offsets().items()},
        "train_config": asdict(how),
        "git_commit": _git_commit(),
        "refused": reason,
    }
    version = registry.publish(model, vocab, metadata)
    if reason is None:
        registry.promote(version, f"NDCG@{K} {report['challenger']['ndcg@10']:.4f} on the newest clicks")
    registry.prune(settings.keep_versions)
    log.info("promoted" if reason is None else "not promoted", extra={"model": version, "reason": reason or "better"})
    return Verdict(version, reason is None, reason or "it passed the gate", report)


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
            engine = Engine(saved.model, saved.vocab, cache_bytes=0)
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


def _split(events: Interactions, held_out: float) -> tuple[Interactions, Interactions]:
    past, new = events.split_at(1 - held_out)
    if not len(past) or not len(new):
        raise RetrainError(f"{len(events)} events are too few to train on and to hold {held_out:.0%} out")
    return past, new


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


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
