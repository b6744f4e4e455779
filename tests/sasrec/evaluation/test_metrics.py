"""Ranking metrics: computed by hand, and compared with sorting the whole catalogue in Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec.data.sequences import Holdout
from sasrec.data.vocab import ItemVocab
from sasrec.evaluation.metrics import evaluate, metrics_from_ranks, target_ranks
from sasrec.inference.engine import Engine
from sasrec.model import SASRec, SASRecConfig

NUM_ITEMS = 15


def make_engine(max_len: int = 6, position: Any = "rope", num_items: int = NUM_ITEMS) -> Engine:
    model = SASRec(SASRecConfig(num_items, max_len, hidden_units=8, position=position)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.5, generator=generator)
    return Engine(model, ItemVocab(map(str, range(num_items))), cache_bytes=0)


def holdout_of(*cases: tuple[list[int], int]) -> Holdout:
    return Holdout(
        [np.array(history, np.int64) for history, _ in cases], np.array([target for _, target in cases], np.int64)
    )


# --- metrics of ranks


def test_metrics_of_hand_made_ranks() -> None:
    metrics = metrics_from_ranks(np.array([0.0, 2.0, 9.0, math.inf]), (1, 3, 10))
    assert metrics.cases == 4
    assert metrics.hr == {1: 0.25, 3: 0.5, 10: 0.75}
    assert metrics.mrr == pytest.approx({1: 0.25, 3: (1 + 1 / 3) / 4, 10: (1 + 1 / 3 + 1 / 10) / 4})
    assert metrics.ndcg == pytest.approx({1: 0.25, 3: (1 + 1 / 2) / 4, 10: (1 + 1 / 2 + 1 / math.log2(11)) / 4})
    assert metrics.as_dict() == {
        "cases": 4,
        "hr@1": 0.25,
        "hr@3": 0.5,
        "hr@10": 0.75,
        "ndcg@1": metrics.ndcg[1],
        "ndcg@3": metrics.ndcg[3],
        "ndcg@10": metrics.ndcg[10],
        "mrr@1": metrics.mrr[1],
        "mrr@3": metrics.mrr[3],
        "mrr@10": metrics.mrr[10],
    }


@given(st.lists(st.integers(0, 30) | st.just(math.inf), min_size=1), st.integers(1, 30))
def test_metrics_equal_their_definitions(ranks: list[float], k: int) -> None:
    metrics = metrics_from_ranks(np.array(ranks, np.float64), [k])
    hits = [rank for rank in ranks if rank < k]
    assert metrics.hr[k] == pytest.approx(len(hits) / len(ranks))
    assert metrics.mrr[k] == pytest.approx(sum(1 / (rank + 1) for rank in hits) / len(ranks))
    assert metrics.ndcg[k] == pytest.approx(sum(1 / math.log2(rank + 2) for rank in hits) / len(ranks))


def test_no_case_and_a_cut_off_below_1_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no case to evaluate"):
        metrics_from_ranks(np.array([]), (10,))
    with pytest.raises(ValueError, match="k=0: must be at least 1"):
        metrics_from_ranks(np.array([1.0]), (10, 0))


# --- ranks of targets


@settings(deadline=None, max_examples=60)
@given(
    cases=st.lists(
        st.tuples(st.lists(st.integers(0, NUM_ITEMS), max_size=12), st.integers(0, NUM_ITEMS)), min_size=1, max_size=6
    ),
    filter_seen=st.booleans(),
    position=st.sampled_from(["rope", "learned"]),
)
def test_ranks_equal_sorting_the_catalogue_case_by_case(
    cases: list[tuple[list[int], int]], filter_seen: bool, position: str
) -> None:
    engine = make_engine(position=position)
    ranks = target_ranks(engine, holdout_of(*cases), filter_seen)
    for rank, (history, target) in zip(ranks, cases, strict=True):
        allowed = set(range(1, NUM_ITEMS + 1)) - (set(history) if filter_seen else set())
        window = engine.window(history).tolist()
        if not window or target not in allowed:
            assert rank == math.inf
            continue
        with torch.no_grad():
            hidden = engine.model(torch.tensor([window]))[0, -1]
        scores = (engine.model.item_embedding.weight @ hidden).tolist()
        best_first = sorted(allowed, key=lambda item: -scores[item])
        assert rank == best_first.index(target)


def test_ranks_are_positions_in_the_served_list() -> None:
    engine = make_engine()
    cases = [([n % NUM_ITEMS + 1, n * n % NUM_ITEMS + 1], (n * 7 + 3) % NUM_ITEMS + 1) for n in range(30)]
    ranks = target_ranks(engine, holdout_of(*cases))
    sequences = [engine.vocab.decode(history) for history, _ in cases]
    for rank, ranking, (_, target) in zip(ranks, engine.recommend(sequences, NUM_ITEMS), cases, strict=True):
        assert ranking is not None
        (item,) = engine.vocab.decode([target])
        assert rank == (ranking.items.index(item) if item in ranking.items else math.inf)


def test_more_cases_than_fit_into_one_forward_pass() -> None:
    engine = make_engine()
    cases = [([n % NUM_ITEMS + 1] * (n % 9 + 1), (n * 7 + 3) % NUM_ITEMS + 1) for n in range(600)]
    together = target_ranks(engine, holdout_of(*cases))
    apart = np.concatenate([target_ranks(engine, holdout_of(case)) for case in cases])
    assert together.tolist() == apart.tolist()
    assert len(set(together.tolist())) > 5


def test_a_model_of_constant_scores_earns_nothing_because_ties_count_against_it() -> None:
    engine = make_engine(num_items=100)
    with torch.no_grad():
        engine.model.item_embedding.weight.zero_()
    holdout = holdout_of(*[([n + 1, n + 2], n + 3) for n in range(90)])
    for filter_seen, candidates in ((True, 98), (False, 100)):
        assert (target_ranks(engine, holdout, filter_seen) == candidates - 1).all()
        metrics = evaluate(engine, holdout, (1, 10, 50), filter_seen)
        assert set(metrics.hr.values()) | set(metrics.ndcg.values()) | set(metrics.mrr.values()) == {0.0}


def test_a_tied_item_takes_the_better_rank() -> None:
    engine = make_engine()
    case = holdout_of(([1, 2], 5))
    (before,) = target_ranks(engine, case)
    with torch.no_grad():
        worst = engine.top_k(engine.encode([[1, 2]]), NUM_ITEMS)[0].items[-1]
        engine.model.item_embedding.weight[int(worst) + 1] = engine.model.item_embedding.weight[5]
    (after,) = target_ranks(engine, case)
    assert after == before + 1


def test_unknown_targets_filtered_targets_and_empty_histories_count_as_misses() -> None:
    engine = make_engine()
    certain = int(engine.recommend([["0", "1"]], 1)[0].items[0]) + 1
    holdout = holdout_of(([1, 2], certain), ([1, 2], 0), ([1, 2], 2), ([0, 0], certain), ([], certain))
    assert target_ranks(engine, holdout).tolist() == [0.0, math.inf, math.inf, math.inf, math.inf]
    assert evaluate(engine, holdout, (NUM_ITEMS,)).hr == {NUM_ITEMS: pytest.approx(1 / 5)}
    assert evaluate(engine, holdout, (NUM_ITEMS,), filter_seen=False).hr == {NUM_ITEMS: pytest.approx(2 / 5)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinite_scores_are_refused(value: float) -> None:
    engine = make_engine()
    with torch.no_grad():
        engine.model.item_embedding.weight[5] = value
    with pytest.raises(ValueError, match="scores items NaN or infinite"):
        target_ranks(engine, holdout_of(([1, 2], 5)))


def test_evaluation_needs_no_gradient_and_changes_no_weight() -> None:
    engine = make_engine()
    before = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
    evaluate(engine, holdout_of(([1, 2], 5)))
    assert all(torch.equal(weight, before[name]) for name, weight in engine.model.state_dict().items())
    assert all(weight.grad is None for weight in engine.model.parameters())
