"""Training: provable patterns are learned, equal seeds give equal weights, no global state is changed."""

from __future__ import annotations

import importlib
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from sasrec.data.sequences import Holdout, Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.evaluation.metrics import Metrics, evaluate
from sasrec.inference.engine import Engine
from sasrec.model import SASRec, SASRecConfig
from sasrec.training.config import TrainConfig
from sasrec.training.objectives import Loss
from sasrec.training.train import TrainingError, train
from sasrec.training.warm_start import resize_model

NUM_ITEMS = 12
TINY = SASRecConfig(NUM_ITEMS, max_len=8, hidden_units=16, num_blocks=1, dropout_rate=0.0)


def sequences_of(rows: list[list[int]], num_items: int = NUM_ITEMS) -> Sequences:
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
    users = tuple(f"u{n}" for n in range(len(rows)))
    vocab = ItemVocab(f"i{n}" for n in range(num_items))
    return Sequences(vocab, users, offsets, np.array([item for row in rows for item in row], np.int64))


def circle() -> Sequences:
    """Item i + 1 always follows item i, and the first item the last."""
    return sequences_of([[(start + n) % NUM_ITEMS + 1 for n in range(9)] for start in range(NUM_ITEMS) for _ in "ab"])


def noise(users: int = 40) -> Sequences:
    """Random items: there is nothing to learn, so validation goes up and down."""
    rng = np.random.default_rng(5)
    return sequences_of([rng.integers(1, NUM_ITEMS + 1, 8).tolist() for _ in range(users)])


def weights(model: SASRec) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in model.state_dict().values()])


# --- it learns


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("loss", get_args(Loss))
def test_a_determined_next_item_is_predicted_for_every_user(loss: Loss, position: Any) -> None:
    rest, test = circle().leave_last_out()
    config = SASRecConfig(NUM_ITEMS, max_len=8, hidden_units=16, num_blocks=1, dropout_rate=0.1, position=position)
    train_config = TrainConfig(epochs=60, batch_size=8, learning_rate=1e-2, loss=loss, num_negatives=8)
    model, result = train(config, rest, train_config)
    assert evaluate(Engine(model, rest.vocab), test, (1,)).hr[1] == 1.0
    assert result.epochs[-1].loss < result.epochs[0].loss / 2


def test_a_next_item_that_depends_on_more_than_the_last_item_is_learned() -> None:
    # after 1, 3 comes 2, after 4, 3 comes 5: a Markov chain would be right half of the time
    rows = [[1, 3, 2] * 4, [4, 3, 5] * 4] * 40
    config = SASRecConfig(5, max_len=12, hidden_units=16, num_blocks=1, dropout_rate=0.0)
    model, _ = train(config, sequences_of(rows, 5), TrainConfig(epochs=60, batch_size=8, learning_rate=1e-2))
    engine = Engine(model, ItemVocab("12345"))
    best = engine.top_k(engine.encode([[1, 3], [4, 3], [1, 3, 2, 1, 3], [4, 3, 5, 4, 3]]), 1)
    assert [ranking.items for ranking in best] == [["2"], ["5"], ["2"], ["5"]]


def test_every_epoch_is_validated_and_the_result_holds_the_figures() -> None:
    rest, validation = circle().leave_last_out()
    model, result = train(TINY, rest, TrainConfig(epochs=12, learning_rate=1e-2, batch_size=8), validation)
    assert all(epoch.validation is not None and epoch.seconds > 0 for epoch in result.epochs)
    assert result.best.validation is not None
    assert result.best.validation.ndcg[10] == max(
        epoch.validation.ndcg[10] for epoch in result.epochs if epoch.validation is not None
    )
    assert not model.training


def test_repeating_sessions_are_validated_without_filtering_seen_items() -> None:
    # every held-out target was seen: with seen items filtered every model would have 0
    rest, validation = sequences_of([[a, b] * 4 for a in range(1, 7) for b in range(7, 13)]).leave_last_out()
    _, result = train(TINY, rest, TrainConfig(epochs=15, learning_rate=1e-2, batch_size=8), validation)
    assert result.best.validation is not None
    assert result.best.validation.ndcg[10] > 0.4


# --- it is reproducible


@pytest.mark.parametrize("loss", get_args(Loss))
def test_equal_seeds_give_equal_weights_and_another_seed_others(loss: Loss) -> None:
    config = SASRecConfig(NUM_ITEMS, max_len=8, hidden_units=16, dropout_rate=0.3)
    rest, validation = noise().leave_last_out()

    def run(seed: int) -> tuple[torch.Tensor, list[float]]:
        train_config = TrainConfig(epochs=2, batch_size=16, loss=loss, num_negatives=4, seed=seed)
        model, result = train(config, rest, train_config, validation)
        return weights(model), [epoch.loss for epoch in result.epochs]

    first, losses = run(1)
    torch.rand(3)  # earlier random numbers have no effect
    np.random.rand(3)
    again, losses_again = run(1)
    assert torch.equal(first, again)
    assert losses == losses_again
    assert not torch.equal(first, run(2)[0])


def test_training_does_not_change_global_random_state() -> None:
    torch.manual_seed(123)
    np.random.seed(123)
    before_torch, before_numpy = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    train(TINY, circle(), TrainConfig(epochs=1, loss="bce"))
    assert torch.equal(torch.random.get_rng_state(), before_torch)
    assert (np.random.get_state()[1] == before_numpy).all()
    with pytest.raises(TrainingError):
        train(TINY, circle(), TrainConfig(epochs=5, batch_size=4, learning_rate=1e30))
    assert torch.equal(torch.random.get_rng_state(), before_torch), "not even after a failure"


# --- it ends in time, with the best weights


def test_it_stops_early_and_returns_the_model_of_the_best_epoch() -> None:
    rest, validation = noise().leave_last_out()
    train_config = TrainConfig(epochs=60, batch_size=16, learning_rate=3e-3, patience=4)
    model, result = train(TINY, rest, train_config, validation)
    assert len(result.epochs) == result.best_epoch + 1 + train_config.patience < train_config.epochs
    scores = [epoch.validation.ndcg[10] for epoch in result.epochs if epoch.validation is not None]
    assert result.best_epoch == scores.index(max(scores)), "the first of equally good epochs"
    assert scores[-1] < max(scores), "the last weights are worse"
    repeats = sum(target in history for history, target in zip(validation.histories, validation.targets, strict=True))
    again = evaluate(Engine(model, rest.vocab), validation, (10,), filter_seen=repeats <= len(validation) / 2)
    assert again == result.best.validation


class ScriptedValidation:
    """Replaces evaluate: returns a given NDCG@10 for each epoch."""

    def __init__(self, *ndcg: float) -> None:
        self._ndcg = iter(ndcg)

    def __call__(self, *_: object, **__: object) -> Metrics:
        ndcg = next(self._ndcg)
        return Metrics(1, {10: ndcg}, {10: ndcg}, {10: ndcg})


@pytest.mark.parametrize(
    ("patience", "scores", "best_epoch"),
    [
        (0, [0.3, 0.1, 0.4, 0.1, 0.2, 0.1], 2),  # all epochs run, and the best is restored
        (2, [0.1, 0.2, 0.2, 0.2], 1),  # an equal score is not better
        (3, [0.0, 0.0, 0.0, 0.0], 0),
        (2, [0.1, 0.0, 0.2, 0.0, 0.3, 0.0], 4),
        (1, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 5),
    ],
)
def test_patience_counts_epochs_without_a_better_score_and_the_best_weights_are_restored(
    monkeypatch: pytest.MonkeyPatch, patience: int, scores: list[float], best_epoch: int
) -> None:
    rest, validation = noise().leave_last_out()
    expected, _ = train(TINY, rest, TrainConfig(epochs=best_epoch + 1, batch_size=16))
    module = importlib.import_module("sasrec.training.train")  # `sasrec.training.train` as a name is the function
    monkeypatch.setattr(module, "evaluate", ScriptedValidation(*scores))
    model, result = train(TINY, rest, TrainConfig(epochs=6, batch_size=16, patience=patience), validation)
    assert [epoch.validation.ndcg[10] for epoch in result.epochs if epoch.validation] == scores
    assert result.best_epoch == best_epoch
    assert torch.equal(weights(model), weights(expected))


@pytest.mark.parametrize(("decay", "share"), [(0.1, 0.1), (0.999, 0.25)])
def test_the_average_of_the_weights_moves_faster_in_the_first_batches(decay: float, share: float) -> None:
    whole = TrainConfig(epochs=2, batch_size=100, learning_rate=1e-2)  # a batch is an epoch
    (first, _), (second, _) = (train(TINY, noise(), replace(whole, epochs=epochs)) for epochs in (1, 2))
    average, _ = train(TINY, noise(), replace(whole, ema_decay=decay))
    assert torch.allclose(weights(average), share * weights(first) + (1 - share) * weights(second), atol=1e-7)


def test_the_average_is_validated() -> None:
    rest, validation = circle().leave_last_out()
    train_config = TrainConfig(epochs=5, batch_size=8, learning_rate=1e-2, patience=0)
    plain, _ = train(TINY, rest, train_config, validation)
    average, result = train(TINY, rest, replace(train_config, ema_decay=0.99), validation)
    assert not torch.equal(weights(average), weights(plain))
    assert evaluate(Engine(average, rest.vocab), validation, (10,)) == result.best.validation


def test_without_validation_all_epochs_run_and_the_last_weights_are_returned() -> None:
    _, result = train(TINY, noise(), TrainConfig(epochs=4, patience=1))
    assert (len(result.epochs), result.best_epoch) == (4, 3)
    no_targets = Holdout([], np.array([], np.int64))
    _, result = train(TINY, noise(), TrainConfig(epochs=4, patience=1), no_targets)
    assert (len(result.epochs), result.best_epoch) == (4, 3)


def test_stop_ends_training_after_the_batch() -> None:
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls >= 3

    rest, validation = noise().leave_last_out()
    model, result = train(TINY, rest, TrainConfig(epochs=50, batch_size=4), validation, stop=stop)
    assert calls <= 4, "once after each batch and once at the end of the epoch"
    assert len(result.epochs) == 1
    assert evaluate(Engine(model, rest.vocab), validation).ndcg[10] == pytest.approx(
        result.best.validation.ndcg[10] if result.best.validation else math.nan
    )


def test_every_epoch_is_one_log_line_and_nothing_is_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "sasrec.training.train"):
        rest, validation = circle().leave_last_out()
        train(TINY, rest, TrainConfig(epochs=3), validation)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["epoch 1", "epoch 2", "epoch 3"]
    assert "validation NDCG@10" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_a_progress_bar_is_drawn_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    train(TINY, circle(), TrainConfig(epochs=1), progress=True)
    assert "epoch 1" in "".join(capfd.readouterr())


def test_weight_decay_shrinks_the_weights() -> None:
    def size(weight_decay: float) -> float:
        model, _ = train(TINY, noise(), TrainConfig(epochs=10, learning_rate=1e-2, weight_decay=weight_decay))
        return float(model.item_embedding.weight.detach().norm())

    assert size(10.0) < 0.8 * size(0.0)


# --- training further


def first_then_second() -> tuple[Sequences, np.ndarray[Any, np.dtype[np.int64]]]:
    """Users with old events up the circle, and users with new events, the last five, down the circle."""
    up = [[(start + n) % NUM_ITEMS + 1 for n in range(9)] for start in range(NUM_ITEMS) for _ in "ab"]
    down = [[(start - n) % NUM_ITEMS + 1 for n in range(6)] for start in range(NUM_ITEMS) for _ in "ab"]
    return sequences_of(up + down), np.array([0] * len(up) + [6] * len(down))


@pytest.mark.parametrize(("replay", "remembers"), [(0.0, False), (1.0, True)])
def test_a_model_is_trained_further_on_new_events_and_a_sample_of_old_ones(replay: float, remembers: bool) -> None:
    old_test, new_test = Holdout([np.array([1, 2, 3])], np.array([4])), Holdout([np.array([4, 3, 2])], np.array([1]))
    train_config = TrainConfig(epochs=60, batch_size=8, learning_rate=1e-2, patience=0, replay=replay)
    before, _ = train(TINY, circle(), train_config)
    both, new_events = first_then_second()
    after, _ = train(TINY, both, train_config, initial=before, new_events=new_events)
    engine = Engine(after, both.vocab, cache_bytes=0)
    assert evaluate(engine, new_test, filter_seen=False).ndcg[10] == 1.0
    assert (evaluate(engine, old_test, filter_seen=False).ndcg[10] == 1.0) is remembers


def test_a_resized_model_scores_old_items_as_before_and_new_items_start_near_their_neighbours() -> None:
    torch.manual_seed(1)
    old = SASRec(SASRecConfig(5, max_len=4, hidden_units=8, dropout_rate=0.2)).eval()
    # items 6 to 8 are new: 6 has known neighbours, 7 has none, 8 does not occur
    sequences = sequences_of([[1, 6, 2, 3, 4], [7, 7], [6, 5]], num_items=8)
    larger = resize_model(old, SASRecConfig(8, max_len=4, hidden_units=8, dropout_rate=0.5), sequences).eval()
    row = torch.tensor([[1, 3, 5]])
    assert torch.allclose(old.logits(old(row)), larger.logits(larger(row))[..., :6], atol=1e-5)
    embedding = larger.item_embedding.weight.detach()
    near = [(1, 1.0), (2, 1.0), (3, 1 / 2), (4, 1 / 3), (5, 1.0)]
    mean = sum(weight * embedding[item] for item, weight in near) / sum(weight for _, weight in near)
    assert torch.allclose(embedding[6], torch.as_tensor(mean))
    assert embedding[7:].abs().sum(1).min() > 0
    assert embedding[0].abs().sum() == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [(SASRecConfig(5, hidden_units=32), "shape of the model cannot change"), (SASRecConfig(4), "5 items already")],
)
def test_resizing_changes_only_the_number_of_items(config: SASRecConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_model(SASRec(SASRecConfig(5)), config, circle())


def test_without_a_new_event_there_is_nothing_to_train_on() -> None:
    before, _ = train(TINY, circle(), TrainConfig(epochs=1))
    with pytest.raises(TrainingError, match="no user has a new event that follows an earlier one"):
        train(TINY, circle(), TrainConfig(epochs=1), initial=before, new_events=np.zeros(len(circle()), np.int64))


# --- errors


@pytest.mark.parametrize("rows", [[[1], [2], []], [[]]])
def test_data_where_no_user_has_two_events_are_a_training_error(rows: list[list[int]]) -> None:
    with pytest.raises(TrainingError, match="no user has two or more known events"):
        train(TINY, sequences_of(rows), TrainConfig())


@pytest.mark.parametrize("loss", ["bce", "sampled_softmax"])
def test_negatives_need_a_second_item(loss: Loss) -> None:
    config = SASRecConfig(1, max_len=4, hidden_units=8)
    with pytest.raises(TrainingError, match="only one item; use loss='cross_entropy'"):
        train(config, sequences_of([[1, 1, 1]], num_items=1), TrainConfig(loss=loss))
    model, _ = train(config, sequences_of([[1, 1, 1]], num_items=1), TrainConfig(epochs=1))
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("learning_rate", [1e30, math.inf])
@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("batch_size", [4, 1000])
def test_a_diverging_learning_rate_is_a_training_error_that_names_it(
    loss: Loss, learning_rate: float, batch_size: int
) -> None:
    train_config = TrainConfig(epochs=3, batch_size=batch_size, learning_rate=learning_rate, loss=loss)
    rest, validation = circle().leave_last_out()
    for judge in (validation, None):
        with pytest.raises(TrainingError, match=re.escape(f"learning_rate={learning_rate}")):
            train(TINY, rest, train_config, judge)


def test_weights_that_become_nan_in_the_last_step_are_not_returned() -> None:
    with pytest.raises(TrainingError, match="lower learning_rate=inf"):
        train(TINY, circle(), TrainConfig(epochs=1, batch_size=1000, learning_rate=math.inf))


@pytest.mark.parametrize("loss", ["bce", "cross_entropy", "sampled_softmax"])
def test_with_skip_seen_no_item_of_a_window_is_a_negative_of_another(loss: Loss) -> None:
    """Items 1 to 3 come in random order, 4 to 6 never: with skip_seen a target is ranked only against 4 to 6."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 4, 12).tolist() for _ in range(60)]
    config = SASRecConfig(6, max_len=12, hidden_units=16, num_blocks=1, dropout_rate=0.0)
    losses = {}
    for skip_seen in (False, True):
        train_config = TrainConfig(
            epochs=30, batch_size=8, learning_rate=1e-2, patience=0, loss=loss, skip_seen=skip_seen
        )
        rest, validation = sequences_of(rows, 6).leave_last_out()
        _, result = train(config, rest, train_config, validation)
        losses[skip_seen] = (result.epochs[-1].loss, result.epochs[-1].validation_loss)
    assert min(losses[False]) > 0.7  # type: ignore[type-var]
    assert max(losses[True]) < 0.2  # type: ignore[type-var]


def test_users_who_have_seen_everything_still_get_negatives() -> None:
    rows = [[1, 2, 3, 1, 2, 3]] * 20
    train_config = TrainConfig(epochs=20, batch_size=4, learning_rate=1e-2, loss="bce", skip_seen=True)
    model, _ = train(SASRecConfig(3, max_len=6, hidden_units=16, dropout_rate=0.0), sequences_of(rows, 3), train_config)
    assert Engine(model, ItemVocab("123")).scores([np.array([1, 2])])[0].argmax() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"replay": -0.5}, "replay=-0.5: must be at least 0 and finite"),
        ({"patience": -1}, "patience=-1: must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: must be at least 0 and below 1"),
        (
            {"loss": "hinge"},
            "loss='hinge': must be one of bce, mse, full_mse, gbce, info_nce, cross_entropy, sampled_softmax",
        ),
        ({"loss": "bce", "num_negatives": -1}, "num_negatives=-1: bce needs at least 0"),
        ({"windows": "old"}, "windows='old': must be one of all, newest"),
        ({"schedule": "linear"}, "schedule='linear': must be one of constant, cosine"),
        ({"warmup_steps": -1}, "warmup_steps=-1: must be at least 0"),
        ({"loss": "gbce", "num_negatives": 0}, "num_negatives=0: gbce needs at least 1"),
        ({"loss": "info_nce", "num_negatives": 0}, "num_negatives=0: info_nce needs at least 1"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**change)


# --- outcomes, warm starts, figures of the epochs


def with_outcomes(sequences: Sequences, outcomes: list[float]) -> Sequences:
    return replace(sequences, outcomes=np.array(outcomes, np.float32))


def rated() -> Sequences:
    """Items 2 and 3 follow item 1 equally often; 2 is liked and 3 is not."""
    rows = [[1, 2], [1, 3]] * 60
    return with_outcomes(sequences_of(rows, 3), [1.0, 1.0, 1.0, 0.0] * 60)


@pytest.mark.parametrize("loss", ["bce", "mse", "info_nce", "cross_entropy", "sampled_softmax"])
def test_liked_items_are_recommended_before_disliked_ones(loss: Loss) -> None:
    config = SASRecConfig(3, max_len=4, hidden_units=16, num_blocks=1, dropout_rate=0.0)
    model, _ = train(config, rated(), TrainConfig(epochs=40, batch_size=16, learning_rate=1e-2, loss=loss))
    scores = Engine(model, ItemVocab("123")).scores([np.array([1])])[0]
    assert scores[2] > scores[3] + 0.5


@pytest.mark.parametrize("weight", [1, 3, 30])
def test_the_weight_of_all_other_items_determines_how_far_scores_are_below_outcomes(weight: int) -> None:
    config = SASRecConfig(3, max_len=4, hidden_units=16, num_blocks=1, dropout_rate=0.0)
    train_config = TrainConfig(
        epochs=80, batch_size=16, learning_rate=1e-2, schedule="cosine", loss="full_mse", num_negatives=weight
    )
    model, _ = train(config, rated(), train_config)
    scores = Engine(model, ItemVocab("123")).scores([np.array([1])])[0]
    # half of the time (s - 1)^2, half of the time a third of the weight times s^2
    assert scores[2:].tolist() == pytest.approx([1 / (1 + weight / 3), 0], abs=0.05)


def test_without_negatives_soft_labels_become_the_probabilities_and_ratings_the_scores() -> None:
    rows = with_outcomes(sequences_of([[1, 2], [1, 3]] * 60, 3), [0.0, 0.9, 0.0, 0.25] * 60)
    config = SASRecConfig(3, max_len=4, hidden_units=16, num_blocks=1, dropout_rate=0.0)
    for loss, prediction in (("bce", torch.sigmoid), ("mse", lambda score: score)):
        train_config = TrainConfig(epochs=80, batch_size=16, learning_rate=1e-2, loss=loss, num_negatives=0)  # type: ignore[arg-type]
        model, _ = train(config, rows, train_config)
        scores = Engine(model, ItemVocab("123")).scores([np.array([1])])[0]
        assert prediction(scores[2:]).tolist() == pytest.approx([0.9, 0.25], abs=0.05)


@pytest.mark.parametrize(
    ("outcomes", "change", "message"),
    [
        ([5.0] * 4, {"loss": "bce"}, "outcomes from 5 to 5: loss='bce' takes 0 to 1"),
        ([-1.0, 0, 1, 1], {"loss": "cross_entropy"}, "outcomes from -1 to 1"),
        ([math.nan] * 4, {"loss": "bce"}, "outcomes from nan"),
        ([1.0] * 4, {"loss": "bce", "num_negatives": 0}, "num_negatives=0: bce cannot tell items apart"),
        (None, {"loss": "mse", "num_negatives": 0}, "num_negatives=0: mse cannot tell items apart"),
        ([0.0, 1, 1, 1], {"loss": "gbce"}, "loss='gbce' takes no outcomes"),
    ],
)
def test_outcomes_that_a_loss_cannot_learn_from_are_refused(
    outcomes: list[float] | None, change: dict[str, Any], message: str
) -> None:
    rows = sequences_of([[1, 2], [1, 3]])
    with pytest.raises(TrainingError, match=re.escape(message)):
        train(TINY, rows if outcomes is None else with_outcomes(rows, outcomes), TrainConfig(**change))


def test_a_warm_start_begins_with_the_given_weights_and_does_not_change_them() -> None:
    rest, test = circle().leave_last_out()
    train_config = TrainConfig(epochs=40, batch_size=8, learning_rate=1e-2)
    learned, before = train(TINY, rest, train_config)
    before_training = weights(learned).clone()
    little = TrainConfig(epochs=1, batch_size=8, learning_rate=1e-5)
    continued, after = train(TINY, rest, little, initial=learned)
    assert torch.equal(weights(learned), before_training)
    assert after.epochs[0].loss < 1.5 * before.epochs[-1].loss < before.epochs[0].loss / 2
    assert evaluate(Engine(continued, rest.vocab), test, (1,)).hr[1] == 1.0


def test_without_restore_best_the_last_weights_are_returned() -> None:
    rest, validation = noise().leave_last_out()
    train_config = TrainConfig(epochs=12, batch_size=8, learning_rate=1e-2, patience=0)
    best, result = train(TINY, rest, train_config, validation)
    last, _ = train(TINY, rest, replace(train_config, restore_best=False), validation)
    plain, _ = train(TINY, rest, train_config)
    assert result.best_epoch < 11, "otherwise this test shows nothing"
    assert torch.equal(weights(last), weights(plain))
    assert not torch.equal(weights(best), weights(last))


def test_the_validation_loss_is_that_of_held_out_targets() -> None:
    rest, validation = circle().leave_last_out()
    _, result = train(TINY, rest, TrainConfig(epochs=30, learning_rate=1e-2, batch_size=8), validation)
    losses = [epoch.validation_loss for epoch in result.epochs]
    assert losses[0] == pytest.approx(math.log(NUM_ITEMS), rel=0.2)
    assert losses[-1] is not None and losses[-1] < losses[0] / 2
    _, alone = train(TINY, rest, TrainConfig(epochs=1))
    assert alone.epochs[0].validation_loss is None


@pytest.mark.parametrize("held_out", [True, False])
def test_the_epochs_are_drawn(tmp_path: Path, held_out: bool) -> None:
    rest, validation = circle().leave_last_out()
    _, result = train(TINY, rest, TrainConfig(epochs=3), validation if held_out else None)
    result.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_computing_in_bfloat16_learns_as_well() -> None:
    rest, test = circle().leave_last_out()
    model, _ = train(TINY, rest, TrainConfig(epochs=60, batch_size=8, learning_rate=1e-2, autocast=True))
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    assert evaluate(Engine(model, rest.vocab), test, (1,)).hr[1] == 1.0


def test_the_learning_rate_follows_warm_up_and_schedule() -> None:
    constant = TrainConfig(warmup_steps=4)
    assert [constant.learning_rate_factor(step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = TrainConfig(schedule="cosine")
    factors = [cosine.learning_rate_factor(step, 100) for step in range(101)]
    assert factors == sorted(factors, reverse=True)
    assert (factors[0], factors[50], factors[100]) == pytest.approx((1.0, 0.525, 0.05))


def test_the_schedule_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    rest, _ = circle().leave_last_out()
    train_config = TrainConfig(epochs=4, batch_size=8, learning_rate=0.5, schedule="cosine", warmup_steps=2)
    train(TINY, rest, train_config)
    assert rates == [0.5 * train_config.learning_rate_factor(step, len(rates)) for step in range(len(rates))]
    assert len(rates) == 12
