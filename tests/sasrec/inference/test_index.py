"""Approximate lists: their items are nearly the best; filters and scores are exact."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sasrec.inference.index
from sasrec.checkpoint import SavedModel
from sasrec.data.vocab import ItemVocab
from sasrec.inference.blocked import BlockedItems
from sasrec.inference.engine import Engine
from sasrec.inference.index import AUTO_ITEMS, ItemIndex, open_index
from sasrec.inference.ranking import Ranking
from sasrec.model import SASRec, SASRecConfig
from streamrec.bench.catalogue import measure_catalogue, synthetic_catalogue
from streamrec.errors import SettingsError
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.schemas import StoredItems, UserSequence
from streamrec.serving.lists import SharedLists
from streamrec.serving.model import ServedModel
from streamrec.serving.predictor import Predictor
from streamrec.settings import Settings

NUM_ITEMS = 2_000
HIDDEN = 16


def make_engine(
    index: Any = "approximate", embedding: torch.Tensor | None = None, reminder: float = 0.0, **options: Any
) -> Engine:
    """Make an engine; all engines have one model."""
    if embedding is None:
        embedding, _ = synthetic_catalogue(NUM_ITEMS, HIDDEN, 1)
    items, width = embedding.shape[0] - 1, embedding.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = SASRec(SASRecConfig(items, max_len=20, hidden_units=width, reminder=reminder))
    model.item_embedding.weight.data = embedding
    return Engine(model, ItemVocab(map(str, range(1, items + 1))), index=index, **options)


APPROXIMATE, EXACT = make_engine(), make_engine("exact")
REMINDING = make_engine(reminder=2.0)
STATES = synthetic_catalogue(NUM_ITEMS, HIDDEN, 64)[1]
SOME_ITEMS = st.sets(st.integers(1, NUM_ITEMS), max_size=30)


def assert_scores_are_the_models(engine: Engine, hidden: torch.Tensor, rankings: list[Ranking]) -> None:
    scores = engine.model.logits(hidden).detach()
    for row, ranking in enumerate(rankings):
        indices = [int(item) for item in ranking.items]
        assert len(set(indices)) == len(indices)
        assert ranking.scores == pytest.approx(scores[row, indices].tolist(), rel=1e-5, abs=1e-5)
        assert ranking.scores == sorted(ranking.scores, reverse=True)


# --- properties of every list


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 63), min_size=1, max_size=5),
    k=st.integers(1, 60),
    exclude=st.none() | st.lists(SOME_ITEMS, min_size=5, max_size=5),
    blocked=SOME_ITEMS,
    best_blocked=st.integers(0, 500),
)
def test_lists_are_full_contain_no_filtered_item_and_have_the_models_scores(
    rows: list[int], k: int, exclude: list[set[int]] | None, blocked: set[int], best_blocked: int
) -> None:
    hidden = STATES[rows]
    # the first user's best items, so that filters remove candidates
    liked = [int(item) for item in EXACT.top_k(hidden[:1], best_blocked)[0].items] if best_blocked else []
    exclude = None if exclude is None else exclude[: len(rows)]
    forbidden = blocked | set(liked)
    rankings = APPROXIMATE.top_k(hidden, k, exclude, forbidden)
    assert_scores_are_the_models(APPROXIMATE, hidden, rankings)
    for row, ranking in enumerate(rankings):
        assert len(ranking.items) == k
        assert not {int(item) for item in ranking.items} & (forbidden | (exclude[row] if exclude else set()))


@settings(deadline=None, max_examples=30)
@given(left=st.sets(st.integers(1, NUM_ITEMS), max_size=15), k=st.integers(1, 20))
def test_where_filters_leave_few_items_the_list_contains_all_of_them(left: set[int], k: int) -> None:
    forbidden = set(range(1, NUM_ITEMS + 1)) - left
    for exclude, blocked in (([forbidden, set()], ()), (None, forbidden)):
        (first, second) = APPROXIMATE.top_k(STATES[:2], k, exclude, blocked)
        assert first.items == EXACT.top_k(STATES[:1], k, None, forbidden)[0].items
        assert len(first.items) == min(k, len(left))
        assert len(second.items) == (k if exclude else min(k, len(left)))


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0, 1), seed=st.integers(0, 99), k=st.integers(1, 30))
def test_lists_are_full_whatever_share_of_the_items_is_blocked(share: float, seed: int, k: int) -> None:
    assert APPROXIMATE.index is not None
    mask = np.random.default_rng(seed).random(NUM_ITEMS + 1) < share
    blocked = BlockedItems(mask)
    ours, best = (e.top_k(STATES[:3], k, None, blocked) for e in (APPROXIMATE, EXACT))
    for own, exact in zip(ours, best, strict=True):
        assert len(own.items) == min(k, NUM_ITEMS - blocked.count)
        assert not any(mask[int(item)] for item in own.items)
        if NUM_ITEMS - blocked.count < APPROXIMATE.index.candidates(k):  # then all allowed items are ranked
            assert own.items == exact.items


@given(allowed=st.sets(st.integers(1, NUM_ITEMS), max_size=40), blocked=SOME_ITEMS, k=st.integers(1, 50))
def test_lists_of_allowed_items_are_exact(allowed: set[int], blocked: set[int], k: int) -> None:
    ours, best = (e.top_k(STATES[:3], k, None, blocked, allowed) for e in (APPROXIMATE, EXACT))
    assert ours == best
    assert all(len(ranking.items) == min(k, len(allowed - blocked)) for ranking in ours)


@pytest.mark.parametrize("k", [NUM_ITEMS - 1, NUM_ITEMS, NUM_ITEMS + 7])
def test_a_list_as_long_as_the_catalogue_contains_all_of_it(k: int) -> None:
    assert APPROXIMATE.top_k(STATES[:2], k) == EXACT.top_k(STATES[:2], k)


def test_a_batch_equals_its_rows_one_by_one() -> None:
    exclude = [{n, n + 1} for n in range(1, 65)]
    together = APPROXIMATE.top_k(STATES, 10, exclude)
    for row, ranking in enumerate(together):
        (alone,) = APPROXIMATE.top_k(STATES[row : row + 1], 10, exclude[row : row + 1])
        assert ranking.items == alone.items
        assert ranking.scores == pytest.approx(alone.scores, rel=1e-5)


def test_no_rows_give_no_rankings() -> None:
    assert APPROXIMATE.top_k(torch.empty(0, HIDDEN), 3, [], [2]) == []


# --- quality


@pytest.fixture(scope="module", params=[64, 128], ids=lambda width: f"{width} dimensions")
def larger(request: pytest.FixtureRequest) -> tuple[Engine, Engine, torch.Tensor]:
    """Make an approximate engine, an exact engine, and states of users."""
    embedding, states = synthetic_catalogue(20_000, request.param, 128)
    return make_engine("approximate", embedding), make_engine("exact", embedding), states


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("seen", [0, 50])
def test_of_a_hundred_best_items_99_are_found(larger: tuple[Engine, Engine, torch.Tensor], k: int, seen: int) -> None:
    approximate, exact, states = larger
    # the seen items are the best ones, so the index must name as many candidates more
    exclude = [[int(i) for i in row.items] for row in exact.top_k(states, seen)] if seen else None
    hits = [
        len(set(ours.items) & set(best.items)) / k
        for ours, best in zip(approximate.top_k(states, k, exclude), exact.top_k(states, k, exclude), strict=True)
    ]
    assert sum(hits) / len(hits) >= 0.99


def test_items_with_large_norms_and_few_neighbours_are_found() -> None:
    # a few large norms among many small ones: an index of clusters would miss them
    embedding, states = synthetic_catalogue(5_000, 32, 64)
    lonely = states[:40] + 10 * torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    embedding[1:41] = 4 * torch.nn.functional.normalize(lonely)
    ours, best = (make_engine(index, embedding).top_k(states, 10) for index in ("approximate", "exact"))
    assert any(int(item) <= 40 for ranking in best for item in ranking.items)
    assert [ranking.items for ranking in ours] == [ranking.items for ranking in best]


# --- NaN, infinity and equal items


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_changes_no_other_row(value: float) -> None:
    hidden = STATES[:4].clone()
    hidden[1, 3] = value
    rankings = APPROXIMATE.top_k(hidden, 5)
    assert [r.items for i, r in enumerate(rankings) if i != 1] == [
        r.items for i, r in enumerate(APPROXIMATE.top_k(STATES[:4], 5)) if i != 1
    ]
    assert rankings[1] == EXACT.top_k(hidden[1:2], 5)[0]
    assert APPROXIMATE.top_k(torch.full((2, HIDDEN), math.nan), 5) == [Ranking([], []), Ranking([], [])]


def test_items_that_are_all_equal_make_a_full_list() -> None:
    engine = make_engine(embedding=torch.zeros(NUM_ITEMS + 1, HIDDEN))
    (ranking,) = engine.top_k(STATES[:1], 10, [{1, 2}])
    assert len(set(ranking.items)) == 10
    assert not {"1", "2"} & set(ranking.items)


def test_an_index_can_be_built_with_an_item_that_is_not_finite() -> None:
    embedding, states = synthetic_catalogue(NUM_ITEMS, HIDDEN, 1)
    embedding[7] = math.nan
    found = ItemIndex(embedding).search(states, 10)
    assert found.min() >= 1


# --- the reminder


@settings(deadline=None, max_examples=40)
@given(
    windows=st.lists(st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=20), min_size=1, max_size=4),
    blocked=SOME_ITEMS,
    excludes=st.booleans(),
    k=st.integers(1, 25),
)
def test_reminders_are_exact(windows: list[list[int]], blocked: set[int], excludes: bool, k: int) -> None:
    hidden = STATES[: len(windows)]
    exclude = [window[:2] for window in windows] if excludes else None
    scores = REMINDING.model.logits(hidden).detach()
    for row, ranking in enumerate(REMINDING.top_k(hidden, k, exclude, blocked, None, windows)):
        assert len(set(ranking.items)) == len(ranking.items) == k
        expected = [float(scores[row, int(i)]) + 2.0 * (int(i) in windows[row]) for i in ranking.items]
        assert ranking.scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
        forbidden = blocked | set(exclude[row] if exclude else ())
        reminded = {item for item in windows[row] if item not in forbidden}
        for item in reminded:  # even if the index does not name it
            assert str(item) in ranking.items or float(scores[row, item]) + 2.0 <= ranking.scores[-1] + 1e-4
        assert not forbidden & {int(item) for item in ranking.items}


def test_a_strong_reminder_puts_the_window_first() -> None:
    engine = make_engine(reminder=1_000.0)
    window = [5, 900, 1_999, 5]
    (ranking,) = engine.recommend([[str(item) for item in window]], 10, filter_seen=False)
    assert ranking is not None
    assert set(ranking.items[:3]) == {"5", "900", "1999"}
    assert len(ranking.items) == 10


def test_a_reminder_without_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="1 rows, 0 windows: a reminder needs the window of each row"):
        REMINDING.top_k(STATES[:1], 3)


# --- the choice of an index


def test_auto_takes_an_index_from_auto_items_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasrec.inference.index, "AUTO_ITEMS", NUM_ITEMS)
    assert make_engine("auto").index is not None
    monkeypatch.setattr(sasrec.inference.index, "AUTO_ITEMS", NUM_ITEMS + 1)
    assert make_engine("auto").index is None
    assert make_engine("approximate").index is not None
    assert make_engine("exact").index is None
    assert AUTO_ITEMS > 50_000


def test_scores_for_evaluation_are_exact_with_any_index() -> None:
    histories = [np.array([3, 5, 8]), np.array([13])]
    assert torch.equal(APPROXIMATE.scores(histories), EXACT.scores(histories))


@pytest.mark.parametrize("items", [1, 3, 15, 999])
@pytest.mark.parametrize("index", ["auto", "approximate"])
def test_a_small_catalogue_needs_no_index(items: int, index: Any) -> None:
    embedding = torch.randn(items + 1, 4, generator=torch.Generator().manual_seed(items))
    engine = make_engine(index, embedding)
    assert engine.index is None
    hidden = torch.ones(2, 4)
    assert engine.top_k(hidden, 5) == make_engine("exact", embedding).top_k(hidden, 5)


def test_another_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="index='fast': must be 'auto', 'exact' or 'approximate'"):
        make_engine("fast")


@pytest.fixture
def no_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasrec.inference.index, "find_spec", lambda name: None)
    monkeypatch.setattr(sasrec.inference.index, "AUTO_ITEMS", NUM_ITEMS)
    sasrec.inference.index._warn_once.cache_clear()


@pytest.mark.usefixtures("no_faiss")
def test_without_faiss_auto_is_exact_and_one_warning_names_the_package_to_install(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        engines = [make_engine("auto") for _ in range(3)]
    assert [engine.index for engine in engines] == [None] * 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "pip install 'streamrec[index]'" in line


@pytest.mark.usefixtures("no_faiss")
def test_without_faiss_approximate_is_an_error_that_names_the_package_to_install() -> None:
    with pytest.raises(ImportError, match=r"needs faiss, which is not installed: pip install 'streamrec\[index\]'"):
        make_engine("approximate")
    saved = SavedModel(EXACT.model, EXACT.vocab, {}, "v1")
    with pytest.raises(SettingsError, match=r"inference_index=approximate: .* pip install"):
        ServedModel.of(
            saved,
            Settings.of(inference_index="approximate").inference,
            Settings.of(inference_index="approximate").sequences.max_len,
        )
    assert (
        ServedModel.of(
            saved,
            Settings.of(inference_index="exact").inference,
            Settings.of(inference_index="exact").sequences.max_len,
        ).engine.index
        is None
    )


def test_auto_is_exact_for_a_model_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sasrec.inference.index, "AUTO_ITEMS", 10)
    assert open_index(torch.empty(NUM_ITEMS + 1, 4, device="meta"), "auto") is None


# --- a hot swap


async def test_a_swap_brings_the_index_of_the_new_model() -> None:
    options = Settings.of(inference_index="approximate", lists_top_k=10, inference_cache_bytes=2**20)
    embeddings = [synthetic_catalogue(NUM_ITEMS, HIDDEN, 1, seed)[0] for seed in (0, 1)]
    exact = [make_engine("exact", embedding) for embedding in embeddings]
    old, new = (
        ServedModel.of(SavedModel(e.model, e.vocab, {}, f"v{n}"), options.inference, options.sequences.max_len).engine
        for n, e in enumerate(exact)
    )
    assert old.index is not None and new.index is not None and old.index is not new.index
    metrics = Metrics()
    lists = SharedLists(
        RedisClient(options.redis, metrics), options.lists, options.sequences.ttl_s, 20, old.vocab
    )  # it is not connected
    lists.refusals.block(frozenset({"4"}))
    predictor = Predictor(old, lists, options.lists, options.serving.rescore_users, metrics)
    sequence = UserSequence("ann", StoredItems.of(["3", "5"]), n=2, session_n=2, last_event_ts_ms=1)
    for engine, reference in ((old, exact[0]), (new, exact[1])):
        predictor.warm_up(engine)
        predictor.swap(engine)
        (found,) = await predictor.predict([sequence])
        (best,) = reference.recommend([sequence.items], 10, blocked=["4"])
        assert best is not None
        assert (found.model, found.items) == (engine.version, best.items)


# --- the benchmark


def test_the_benchmark_measures_exact_and_approximate_lists() -> None:
    lines: list[str] = []
    (row,) = measure_catalogue((1_500,), (8,), batch=4, repeats=3, progress=lines.append)
    assert (row["items"], row["hidden"], row["batch"]) == (1_500, 8, 4)
    assert row["exact_us"] > 0 and row["approx_us"] > 0 and row["build_s"] > 0 and row["spread"] >= 0
    assert row["recall_at_10"] >= 0.99
    assert 1_500 * 8 / 2 <= row["index_bytes"] < 1_500 * 8 * 4
    assert lines == ["1,500 items, 8 dimensions"]


def test_synthetic_items_have_neighbours_as_near_as_trained_items() -> None:
    embedding, states = synthetic_catalogue(10_000, 64, 100)
    assert embedding.shape == (10_001, 64) and not embedding[0].any()
    items = torch.nn.functional.normalize(embedding[1:])
    nearest = (items[::50] @ items.T).topk(101).values[:, 1:].median(0).values
    for rank, cosine in ((1, 0.82), (10, 0.62), (100, 0.46)):
        assert nearest[rank - 1] == pytest.approx(cosine, abs=0.12)
    assert states.norm(dim=1).tolist() == pytest.approx([24.3] * 100, rel=1e-4)
    assert embedding[1:].norm(dim=1).median() == pytest.approx(0.79, abs=0.06)
