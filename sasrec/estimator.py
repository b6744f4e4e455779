"""Estimators with the verbs of scikit-learn: fit, partial_fit, recommend, similar_items, save, load.

What the model is shown is decided here and nowhere else: which events are training data, which are held-out
targets, and what a user without a known item is given. Frames are read by datasets.py, the arithmetic is in
train.py and engine.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from sasrec.checkpoint import ModelDirectoryError, load_model, read_metadata, save_model
from sasrec.data.datasets import InteractionRows, read_interactions, read_items
from sasrec.data.sequences import Holdout, Indices, Interactions, Sequences
from sasrec.data.vocab import PADDING, ItemVocab
from sasrec.inference.engine import Engine
from sasrec.inference.ranking import Ranking
from sasrec.model import SASRec, SASRecConfig
from sasrec.training.train import OF_NUMBERS, Loss, TrainConfig, TrainResult, Windows, grown, train

log = logging.getLogger(__name__)

ItemId = str | int
METADATA = "estimator"


class Recommendations(NamedTuple):
    """Best items first. Rows shorter than asked, where fewer items are allowed, end in None and -inf.

    ``user_ids`` (B,) are None where histories were given without users; ``item_ids`` and ``scores`` are (B, k).
    """

    user_ids: NDArray[np.object_] | None
    item_ids: NDArray[np.object_]
    scores: NDArray[np.float32]


def suggest_config(n_items: int) -> dict[str, int]:
    """Shape of a model for a catalogue of this size: ``SASRecClassifierEstimator(**suggest_config(n))``.

    Raises:
        ValueError: n_items is smaller than 1.
    """
    if n_items < 1:
        raise ValueError(f"n_items={n_items}: must be at least 1")
    if n_items < 10_000:
        return {"hidden_units": 50, "num_blocks": 2, "num_heads": 1}
    if n_items <= 100_000:
        return {"hidden_units": 100, "num_blocks": 2, "num_heads": 1}
    return {"hidden_units": 128, "num_blocks": 3, "num_heads": 2}


@dataclass(eq=False)
class _SASRecEstimator:
    """What both estimators share; every field of the constructor is a hyper-parameter.

    Args:
        num_negatives: a position, for "bce", "mse", "gbce" and "info_nce"; a batch, for "sampled_softmax"; for
            "full_mse" as many as all other items weigh.
        early_stopping_patience: epochs without a better NDCG@10 on held-out targets; None never stops early,
            and any number needs validation data.
        restore_best_weights: keep those of the best epoch on validation data, whether stopped early or not.
        random_state: same number, same data, same thread count: same weights. No global state is touched.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        verbose: 1 draws a progress bar.
        loss: see sasrec.training.losses.
        position: "learned" is the paper's; "rope" can be served one token a click.
        scale_embeddings: items enter times sqrt(hidden_units), as in the paper's code; pays where items are rare.
        item_dropout_rate: share of a history's items hidden in training; pays in long training.
        ema_decay: judge and keep an exponential moving average of the weights, decaying so a batch; 0: none.
        reminder: added to the scores of a history's newest max_len items; pays where people come back to items.
        windows: "newest" trains only the newest max_len events of a longer history, as the reference does.
        skip_seen: the other items of a history are no negatives of a target; pays where lists leave seen items out.
        autocast: compute in bfloat16 where that is safe; pays on a GPU.
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

    history: TrainResult | None = field(default=None, init=False, repr=False)
    unknown_items: int = field(default=0, init=False, repr=False)
    popular_users: int = field(default=0, init=False, repr=False)
    _engine: Engine | None = field(default=None, init=False, repr=False)
    _integer_items: bool = field(default=False, init=False, repr=False)

    # scikit-learn's way to describe and copy an estimator; sklearn.base.clone works on it
    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Hyper-parameters by name."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.init}

    def set_params(self, **params: Any) -> Self:
        """Change hyper-parameters; they count from the next fit.

        Raises:
            ValueError: a name is none of a hyper-parameter.
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

    def fit(self, interactions: Any, valid_interactions: Any = None, items: Any = None) -> Self:
        """Train from the beginning.

        Args:
            interactions: a dataset, path or frame with USER_ID, ITEM_ID, TIMESTAMP and, if wanted, OUTCOME. Histories
                longer than max_len are trained in windows, so that every event but a user's first is a target.
            valid_interactions: the same of later events: each is a held-out target after all that came before it
                of its user. Rows that stand in ``interactions`` too are taken as history, not as targets.
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
        """Train on with new events: known items keep what was learned, new ones get rows of their own.

        The first call is a fit. Users' earlier events are not remembered; give those that matter again.

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
        """The best items after each history, in the order given.

        Items that the model does not know are left out, and counted in ``unknown_items``; who has no known item
        gets the most clicked items of the training data, and is counted in ``popular_users``.

        Args:
            histories: item ids, oldest first.
            filter_seen: leave out the items of the history.
            allow: the only items that may be recommended.
            block: items that must not be.
            return_scores: give Recommendations instead of the item ids alone.

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
                "%d of %d events are on items that the model does not know and were left out; %d of %d users have none "
                "that it knows and were given popular items",
                self.unknown_items, sum(map(len, ids)), self.popular_users, len(ids),
            )  # fmt: skip
        full = [
            ranking or self._popular(top_k, blocked.union(history if filter_seen else ()), allowed)
            for ranking, history in zip(rankings, ids, strict=True)
        ]
        recommendations = Recommendations(None, *self._as_arrays(full, top_k))
        return recommendations if return_scores else recommendations.item_ids

    def similar_items(self, item_id: ItemId, top_k: int = 10) -> Recommendations:
        """The items whose embeddings point most nearly in the same direction; scores are cosines, rows are one.

        Raises:
            ValueError: top_k is smaller than 1, or the model does not know the item.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        engine = self._fitted()
        (index,) = engine.vocab.encode([str(item_id)])
        if index == PADDING:
            raise ValueError(f"item {item_id!r} is not among the {len(engine.vocab)} items that the model knows")
        directions = torch.nn.functional.normalize(engine.model.item_embedding.weight.detach(), dim=1)
        cosines = directions @ directions[index]  # (num_items + 1,)
        cosines[[PADDING, index]] = -torch.inf
        best, indices = cosines.topk(min(top_k, max(1, len(engine.vocab) - 1)))
        count = int(best.isfinite().sum())
        ranking = Ranking(engine.vocab.decode(indices[:count].tolist()), best[:count].tolist())
        return Recommendations(None, *self._as_arrays([ranking], top_k))

    def scores(self, histories: Sequence[Sequence[ItemId]]) -> NDArray[np.float32]:
        """Scores of every item after each history, (B, num_items), columns as in ``item_ids``.

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
        """Write a model directory (safetensors and JSON, never pickle); returns the version of the model.

        Raises:
            ModelDirectoryError: it cannot be written there.
        """
        engine = self._fitted()
        described = {"class": type(self).__name__, "params": self.get_params(), "integer_items": self._integer_items}
        return save_model(path, engine.model, engine.vocab, {METADATA: described})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what save wrote.

        Raises:
            ModelDirectoryError: the directory is missing or damaged, or another class wrote it.
        """
        saved = load_model(path)
        described = saved.metadata.get(METADATA, {})
        if described.get("class") != cls.__name__:
            written_by = described.get("class", "something else, not by an estimator")
            raise ModelDirectoryError(f"{path} was not written by {cls.__name__} but by {written_by}")
        estimator = cls(**described["params"])
        estimator._integer_items = described["integer_items"]
        estimator._take(saved.model, saved.vocab)
        return estimator

    def _read(self, interactions: Any) -> InteractionRows:
        rows = read_interactions(interactions)
        if rows.outcomes is not None and self.loss not in OF_NUMBERS:
            outside = np.flatnonzero((rows.outcomes < 0) | (rows.outcomes > 1))
            if len(outside):
                row = int(outside[0])
                raise ValueError(
                    f"column OUTCOME, row {row}: {rows.outcomes[row]:g} is not between 0 and 1, as loss='{self.loss}' "
                    "needs it; divide by the largest value, keep only the rows you count as positive, or use "
                    "SASRecRegressorEstimator"
                )
        return rows

    def _fit(self, rows: InteractionRows, valid: Any, vocab: ItemVocab, before: SASRec | None) -> Self:
        validation = None if valid is None else self._holdout(rows, self._read(valid), vocab)
        if self.early_stopping_patience is not None and validation is None:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs validation data: give "
                "valid_interactions, or set early_stopping_patience=None"
            )
        config = SASRecConfig(
            len(vocab), max_len=self.max_len, hidden_units=self.hidden_units, num_blocks=self.num_blocks,
            num_heads=self.num_heads, dropout_rate=self.dropout_rate, item_dropout_rate=self.item_dropout_rate,
            position=self.position, scale_embeddings=self.scale_embeddings, reminder=self.reminder,
        )  # fmt: skip
        how = TrainConfig(
            epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay, loss=self.loss, num_negatives=self.num_negatives, windows=self.windows,
            skip_seen=self.skip_seen, ema_decay=self.ema_decay,
            patience=self.early_stopping_patience or 0, restore_best=self.restore_best_weights, autocast=self.autocast,
            seed=int(np.random.default_rng().integers(2**31)) if self.random_state is None else self.random_state,
        )  # fmt: skip
        sequences = Sequences.build(rows.to_interactions(), vocab)
        initial = None if before is None else grown(before, config, sequences)
        left_out = len(rows.item_ids) - len(sequences.items)
        if left_out:
            log.warning("%d interactions are on items that the catalogue does not list; they are left out", left_out)
        model, self.history = train(
            config, sequences, how, validation, initial=initial, device=_device(self.device), progress=self.verbose > 0
        )
        self._take(model, vocab)
        return self

    def _holdout(self, rows: InteractionRows, valid: InteractionRows, vocab: ItemVocab) -> Holdout:
        """Every new event of the validation rows as a target, after all events of its user before it."""
        seen = set(_keys(rows))
        new = [key not in seen for key in _keys(valid)]
        positive = np.ones(len(new), bool) if valid.outcomes is None else valid.outcomes > 0
        both = Interactions(
            rows.user_ids + [user for user, is_new in zip(valid.user_ids, new, strict=True) if is_new],
            rows.item_ids + [item for item, is_new in zip(valid.item_ids, new, strict=True) if is_new],
            np.concatenate((_times(rows), _times(valid)[new])),
            np.concatenate((np.zeros(len(rows.item_ids), np.float32), positive[new].astype(np.float32))),
        )
        sequences = Sequences.build(both.in_order(), vocab)  # its outcomes mark the targets
        assert sequences.outcomes is not None
        holdout = sequences.each_after_the_first(sequences.outcomes > 0)
        if not len(holdout):
            raise ValueError(
                "valid_interactions holds no event that is new, on an item of the training data, and of a user with an "
                "earlier event: there is nothing to validate on"
            )
        return holdout

    def _take(self, model: SASRec, vocab: ItemVocab) -> None:
        # slack 1: the newest max_len events, as in the paper; windows move in jumps only where a cache is to gain by it
        self._engine = Engine(model.to(_device(self.device)), vocab, cache_bytes=0, slack=1, index="exact")

    def _fitted(self) -> Engine:
        if self._engine is None:
            raise ValueError(f"this {type(self).__name__} is not fitted; call fit first, or load a saved one")
        return self._engine

    def _popular(self, k: int, out: Collection[str], allowed: Collection[str] | None) -> Ranking:
        vocab = self._fitted().vocab
        order = np.argsort(-vocab.counts, kind="stable")
        best = [i for i in order if vocab.ids[i] not in out and (allowed is None or vocab.ids[i] in allowed)][:k]
        return Ranking([vocab.ids[i] for i in best], [float(vocab.counts[i]) for i in best])

    def _as_arrays(self, rankings: Sequence[Ranking], k: int) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """(B, k) each."""
        items = np.full((len(rankings), k), None, object)
        scores = np.full((len(rankings), k), -np.inf, np.float32)
        for row, ranking in enumerate(rankings):
            count = len(ranking.items)
            items[row, :count] = [int(item) for item in ranking.items] if self._integer_items else ranking.items
            scores[row, :count] = ranking.scores
        return items, scores


@dataclass(eq=False)
class SASRecClassifierEstimator(_SASRecEstimator):
    """SASRec for implicit feedback: binary cross-entropy, OUTCOME a label or soft label in [0, 1].

    Kang & McAuley, ICDM 2018; defaults are scikit-rec's.
    """


@dataclass(eq=False)
class SASRecRegressorEstimator(_SASRecEstimator):
    """SASRec for explicit ratings: mean squared error between score and OUTCOME, negatives count as 0."""

    loss: Loss = "mse"


def load_estimator(path: str | Path) -> SASRecClassifierEstimator | SASRecRegressorEstimator:
    """Read what save of either estimator wrote.

    Raises:
        ModelDirectoryError: the directory is missing or damaged, or not an estimator's.
    """
    written_by = read_metadata(path).get(METADATA, {}).get("class")
    kind = SASRecRegressorEstimator if written_by == "SASRecRegressorEstimator" else SASRecClassifierEstimator
    return kind.load(path)


def _as_text(histories: Sequence[Sequence[ItemId]]) -> list[list[str]]:
    for row, history in enumerate(histories):
        if isinstance(history, (str, bytes)) or not isinstance(history, Sequence | np.ndarray):
            raise ValueError(f"history {row} is {history!r}; give a list of item ids for each user, oldest first")
    return [list(map(str, history)) for history in histories]


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _keys(rows: InteractionRows) -> Iterator[tuple[str, str, int]]:
    return zip(rows.user_ids, rows.item_ids, _times(rows).tolist(), strict=True)


def _times(rows: InteractionRows) -> Indices:
    assert rows.timestamps is not None  # read_interactions has refused the lack of them
    return rows.timestamps
