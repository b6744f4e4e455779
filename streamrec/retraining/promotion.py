"""Publish the model of a round, and promote it unless there is an objection.

A person has the last word, and of two workers the later one. A model that passed the gate (gate.py) is not promoted if

* the champion is on hold: it was rolled back, and the hold was not lifted yet
* the champion was changed since the round claimed it, or another worker has claimed it since
* a person has rejected it, or a model that was trained on the same clicks

It remains in the registry with the reason. The champion is checked before the model is published, and once more by
compare-and-set in the moment of the promotion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sasrec import ItemVocab, ModelMetadata, SASRec, SavedModel
from streamrec.aliases import Champion, overtaken
from streamrec.errors import Overtaken, RegistryError, StreamrecError
from streamrec.registry import Registry
from streamrec.retraining.gate import K, Report

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a round: promoted, refused (by the gate), or overtaken (a person or another worker was faster)."""

    version: str
    mode: str  # full or incremental
    outcome: str
    reason: str
    report: Report

    @property
    def promoted(self) -> bool:
        """Whether the new model is the champion."""
        return self.outcome == "promoted"


@dataclass(frozen=True)
class Promotion:
    """Publishes and promotes the model of one round.

    ``claimed``: the champion that the round was judged against. ``may_promote``: whether the worker has the lock.
    """

    registry: Registry
    claimed: Champion | None
    may_promote: Callable[[], bool]

    def publish(self, model: SASRec, vocab: ItemVocab, metadata: ModelMetadata) -> Verdict:
        """Publish the model, and promote it unless the gate has refused it or there is an objection."""
        refused, outcome, report = metadata["refused"], "refused", metadata["report"]
        if refused is None:
            refused = metadata["refused"] = self._objection(metadata)
            outcome = "overtaken"
        version = self.registry.publish(model, vocab, metadata)
        if refused is None:
            try:
                self._promote(version, report)
                outcome = "promoted"
            except Overtaken as error:  # since the check, a moment ago
                refused = str(error)
        verdict = Verdict(version, metadata["mode"], outcome, refused or "it passed the gate", report)
        _log(verdict, metadata["train_s"])
        return verdict

    def _objection(self, metadata: ModelMetadata) -> str | None:
        """Return why a model that passed the gate must not be promoted."""
        now = self.registry.champion()
        if refused := overtaken(self.claimed, now):
            return refused
        clicks = {known.version: _clicks(known.metadata) for known in self.registry.versions()}
        for rejected in reversed(now.rejected if now else ()):
            if clicks.get(rejected) == _clicks(metadata):
                return f"it was trained on the clicks of {rejected}, which was rolled back: it waits for new clicks"
        return None

    def _promote(self, version: str, report: Report) -> None:
        if self.claimed is not None and version in self.claimed.rejected:
            raise Overtaken(f"{version} was rolled back; to promote it again: streamrec models promote {version}")
        if not self.may_promote():
            raise Overtaken("another worker has taken the lock over")
        self.registry.promote_challenger(version, f"NDCG@{K} {_ndcg(report):.4f} on the newest clicks", self.claimed)


def load_champion(registry: Registry, champion: Champion | None) -> SavedModel | None:
    """Return the model of the champion; None if there is none, or it is damaged."""
    if champion is None:
        return None
    try:
        return registry.load(champion.version)
    except RegistryError as error:  # a damaged champion must not prevent a better one
        log.warning("the champion cannot be loaded, so the new model is not compared with it: %s", error)
        return None


def prune(registry: Registry, keep: int) -> None:
    """Remove old versions; a failure changes nothing about the round."""
    try:
        registry.prune(keep)
    except (StreamrecError, OSError) as error:
        log.warning("old versions are not removed; the next round tries again: %s", error)


def _log(verdict: Verdict, train_s: float) -> None:
    champion = verdict.report.get("champion")
    log.info(
        "promoted" if verdict.promoted else "not promoted",
        extra={
            "model": verdict.version,
            "reason": "better" if verdict.promoted else verdict.reason,
            "ndcg@10": f"{_ndcg(verdict.report):.4f}",
            "champion_ndcg@10": f"{champion['ndcg@10']:.4f}" if champion else None,
            "train_s": train_s,
        },
    )


def _clicks(metadata: ModelMetadata) -> tuple[object, object]:
    """Return what tells the clicks of two models apart."""
    return metadata.get("next_offsets"), metadata.get("trained_until_ms")


def _ndcg(report: Report) -> float:
    return report["challenger"]["ndcg@10"]
