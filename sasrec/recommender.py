"""The recommender of scikit-rec's documentation: data sets in, item ids out.

    estimator = SASRecClassifierEstimator(hidden_units=50, num_blocks=2)
    recommender = SequentialRecommender(SequentialScorer(estimator), max_len=50)
    recommender.train(items_ds=items, interactions_ds=interactions, valid_interactions_ds=later_interactions)
    recommender.recommend(interactions=frame, top_k=10)

It defines how interactions become histories: sorted by TIMESTAMP, ties in row order, cut to the newest max_len.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sasrec.data.datasets import InteractionRows, read_interactions
from sasrec.estimator import (
    ItemId,
    Recommendations,
    SASRecClassifierEstimator,
    SASRecRegressorEstimator,
    load_estimator,
)

Estimator = SASRecClassifierEstimator | SASRecRegressorEstimator


class Scores(NamedTuple):
    """``scores`` (U, num_items) for ``user_ids`` (U,) and ``item_ids`` (num_items,)."""

    user_ids: NDArray[np.object_]
    item_ids: NDArray[np.object_]
    scores: NDArray[np.float32]


class SequentialScorer:
    """Scores all items with its estimator."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator

    def score_items(self, interactions: Any) -> Scores:
        """Score all items for every user in ``interactions``, users in the order of their first row.

        Raises:
            ValueError: the data cannot be used, or the estimator is not fitted.
        """
        users, histories = _histories(read_interactions(interactions))
        items = np.array(self.estimator.item_ids, object)
        return Scores(users, items, self.estimator.scores(histories))


class SequentialRecommender:
    """Trains a scorer's estimator on interactions, and recommends items to users.

    Args:
        max_len: the number of a user's newest events that count; overrides the estimator's.
    """

    def __init__(self, scorer: SequentialScorer, max_len: int = 50) -> None:
        self.scorer = scorer
        self.max_len = max_len
        estimator = scorer.estimator
        if estimator.max_len != max_len:
            warnings.warn(
                f"SequentialRecommender(max_len={max_len}) overrides max_len={estimator.max_len} of "
                f"{type(estimator).__name__}; give both the same",
                stacklevel=2,
            )
            estimator.set_params(max_len=max_len)

    def train(
        self,
        users_ds: Any = None,
        items_ds: Any = None,
        interactions_ds: Any = None,
        valid_users_ds: Any = None,
        valid_interactions_ds: Any = None,
    ) -> Self:
        """Train from the beginning.

        Args:
            users_ds: ignored, as is ``valid_users_ds``: the model knows users only by their events.
            items_ds: the catalogue; all items of ``interactions_ds`` by default.
            interactions_ds: a dataset, path or frame with USER_ID, ITEM_ID, TIMESTAMP and optionally OUTCOME.
            valid_interactions_ds: later events, in one of these forms, held out to choose the best epoch.

        Raises:
            ValueError: data or hyper-parameters cannot be used; the message names column, row and remedy.
        """
        if interactions_ds is None:
            raise ValueError("interactions_ds is missing: there is nothing to train on")
        self.scorer.estimator.fit(interactions_ds, valid_interactions_ds, items_ds)
        return self

    def partial_fit(self, interactions_ds: Any, valid_interactions_ds: Any = None) -> Self:
        """Train further on new events; see the estimator's partial_fit."""
        self.scorer.estimator.partial_fit(interactions_ds, valid_interactions_ds)
        return self

    def score_items(self, interactions: Any) -> Scores:
        """Score all items for every user in ``interactions``."""
        return self.scorer.score_items(interactions)

    def recommend(
        self,
        interactions: Any,
        top_k: int = 10,
        *,
        filter_seen: bool = True,
        allow: Collection[ItemId] | None = None,
        block: Collection[ItemId] = (),
        return_scores: bool = False,
    ) -> NDArray[np.object_] | Recommendations:
        """Return the best items for every user in ``interactions``, users in the order of their first row.

        Returns:
            Item ids (U, top_k), or with ``return_scores`` user ids, item ids and scores. Ids have their type in the
            data.

        Raises:
            ValueError: the data cannot be used, top_k is smaller than 1, or the estimator is not fitted.
        """
        users, histories = _histories(read_interactions(interactions))
        found = self.scorer.estimator.recommend(
            histories, top_k, filter_seen=filter_seen, allow=allow, block=block, return_scores=True
        )
        assert isinstance(found, Recommendations)
        return found._replace(user_ids=users) if return_scores else found.item_ids

    def save(self, path: str | Path) -> str:
        """Write a model directory (never pickle); return the version of the model."""
        return self.scorer.estimator.save(path)

    @classmethod
    def load(cls, path: str | Path) -> SequentialRecommender:
        """Load a saved recommender or estimator.

        Raises:
            ModelDirectoryError: the directory is missing or damaged, or no estimator wrote it.
        """
        estimator = load_estimator(path)
        return cls(SequentialScorer(estimator), estimator.max_len)


def _histories(rows: InteractionRows) -> tuple[NDArray[np.object_], list[list[str]]]:
    """Return users in the order of their first row, and the item ids of each, oldest first."""
    histories: dict[str, list[str]] = {user: [] for user in dict.fromkeys(rows.user_ids)}
    ordered = rows.to_interactions()
    for user, item in zip(ordered.user_ids, ordered.item_ids, strict=True):
        histories[user].append(item)
    users = np.array([int(user) if rows.integer_users else user for user in histories], object)
    return users, list(histories.values())
