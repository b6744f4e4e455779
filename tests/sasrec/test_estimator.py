"""The estimators and the recommender: provably right answers, equal for every way to call them."""

from __future__ import annotations

import logging
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.base
import torch

from sasrec import (
    Engine,
    InteractionsDataset,
    ItemsDataset,
    ModelDirectoryError,
    SASRecClassifierEstimator,
    SASRecRegressorEstimator,
    SequentialRecommender,
    SequentialScorer,
    load_estimator,
    load_model,
    suggest_config,
)

ITEMS = 12
QUICK: dict[str, Any] = {
    "hidden_units": 16,
    "num_blocks": 1,
    "max_len": 8,
    "epochs": 40,
    "batch_size": 8,
    "learning_rate": 0.01,
    "dropout_rate": 0.0,
    "early_stopping_patience": None,
    "device": "cpu",
    "loss": "cross_entropy",
}
Frame = pd.DataFrame


def frame(rows: list[tuple[Any, Any]], outcomes: list[float] | None = None, start: int = 0) -> Frame:
    """Make a frame of clicks, a second apart, in this order."""
    columns = {
        "USER_ID": [user for user, _ in rows],
        "ITEM_ID": [item for _, item in rows],
        "TIMESTAMP": range(start, start + len(rows)),
    }
    return Frame(columns | ({} if outcomes is None else {"OUTCOME": outcomes}))


def circle(name: Callable[[int], Any] = lambda n: f"i{n}", steps: int = 9) -> Frame:
    """Item n + 1 always follows item n, and the first item the last."""
    return frame([(f"u{start}", name((start + step) % ITEMS)) for step in range(steps) for start in range(ITEMS)])


def checkerboard() -> Frame:
    """Half of the users click only even items, the others only odd ones, in random order."""
    rng = random.Random(1)
    return frame([(f"u{user}", user % 2 + 2 * rng.randrange(ITEMS // 2)) for _ in range(12) for user in range(40)])


def fitted(data: Any = None, **changes: Any) -> SASRecClassifierEstimator:
    return SASRecClassifierEstimator(**(QUICK | changes)).fit(circle() if data is None else data)


@pytest.fixture(scope="module")
def on_circle() -> SASRecClassifierEstimator:
    return fitted()


# --- hyper-parameters


def test_the_defaults_are_scikit_recs() -> None:
    assert SASRecClassifierEstimator().get_params() == {
        "hidden_units": 50,
        "num_blocks": 2,
        "num_heads": 1,
        "dropout_rate": 0.2,
        "num_negatives": 1,
        "max_len": 50,
        "learning_rate": 0.001,
        "epochs": 200,
        "batch_size": 128,
        "weight_decay": 0.0,
        "early_stopping_patience": 5,
        "restore_best_weights": True,
        "random_state": 42,
        "device": None,
        "verbose": 0,
        "loss": "bce",
        "position": "learned",
        "scale_embeddings": False,
        "item_dropout_rate": 0.0,
        "reminder": 0.0,
        "windows": "all",
        "skip_seen": False,
        "ema_decay": 0.0,
        "autocast": False,
    }
    assert SASRecRegressorEstimator().get_params() == SASRecClassifierEstimator(loss="mse").get_params()


@pytest.mark.parametrize("kind", [SASRecClassifierEstimator, SASRecRegressorEstimator])
def test_scikit_learn_can_copy_and_change_it(kind: Any) -> None:
    original = kind(**QUICK)
    copy = sklearn.base.clone(original)
    assert type(copy) is kind
    assert copy.get_params() == original.get_params()
    copy.set_params(max_len=9, verbose=1)
    assert (copy.max_len, original.max_len) == (9, 8)
    with pytest.raises(ValueError, match=r"maxlen: no hyper-parameter of .*; it has hidden_units"):
        copy.set_params(maxlen=9)


def test_a_wrong_hyper_parameter_is_refused_by_fit() -> None:
    with pytest.raises(ValueError, match="hidden_units=0"):
        fitted(hidden_units=0)
    with pytest.raises(ValueError, match="loss='hinge'"):
        fitted(loss="hinge")


@pytest.mark.parametrize(
    ("n_items", "shape"),
    [(1, (50, 2, 1)), (9_999, (50, 2, 1)), (10_000, (100, 2, 1)), (100_000, (100, 2, 1)), (100_001, (128, 3, 2))],
)
def test_the_shape_follows_the_size_of_the_catalogue(n_items: int, shape: tuple[int, int, int]) -> None:
    suggested = suggest_config(n_items)
    assert tuple(suggested.values()) == shape
    assert SASRecClassifierEstimator(**suggested).hidden_units == shape[0]
    with pytest.raises(ValueError, match="n_items=0"):
        suggest_config(0)


# --- right answers


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("loss", ["bce", "gbce", "info_nce", "cross_entropy", "sampled_softmax"])
def test_an_item_that_always_follows_is_recommended_first(loss: Any, position: Any) -> None:
    estimator = fitted(loss=loss, position=position, num_negatives=8, epochs=60)
    histories = [[f"i{(start + step) % ITEMS}" for step in range(4)] for start in range(ITEMS)]
    recs = estimator.recommend(histories, 1)
    assert isinstance(recs, np.ndarray)
    assert recs[:, 0].tolist() == [f"i{(start + 4) % ITEMS}" for start in range(ITEMS)]


def test_on_a_checkerboard_all_users_get_their_own_colour() -> None:
    estimator = fitted(checkerboard(), epochs=30)
    recs = estimator.recommend([[0, 2, 4], [5, 3, 1]], 3)
    assert isinstance(recs, np.ndarray)
    assert [set(row) for row in recs] == [{6, 8, 10}, {7, 9, 11}]
    similar = estimator.similar_items(4, 5).item_ids[0]
    assert set(similar) == {0, 2, 6, 8, 10}


def test_ratings_order_items_that_follow_equally_often() -> None:
    rows = [(f"u{n}", item) for n in range(120) for item in ("seed", ("bad", "fair", "good")[n % 3])]
    rated = frame(rows, [x for n in range(120) for x in (3.0, (1.0, 3.0, 5.0)[n % 3])])
    estimator = SASRecRegressorEstimator(**(QUICK | {"loss": "mse", "num_negatives": 0})).fit(rated)
    recs = estimator.recommend([["seed"]], 3, return_scores=True)
    assert recs.item_ids[0].tolist() == ["good", "fair", "bad"]
    assert recs.scores[0].tolist() == pytest.approx([5.0, 3.0, 1.0], abs=0.4)


def test_events_before_the_newest_max_len_are_trained_on_too() -> None:
    early = [(user, item) for user in "abcdefgh" for item in ["x", "y"] * 3]
    late = [(user, f"{user}{n}") for user in "abcdefgh" for n in range(10)]
    estimator = fitted(frame(early + late), max_len=4)
    assert estimator.recommend([["x"]], 1).tolist() == [["y"]]  # type: ignore[union-attr]


# --- every way to call it


def test_a_batch_equals_its_histories_one_by_one(on_circle: SASRecClassifierEstimator) -> None:
    histories = [["i1", "i2"], ["i7"], [f"i{n}" for n in range(12)], ["who?", "i3"], ["who?"], []]
    together = on_circle.recommend(histories, 5, return_scores=True)
    for row, history in enumerate(histories):
        alone = on_circle.recommend([history], 5, return_scores=True)
        assert alone.item_ids[0].tolist() == together.item_ids[row].tolist()
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-4)


@pytest.mark.parametrize("kind", [SASRecClassifierEstimator, SASRecRegressorEstimator])
def test_a_loaded_estimator_equals_the_saved_one(kind: Any, tmp_path: Path) -> None:
    estimator = kind(**(QUICK | {"epochs": 3, "loss": "mse"})).fit(circle(lambda n: n))
    version = estimator.save(tmp_path / "model")
    assert len(version) == 12
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    for loaded in (kind.load(tmp_path / "model"), load_estimator(tmp_path / "model")):
        assert type(loaded) is kind
        assert loaded.get_params() == estimator.get_params()
        ours, theirs = (e.recommend([[1, 2], ["5"]], 4, return_scores=True) for e in (estimator, loaded))
        assert ours.item_ids.tolist() == theirs.item_ids.tolist()
        assert ours.scores.tolist() == theirs.scores.tolist()
        assert type(theirs.item_ids[0, 0]) is int
    other = {SASRecClassifierEstimator, SASRecRegressorEstimator} - {kind}
    with pytest.raises(ModelDirectoryError, match=f"was not written by .* but by {kind.__name__}"):
        other.pop().load(tmp_path / "model")


def test_equal_seeds_give_equal_models_and_no_global_random_state_changes() -> None:
    np.random.seed(5)
    torch.manual_seed(5)
    random.seed(5)
    before = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate())
    first, second, other = fitted(epochs=2), fitted(epochs=2), fitted(epochs=2, random_state=7)
    after = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate())
    assert before == after
    histories = [["i1", "i2"]]
    assert first.scores(histories).tolist() == second.scores(histories).tolist() != other.scores(histories).tolist()


def test_fit_starts_anew_and_partial_fit_continues() -> None:
    estimator = fitted(epochs=5)
    once = estimator.scores([["i1"]])
    assert estimator.fit(circle()).scores([["i1"]]).tolist() == once.tolist()
    loss_before = estimator.history.epochs[-1].loss  # type: ignore[union-attr]
    estimator.set_params(epochs=1).partial_fit(circle())
    assert estimator.history is not None
    assert estimator.history.epochs[0].loss < loss_before


def test_partial_fit_learns_new_items_and_does_not_forget_old_ones() -> None:
    estimator = fitted(epochs=60)
    new = frame([(f"n{n}", item) for n in range(30) for item in ("i3", "new one", "i7")])
    estimator.set_params(epochs=20).partial_fit(new)
    assert estimator.item_ids == [*(f"i{n}" for n in range(ITEMS)), "new one"]
    recs = estimator.recommend([["i3"], ["new one"], ["i9", "i10"]], 1)
    assert recs[:2, 0].tolist() == ["new one", "i7"]  # type: ignore[union-attr,call-overload,index]
    with pytest.raises(ValueError, match="the shape of the model cannot change"):
        estimator.set_params(hidden_units=8).partial_fit(new)


def test_item_ids_are_integers_only_while_all_data_have_integers() -> None:
    estimator = fitted(circle(lambda n: n), epochs=1)
    assert estimator.item_ids == list(range(ITEMS))
    estimator.partial_fit(frame([("a", "1"), ("a", "new"), ("a", "2")]))
    assert estimator.item_ids == [*map(str, range(ITEMS)), "new"]
    named = Frame({"ITEM_ID": [*map(str, range(ITEMS)), "new"]})
    assert estimator.fit(circle(lambda n: n), items=named).item_ids == list(named["ITEM_ID"])


def test_a_saved_estimator_is_a_model_directory_that_an_engine_serves(tmp_path: Path) -> None:
    estimator = fitted(epochs=5, position="rope")
    estimator.save(tmp_path / "model")
    saved = load_model(tmp_path / "model")
    served = Engine(saved.model, saved.vocab, slack=1).recommend([["i1", "i2"]], 4, users=["ann"])
    assert served[0] is not None
    assert [served[0].items] == estimator.recommend([["i1", "i2"]], 4).tolist()  # type: ignore[union-attr]


def test_the_first_partial_fit_is_a_fit() -> None:
    estimator = SASRecClassifierEstimator(**(QUICK | {"epochs": 2})).partial_fit(circle())
    assert estimator.scores([["i1"]]).tolist() == fitted(epochs=2).scores([["i1"]]).tolist()


# --- what may be recommended


def test_seen_allowed_and_blocked_items(on_circle: SASRecClassifierEstimator) -> None:
    def items(**options: Any) -> list[set[str]]:
        return [set(row) - {None} for row in on_circle.recommend([["i1", "i2"], ["i5"]], ITEMS, **options)]  # type: ignore[union-attr]

    everything = {f"i{n}" for n in range(ITEMS)}
    assert items(filter_seen=False) == [everything, everything]
    assert items() == [everything - {"i1", "i2"}, everything - {"i5"}]
    assert items(allow=["i1", "i3", "nothing"]) == [{"i3"}, {"i1", "i3"}]
    assert items(block=["i3", "nothing"]) == [everything - {"i1", "i2", "i3"}, everything - {"i5", "i3"}]
    assert items(allow=["i3", "i4"], block=["i3"]) == [{"i4"}, {"i4"}]
    assert items(allow=[]) == [set(), set()]


def test_rows_with_fewer_allowed_items_than_top_k_end_in_none(on_circle: SASRecClassifierEstimator) -> None:
    recs = on_circle.recommend([["i1"]], 4, allow=["i3", "i1"], return_scores=True)
    assert recs.item_ids[0].tolist() == ["i3", None, None, None]
    assert np.isneginf(recs.scores[0, 1:]).all()
    assert np.isfinite(recs.scores[0, 0])


@pytest.mark.parametrize("top_k", [0, -3])
def test_a_top_k_below_1_is_refused(on_circle: SASRecClassifierEstimator, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k}"):
        on_circle.recommend([["i1"]], top_k)
    with pytest.raises(ValueError, match=f"top_k={top_k}"):
        on_circle.similar_items("i1", top_k)


def test_unknown_items_are_left_out_and_users_without_known_items_get_popular_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    popular = frame([(f"v{n}", item) for n in range(20) for item in ("hit", "second")])
    estimator = fitted(pd.concat([circle(), popular, frame([("w", "hit"), ("w", "i1")])]), epochs=3)
    with caplog.at_level(logging.WARNING):
        recs = estimator.recommend([["i1", "new"], ["new", "newer"], ["i1"], []], 2)
    assert isinstance(recs, np.ndarray)
    assert recs[0].tolist() == recs[2].tolist()
    assert recs[1].tolist() == recs[3].tolist() == ["hit", "second"]
    assert (estimator.unknown_items, estimator.popular_users) == (3, 2)
    assert "3 of 5 events are on items that the model does not know" in caplog.text
    estimator.recommend([["i1"]], 2)
    assert (estimator.unknown_items, estimator.popular_users) == (0, 0)
    assert estimator.recommend([["new"]], 1, block=["hit"]).tolist() == [["second"]]  # type: ignore[union-attr]


def test_invalid_histories_are_refused(on_circle: SASRecClassifierEstimator) -> None:
    with pytest.raises(ValueError, match="history 0 is 'i1'; give a list of item ids for each user"):
        on_circle.recommend(["i1"])
    with pytest.raises(ValueError, match="item 'nothing' is not among the 12 items"):
        on_circle.similar_items("nothing")


def test_an_estimator_that_is_not_fitted_is_an_error() -> None:
    for call in (lambda e: e.recommend([["a"]]), lambda e: e.similar_items("a"), lambda e: e.save("x")):
        with pytest.raises(ValueError, match="this SASRecClassifierEstimator is not fitted; call fit first"):
            call(SASRecClassifierEstimator())


# --- validation


def test_early_stopping_needs_validation_data() -> None:
    with pytest.raises(ValueError, match="early_stopping_patience=5 needs validation data"):
        fitted(early_stopping_patience=5)


def later(steps: int = 1) -> Frame:
    """Make a frame of the next steps on the circle."""
    rows = [(f"u{start}", f"i{(start + 9 + step) % ITEMS}") for step in range(steps) for start in range(ITEMS)]
    return frame(rows, start=1_000)


def test_only_held_out_targets_are_validated_and_the_best_weights_returned() -> None:
    estimator = SASRecClassifierEstimator(**(QUICK | {"early_stopping_patience": 3, "epochs": 50}))
    estimator.fit(circle(), later())
    assert estimator.history is not None
    validations = [epoch.validation for epoch in estimator.history.epochs]
    assert all(metrics is not None and metrics.cases == ITEMS for metrics in validations)
    best = estimator.history.best
    assert best.validation is not None
    assert best.validation.ndcg[10] == max(metrics.ndcg[10] for metrics in validations if metrics is not None)
    assert best.validation_loss is not None
    assert len(estimator.history.epochs) < 50


def test_validation_rows_in_the_training_data_are_history_and_each_new_row_is_a_target() -> None:
    def cases(valid: Frame) -> int:
        estimator = SASRecClassifierEstimator(**(QUICK | {"epochs": 1})).fit(circle(), valid)
        assert estimator.history is not None
        metrics = estimator.history.epochs[0].validation
        assert metrics is not None
        return metrics.cases

    assert cases(pd.concat([circle(), later()])) == cases(later()) == ITEMS
    assert cases(later(2)) == 2 * ITEMS
    strangers = frame([("s1", "i1"), ("s1", "i2"), ("s1", "i3"), ("s2", "i1")], start=1_000)
    assert cases(pd.concat([later(), strangers])) == ITEMS + 2, "the first event of a stranger has no history"
    disliked = later().assign(OUTCOME=[0.0, 1.0] * (ITEMS // 2))
    assert cases(disliked) == ITEMS // 2


@pytest.mark.parametrize("valid", [circle(), frame([("u1", "unknown")], start=1_000), frame([("new", "i1")])])
def test_validation_data_without_a_target_are_refused(valid: Frame) -> None:
    with pytest.raises(ValueError, match="there is nothing to validate on"):
        SASRecClassifierEstimator(**QUICK).fit(circle(), valid)


# --- data


@pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
def test_ratings_with_a_loss_for_labels_are_refused_by_column_and_row(loss: Any) -> None:
    rated = frame([("a", "x"), ("a", "y"), ("b", "x")], [1.0, 5.0, 0.0])
    with pytest.raises(
        ValueError, match=r"column OUTCOME, row 1: 5 is not between 0 and 1, .*SASRecRegressorEstimator"
    ):
        fitted(rated, loss=loss)


def test_interactions_outside_the_catalogue_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    catalogue = Frame({"ITEM_ID": [f"i{n}" for n in range(ITEMS)] + ["never clicked"]})
    data = pd.concat([circle(), frame([("u1", "retired"), ("u2", "retired")], start=500)])
    with caplog.at_level(logging.WARNING):
        estimator = SASRecClassifierEstimator(**(QUICK | {"epochs": 1})).fit(data, items=catalogue)
    assert estimator.item_ids == list(catalogue["ITEM_ID"])
    assert "2 interactions are on items that the catalogue does not list" in caplog.text


# --- the recommender


def recommender(max_len: int = 8, **changes: Any) -> SequentialRecommender:
    return SequentialRecommender(SequentialScorer(SASRecClassifierEstimator(**(QUICK | changes))), max_len=max_len)


def test_the_documented_call_works(tmp_path: Path) -> None:
    circle().to_csv(tmp_path / "interactions.csv", index=False)
    later().to_parquet(tmp_path / "later.parquet")
    Frame({"ITEM_ID": [f"i{n}" for n in range(ITEMS)]}).to_csv(tmp_path / "items.csv", index=False)
    ours = recommender(early_stopping_patience=5, epochs=60)
    ours.train(
        items_ds=ItemsDataset(data_location=str(tmp_path / "items.csv")),
        interactions_ds=InteractionsDataset(data_location=str(tmp_path / "interactions.csv")),
        valid_interactions_ds=InteractionsDataset(data_location=tmp_path / "later.parquet"),
    )
    recs = ours.recommend(interactions=frame([("z", "i3"), ("a", "i7"), ("z", "i4")]), top_k=10)
    assert isinstance(recs, np.ndarray)
    assert recs.shape == (2, 10)
    assert recs[:, 0].tolist() == ["i5", "i8"]


@pytest.mark.parametrize("integers", [True, False])
def test_users_are_returned_in_the_order_of_their_first_row_with_the_type_of_their_ids(integers: bool) -> None:
    def name(n: int) -> Any:
        return n if integers else f"{n:02}"

    ours = recommender(epochs=60)
    ours.train(interactions_ds=circle(name))
    rows = Frame(
        {
            "USER_ID": [name(9), name(2), name(9), name(5)],
            "ITEM_ID": [name(4), name(7), name(3), name(0)],
            "TIMESTAMP": [50, 10, 40, 10],
        }  # user 9 clicked 3 before 4
    )
    recs = ours.recommend(interactions=rows, top_k=1, return_scores=True)
    assert recs.user_ids.tolist() == [name(9), name(2), name(5)]
    assert recs.item_ids[:, 0].tolist() == [name(5), name(8), name(1)]
    assert {type(value) for value in [*recs.user_ids, *recs.item_ids[:, 0]]} == {int if integers else str}
    scored = ours.score_items(rows)
    assert scored.user_ids.tolist() == recs.user_ids.tolist()
    best = scored.item_ids[scored.scores.argmax(1)]
    assert best.tolist() == recs.item_ids[:, 0].tolist()
    np.testing.assert_allclose(scored.scores.max(1), recs.scores[:, 0], atol=1e-5)


def test_simultaneous_events_are_ordered_like_their_rows() -> None:
    ours = recommender(epochs=60)
    ours.train(interactions_ds=circle())
    one_moment = frame([("a", "i3"), ("b", "i4"), ("a", "i4"), ("b", "i3")]).assign(TIMESTAMP=7)
    last_a, last_b = ours.score_items(one_moment).scores
    alone = ours.scorer.estimator.scores([["i3", "i4"], ["i4", "i3"]])
    np.testing.assert_allclose([last_a, last_b], alone, atol=1e-5)


def test_the_recommenders_max_len_counts_and_a_mismatch_is_a_warning() -> None:
    estimator = SASRecClassifierEstimator(**QUICK)
    with pytest.warns(UserWarning, match=r"SequentialRecommender\(max_len=4\) overrides max_len=8"):
        ours = SequentialRecommender(SequentialScorer(estimator), max_len=4)
    assert estimator.max_len == 4
    ours.train(interactions_ds=circle())
    long, newest = [f"i{n}" for n in range(10)], [f"i{n}" for n in range(6, 10)]
    scores = estimator.scores([long, newest])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SequentialRecommender(SequentialScorer(estimator), max_len=4)


def test_a_recommender_can_be_saved_loaded_and_trained_further(tmp_path: Path) -> None:
    ours = recommender(epochs=40)
    ours.train(interactions_ds=circle())
    ours.save(tmp_path / "model")
    loaded = SequentialRecommender.load(tmp_path / "model")
    assert loaded.max_len == 8
    rows = frame([("a", "i3"), ("b", "i7")])
    assert loaded.recommend(rows, 3).tolist() == ours.recommend(rows, 3).tolist()
    loaded.partial_fit(frame([(f"n{n}", item) for n in range(20) for item in ("i3", "new")]))
    assert loaded.recommend(rows, 1)[0].tolist() == ["new"]


def test_training_without_interactions_is_refused() -> None:
    with pytest.raises(ValueError, match="interactions_ds is missing"):
        recommender().train()
    with pytest.raises(ValueError, match="not fitted"):
        recommender().recommend(frame([("a", "i1")]))


def test_the_history_is_drawn(tmp_path: Path) -> None:
    estimator = SASRecClassifierEstimator(**(QUICK | {"epochs": 2})).fit(circle(), later())
    assert estimator.history is not None
    estimator.history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1_000


def test_a_progress_bar_is_drawn_with_verbose(capfd: pytest.CaptureFixture[str]) -> None:
    fitted(epochs=1)
    assert capfd.readouterr().out == ""
    fitted(epochs=2, verbose=1)
    assert re.search(r"epoch 2", capfd.readouterr().out)
