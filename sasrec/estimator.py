"""Estimators with the verbs of scikit-learn: fit, partial_fit, recommend, similar_items, save, load.

They alone decide which events the model trains on, which are held-out targets, and which items a user without a known
item gets. data/datasets.py reads frames; training/ and inference/ do the arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from sasrec.checkpoint import EstimatorMetadata, ModelDirectoryError, load_model, read_metadata, save_model
from sasrec.data.datasets import InteractionRows, read_interactions, read_items
from sasrec.data.sequences import Sequences
from sasrec.data.vocab import PADDING, ItemVocab
from sasrec.evaluation.holdout import new_events_holdout
from sasrec.inference.engine import Engine
from sasrec.inference.ranking import Ranking, popular_items, similar_items
from sasrec.model import SASRec
from sasrec.training.estimator_params import EstimatorParams
from sasrec.training.objectives import Loss, objective_of
from sasrec.training.result import TrainResult
from sasrec.training.train import train
from sasrec.training.warm_start import resize_model

log = logging.getLogger(__name__)

ItemId = str | int


class Recommendations(NamedTuple):
    """Items, best first. Where fewer than k items are allowed, a row ends in None and -inf.

    ``user_ids`` (B,) are None where histories were given without users; ``item_ids`` and ``scores`` are (B, k).
    """

    user_ids: NDArray[np.object_] | None
    item_ids: NDArray[np.object_]
    scores: NDArray[np.float32]


@dataclass(eq=False)
class _SASRecEstimator(EstimatorParams):
    """The common part of both estimators; every argument of the constructor is a hyper-parameter."""

    history: TrainResult | None = field(default=None, init=False, repr=False)
    unknown_items: int = field(default=0, init=False, repr=False)
    popular_users: int = field(default=0, init=False, repr=False)
    _engine: Engine | None = field(default=None, init=False, repr=False)
    _integer_items: bool = field(default=False, init=False, repr=False)

    def fit(self, interactions: Any, valid_interactions: Any = None, items: Any = None) -> Self:
        """Train from the beginning.

        Args:
            interactions: a dataset, path or frame with USER_ID, ITEM_ID, TIMESTAMP and optionally OUTCOME. Histories
                longer than max_len are trained in windows, so that every event except a user's first is a target.
            valid_interactions: later events, in one of these forms: each is a held-out target after all earlier events
                of its user. Rows that are also in ``interactions`` are history, not targets.
            items: a dataset, path or frame with ITEM_ID: the catalogue; all items in ``interactions`` by default.

        Raises:
            ValueError: data or hyper-parameters cannot be used; the message names column, row and remedy.
        """
        rows = self._read(interactions)
        if items is None:
            vocab = ItemVocab.from_items(rows.item_ids)
        else:
            catalogue = read_items(items)
            vocab = ItemVocab(catalogue.item_ids).extended(rows.item_ids, grow=False)
        self._integer_items = rows.integer_items and (items is None or catalogue.integer_items)
        return self._fit(rows, valid_interactions, vocab, None)

    def partial_fit(self, interactions: Any, valid_interactions: Any = None) -> Self:
        """Train further on new events: known items start from their embeddings, new items get their own.

        The first call is a fit. Users' earlier events are not stored: pass those that matter again.

        Raises:
            ValueError: as for fit, or a hyper-parameter was changed that the shape of the model depends on.
        """
        if self._engine is None:
            return self.fit(interactions, valid_interactions)
        rows = self._read(interactions)
        self._integer_items = self._integer_items and rows.integer_items
        vocab = self._engine.vocab.extended(rows.item_ids)
        return self._fit(rows, valid_interactions, vocab, self._engine.model)

    def recommend(
        self,
        histories: Sequence[Sequence[ItemId]],
        top_k: int = 10,
        *,
        filter_seen: bool = True,
        allow: Collection[ItemId] | None = None,
        block: Collection[ItemId] = (),
        return_scores: bool = False,
    ) -> NDArray[np.object_] | Recommendations:
        """Return the best items after each history.

        Unknown items are left out, and counted in ``unknown_items``. Users without a known item get the most clicked
        items of the training data, and are counted in ``popular_users``.

        Args:
            histories: item ids, oldest first.
            filter_seen: do not recommend items of the history.
            allow: the only items that may be recommended.
            block: items that must not be recommended.
            return_scores: return Recommendations instead of item ids only.

        Raises:
            ValueError: top_k is smaller than 1, or histories is not a list of lists.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        engine = self._fitted()
        ids = _as_text(histories)
        allowed, blocked = None if allow is None else set(map(str, allow)), set(map(str, block))
        tokens = [np.array(engine.vocab.encode(history), np.int64) for history in ids]
        rankings = engine.recommend(tokens, top_k, filter_seen=filter_seen, blocked=blocked, allowed=allowed)
        self.unknown_items = sum(len(history) - int(np.count_nonzero(history)) for history in tokens)
        self.popular_users = rankings.count(None)
        if self.unknown_items:
            log.warning(
                "%d of %d events are on items that the model does not know: they are left out; "
                "%d of %d users have no known item: they get popular items",
                self.unknown_items,
                sum(map(len, ids)),
                self.popular_users,
                len(ids),
            )
        full = [
            ranking or popular_items(engine.vocab, top_k, blocked.union(history if filter_seen else ()), allowed)
            for ranking, history in zip(rankings, ids, strict=True)
        ]
        recommendations = Recommendations(None, *self._as_arrays(full, top_k))
        return recommendations if return_scores else recommendations.item_ids

    def similar_items(self, item_id: ItemId, top_k: int = 10) -> Recommendations:
        """Return the items whose embeddings are nearest in direction, in one row; scores are cosines.

        Raises:
            ValueError: top_k is smaller than 1, or the model does not know the item.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        engine = self._fitted()
        (index,) = engine.vocab.encode([str(item_id)])
        if index == PADDING:
            raise ValueError(f"item {item_id!r} is not among the {len(engine.vocab)} items that the model knows")
        ranking = similar_items(engine.model.item_embedding.weight.detach(), engine.vocab, index, top_k)
        return Recommendations(None, *self._as_arrays([ranking], top_k))

    def scores(self, histories: Sequence[Sequence[ItemId]]) -> NDArray[np.float32]:
        """Return scores of every item after each history, (B, num_items), columns as in ``item_ids``.

        The row of a history without a known item is -inf.
        """
        engine = self._fitted()
        tokens = [np.array(engine.vocab.encode(history), np.int64) for history in _as_text(histories)]
        scores: NDArray[np.float32] = engine.scores(tokens)[:, 1:].float().cpu().numpy()
        return scores

    @property
    def item_ids(self) -> list[ItemId]:
        """The items that the model knows, in the order of its scores."""
        ids = self._fitted().vocab.ids
        return [int(item) for item in ids] if self._integer_items else list(ids)

    def save(self, path: str | Path) -> str:
        """Write a model directory (safetensors and JSON, never pickle); return the version of the model.

        Raises:
            ModelDirectoryError: it cannot be written.
        """
        engine = self._fitted()
        described: EstimatorMetadata = {
            "class": type(self).__name__,
            "params": self.get_params(),
            "integer_items": self._integer_items,
        }
        return save_model(path, engine.model, engine.vocab, {"estimator": described})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a saved estimator.

        Raises:
            ModelDirectoryError: the directory is missing or damaged, or another class wrote it.
        """
        saved = load_model(path)
        described = saved.metadata.get("estimator")
        written_by = described.get("class") if described else "something else, not by an estimator"
        if described is None or written_by != cls.__name__:
            raise ModelDirectoryError(f"{path} was not written by {cls.__name__} but by {written_by}")
        estimator = cls(**described["params"])
        estimator._integer_items = described["integer_items"]
        estimator._serve(saved.model, saved.vocab)
        return estimator

    def _read(self, interactions: Any) -> InteractionRows:
        rows = read_interactions(interactions)
        if rows.outcomes is not None and objective_of(self.loss).outcomes != "any number":
            outside = np.flatnonzero((rows.outcomes < 0) | (rows.outcomes > 1))
            if len(outside):
                row = int(outside[0])
                raise ValueError(
                    f"column OUTCOME, row {row}: {rows.outcomes[row]:g} is not between 0 and 1, as loss='{self.loss}' "
                    "needs; divide by the largest value, use only the rows that you count as positive, or use "
                    "SASRecRegressorEstimator"
                )
        return rows

    def _fit(self, rows: InteractionRows, valid: Any, vocab: ItemVocab, before: SASRec | None) -> Self:
        validation = None if valid is None else new_events_holdout(rows, self._read(valid), vocab)
        if self.early_stopping_patience is not None and validation is None:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs validation data: give "
                "valid_interactions, or set early_stopping_patience=None"
            )
        config, train_config = self.configs(len(vocab))
        sequences = Sequences.build(rows.to_interactions(), vocab)
        initial = None if before is None else resize_model(before, config, sequences)
        left_out = len(rows.item_ids) - len(sequences.items)
        if left_out:
            log.warning("%d interactions are on items that the catalogue does not list; they are left out", left_out)
        model, self.history = train(
            config,
            sequences,
            train_config,
            validation,
            initial=initial,
            device=_device(self.device),
            progress=self.verbose > 0,
        )
        self._serve(model, vocab)
        return self

    def _serve(self, model: SASRec, vocab: ItemVocab) -> None:
        # slack 1: always the newest max_len events, as in the paper; longer jumps save time only with a cache
        self._engine = Engine(model.to(_device(self.device)), vocab, cache_bytes=0, slack=1, index="exact")

    def _fitted(self) -> Engine:
        if self._engine is None:
            raise ValueError(f"this {type(self).__name__} is not fitted; call fit first, or load a saved one")
        return self._engine

    def _as_arrays(self, rankings: Sequence[Ranking], k: int) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """Return item ids and scores, (B, k) each."""
        items = np.full((len(rankings), k), None, object)
        scores = np.full((len(rankings), k), -np.inf, np.float32)
        for row, ranking in enumerate(rankings):
            count = len(ranking.items)
            items[row, :count] = [int(item) for item in ranking.items] if self._integer_items else ranking.items
            scores[row, :count] = ranking.scores
        return items, scores


@dataclass(eq=False)
class SASRecClassifierEstimator(_SASRecEstimator):
    """SASRec for implicit feedback: binary cross-entropy; OUTCOME is a label or soft label in [0, 1].

    Kang & McAuley, ICDM 2018. Defaults are scikit-rec's.
    """


@dataclass(eq=False)
class SASRecRegressorEstimator(_SASRecEstimator):
    """SASRec for explicit ratings: mean squared error between score and OUTCOME; negatives have outcome 0."""

    loss: Loss = "mse"


def load_estimator(path: str | Path) -> SASRecClassifierEstimator | SASRecRegressorEstimator:
    """Load a saved estimator of either class.

    Raises:
        ModelDirectoryError: the directory is missing or damaged, or no estimator wrote it.
    """
    described = read_metadata(path).get("estimator")
    regressor = described is not None and described.get("class") == SASRecRegressorEstimator.__name__
    return (SASRecRegressorEstimator if regressor else SASRecClassifierEstimator).load(path)


def _as_text(histories: Sequence[Sequence[ItemId]]) -> list[list[str]]:
    for row, history in enumerate(histories):
        if isinstance(history, (str, bytes)) or not isinstance(history, Sequence | np.ndarray):
            raise ValueError(f"history {row} is {history!r}; give a list of item ids for each user, oldest first")
    return [list(map(str, history)) for history in histories]


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
