"""The engine's surface: anchored windows, exact top-k, recommendations. Cached answers: test_parity.py."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec.data.vocab import ItemVocab
from sasrec.inference.engine import Engine, anchor
from sasrec.inference.ranking import Ranking
from sasrec.model import SASRec, SASRecConfig

NUM_ITEMS = 12
IDS = [f"item-{n}" for n in range(NUM_ITEMS)]
SIZES = st.integers(1, 30).flatmap(lambda max_len: st.tuples(st.just(max_len), st.integers(1, max_len)))


def make_engine(max_len: int = 6, position: Any = "rope", reminder: float = 0.0, **options: Any) -> Engine:
    config = SASRecConfig(NUM_ITEMS, max_len, hidden_units=8, position=position, reminder=reminder)
    model = SASRec(config).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.5, generator=generator)
    return Engine(model, ItemVocab(IDS), **options)


def assert_close(ours: list[Ranking | None], theirs: list[Ranking | None]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.items == other.items
            assert one.scores == pytest.approx(other.scores, abs=1e-10)


# --- anchor and window


@given(SIZES)
def test_the_window_starts_at_0_jumps_forward_by_the_slack_and_never_exceeds_max_len(sizes: tuple[int, int]) -> None:
    max_len, slack = sizes
    starts = [anchor(n, max_len, slack) for n in range(5 * max_len + 2)]
    assert set(starts[: max_len + 1]) == {0}
    for n in range(1, len(starts)):
        length = n - starts[n]
        assert length <= max_len
        assert n <= max_len or length >= max_len - slack + 1
        assert starts[n] - starts[n - 1] in (0, slack)
        assert (starts[n] != starts[n - 1]) == (n - 1 - starts[n - 1] == max_len), "it jumps when full, only then"
    assert starts[-1] > 0


@given(SIZES, st.integers(0, 10**9))
def test_the_anchor_of_any_number_of_events_is_the_least_multiple_of_the_slack_that_fits(
    sizes: tuple[int, int], n: int
) -> None:
    max_len, slack = sizes
    start = anchor(n, max_len, slack)
    assert start % slack == 0
    assert n - start <= max_len
    assert start == 0 or n - (start - slack) > max_len


@given(SIZES, st.lists(st.integers(0, 5), max_size=80), st.integers(0, 80))
def test_the_newest_max_len_events_and_their_number_give_the_window_of_the_whole_sequence(
    sizes: tuple[int, int], tokens: list[int], more: int
) -> None:
    # a process rebuilds windows from Redis, which stores max_len events or a few more
    max_len, slack = sizes
    engine = make_engine(max_len, slack=slack, cache_bytes=0)
    whole = engine.window(tokens).tolist()
    assert whole == [token for token in tokens[anchor(len(tokens), max_len, slack) :] if token]
    stored = tokens[-(max_len + more) :]
    assert engine.window(stored, len(tokens)).tolist() == whole
    assert engine.window(np.array(stored, np.int64), len(tokens)).tolist() == whole


def test_a_sequence_cut_shorter_than_the_window_is_the_window() -> None:
    engine = make_engine(max_len=6, slack=2)
    assert engine.window([8, 9], n=100).tolist() == [8, 9]
    assert engine.window([], n=100).tolist() == []


def test_fewer_events_in_all_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="n=2 events in all, but 3 tokens were given"):
        make_engine().window([1, 2, 3], n=2)


# --- construction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slack": 0}, "slack=0: must lie between 1 and max_len=6"),
        ({"slack": 7}, "slack=7"),
        ({"max_len": 0}, "max_len=0: must lie between 1 and the model's 6"),
        ({"max_len": 7}, "max_len=7"),
        ({"max_len": 3, "slack": 4}, "slack=4: must lie between 1 and max_len=3"),
        ({"cache_bytes": -1}, "cache_bytes=-1: must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    model = make_engine(max_len=6).model
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine(model, ItemVocab(IDS), **options)


def test_a_vocabulary_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the vocabulary has 11 items but the model 12"):
        Engine(make_engine().model, ItemVocab(IDS[1:]))


def test_the_slack_is_half_of_the_window_and_at_least_one() -> None:
    assert [make_engine(max_len).slack for max_len in (1, 3, 8, 50)] == [1, 1, 4, 25]


def test_windows_do_not_jump_where_nothing_can_be_cached() -> None:
    assert make_engine(50, "learned").slack == 1


def test_only_allowed_items_are_recommended_unless_blocked() -> None:
    engine = make_engine()
    (ranking,) = engine.recommend([[IDS[0]]], NUM_ITEMS, allowed=[IDS[0], IDS[3], IDS[4], "no such item"])
    assert ranking is not None
    assert sorted(ranking.items) == sorted([IDS[3], IDS[4]])
    (ranking,) = engine.recommend([[IDS[0]]], NUM_ITEMS, allowed=[IDS[3], IDS[4]], blocked=[IDS[4]])
    assert ranking is not None
    assert ranking.items == [IDS[3]]
    assert engine.recommend([[IDS[0]]], NUM_ITEMS, allowed=[]) == [Ranking([], [])]


def test_the_cache_takes_no_more_than_its_memory() -> None:
    per_user = 2 * 2 * 6 * 8 * 8  # keys and values, 2 blocks, max_len 6, 8 units, 8 bytes
    assert make_engine(cache_bytes=10 * per_user).slots == 10
    assert make_engine(cache_bytes=10 * per_user - 1).slots == 9
    assert make_engine(cache_bytes=per_user - 1).slots == 0


@pytest.mark.parametrize("users", [None, ["ann"]])
@pytest.mark.parametrize("item", [NUM_ITEMS + 1, -1, 2**40])
def test_an_index_outside_the_vocabulary_is_refused(item: int, users: list[str] | None) -> None:
    engine = make_engine()
    with pytest.raises(IndexError):
        engine.encode([[1, item]], users)
    assert engine.encode([[1]], users).isfinite().all()


def test_the_model_is_put_into_evaluation_mode() -> None:
    model = make_engine().model.train()
    assert not Engine(model, ItemVocab(IDS)).model.training


# --- top_k


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, NUM_ITEMS + 3),
    exclude=st.none() | st.lists(st.lists(st.integers(0, NUM_ITEMS)), min_size=3, max_size=3),
    blocked=st.sets(st.integers(1, NUM_ITEMS)),
)
def test_top_k_equals_sorting_all_scores(seed: int, k: int, exclude: list[list[int]] | None, blocked: set[int]) -> None:
    engine = make_engine()
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    embedding = engine.model.item_embedding.weight.tolist()
    for row, ranking in enumerate(engine.top_k(hidden, k, exclude, blocked)):
        forbidden = blocked | set(exclude[row] if exclude else [])
        scored = [
            (sum(h * e for h, e in zip(hidden[row].tolist(), embedding[index], strict=True)), IDS[index - 1])
            for index in range(1, NUM_ITEMS + 1)
            if index not in forbidden
        ]
        best = sorted(scored, reverse=True)[:k]  # all allowed items, where they are fewer than k
        assert ranking.items == [item for _, item in best]
        assert ranking.scores == pytest.approx([score for score, _ in best], abs=1e-12)


@pytest.mark.parametrize("k", [0, -3])
def test_a_k_below_1_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}: must be at least 1"):
        make_engine().recommend([[IDS[0]]], k)


def test_everything_blocked_gives_an_empty_ranking() -> None:
    engine = make_engine()
    assert engine.recommend([[IDS[0]]], 5, blocked=IDS) == [Ranking([], [])]
    assert engine.recommend([IDS], 5, filter_seen=True) == [Ranking([], [])]


def test_excluded_items_may_be_any_collection_of_integers() -> None:
    engine = make_engine()
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))  # float32, the model is float64
    excluded: list[Any] = [np.array([1, 2], np.int32), {1, 2}, [1, 2, 0], np.array([])]
    rankings = engine.top_k(hidden[[0, 0, 0, 0]], 3, excluded)
    assert rankings[0] == rankings[1] == rankings[2]
    assert not {IDS[0], IDS[1]} & set(rankings[0].items)
    assert rankings[3] == engine.top_k(hidden[:1], 3)[0]


@pytest.mark.parametrize("index", [-1, NUM_ITEMS + 1, 2**40])
def test_an_excluded_index_outside_the_vocabulary_is_refused(index: int) -> None:
    engine = make_engine()
    hidden = torch.zeros(1, 8, dtype=torch.float64)
    with pytest.raises(IndexError, match=f"exclude must hold indices of at most {NUM_ITEMS}, and none below 0"):
        engine.top_k(hidden, 3, [[1, index]])


def test_no_rows_give_no_rankings() -> None:
    engine = make_engine()
    assert engine.top_k(torch.empty(0, 8, dtype=torch.float64), 3, [], [2]) == []
    assert engine.recommend([], 3) == []


# --- the reminder


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, NUM_ITEMS), min_size=1, max_size=9), min_size=1, max_size=4))
def test_a_reminder_raises_each_item_of_the_window_once_and_no_other_item(rows: list[list[int]]) -> None:
    plain, reminding = make_engine(), make_engine(reminder=3.0)
    histories = [np.array(row) for row in rows]
    before, after = plain.scores(histories), reminding.scores(histories)
    for row, tokens in enumerate(rows):
        window = plain.window(tokens).tolist()
        for item in range(1, NUM_ITEMS + 1):
            expected = before[row, item] + (3.0 if item in window else 0.0)
            assert after[row, item] == expected  # also where it is -inf, since the window holds no known item


def test_lists_cached_or_not_have_reminders_like_the_scores_and_no_filtered_items() -> None:
    engine, cached = (make_engine(reminder=50.0, cache_bytes=size) for size in (0, 2**20))
    sequences = [[IDS[3], "unknown", IDS[5], IDS[3]], ["unknown"], [IDS[0]]]
    lists = engine.recommend(sequences, 4, filter_seen=False)
    first, none, last = lists
    assert first is not None and none is None and last is not None
    assert set(first.items[:2]) == {IDS[3], IDS[5]}
    assert last.items[0] == IDS[0]
    assert_close(lists, cached.recommend(sequences, 4, users=["a", "b", "c"], filter_seen=False))
    assert_close(engine.recommend(sequences, 4), make_engine().recommend(sequences, 4))


def test_a_reminder_without_windows_is_refused() -> None:
    engine = make_engine(reminder=1.0)
    with pytest.raises(ValueError, match="1 rows, 0 windows: a reminder needs the window of each row"):
        engine.top_k(engine.encode([[1, 2]]), 3)


# --- recommend


@pytest.mark.parametrize("filter_seen", [False, True])
def test_each_sequence_has_items_that_are_not_recommended_to_it(filter_seen: bool) -> None:
    engine = make_engine()
    sequences = [[IDS[3]], ["unknown"], [IDS[5], IDS[6]]]
    everything = engine.recommend(sequences, NUM_ITEMS, filter_seen=filter_seen)
    first, last = everything[0], everything[2]
    assert first is not None and last is not None
    out = [[first.items[0], first.items[2], "unknown"], [IDS[1]], []]
    found, none, same = engine.recommend(sequences, 5, filter_seen=filter_seen, exclude=out)
    assert none is None and found is not None and same is not None
    assert found.items == [item for item in first.items if item not in out[0]][:5]
    assert same.items == last.items[:5]
    with pytest.raises(ValueError, match="3 sequences but 1 exclude"):
        engine.recommend(sequences, 5, exclude=[[]])


def test_seen_items_are_not_recommended_even_if_older_than_the_window() -> None:
    engine = make_engine(max_len=2, slack=1)
    seen = [IDS[n] for n in (0, 1, 2, 3, 4)]
    (ranking,) = engine.recommend([seen], NUM_ITEMS)
    assert ranking is not None
    assert sorted(ranking.items) == sorted(set(IDS) - set(seen))
    (ranking,) = engine.recommend([seen], NUM_ITEMS, filter_seen=False)
    assert ranking is not None
    assert sorted(ranking.items) == sorted(IDS)


def test_blocked_items_are_recommended_to_no_user_and_unknown_blocked_ids_are_ignored() -> None:
    engine = make_engine()
    rankings = engine.recommend([[IDS[0]], [IDS[1]]], NUM_ITEMS, blocked=[IDS[5], "no such item"])
    for seen, ranking in zip(IDS, rankings, strict=False):
        assert ranking is not None
        assert set(ranking.items) == set(IDS) - {seen, IDS[5]}


@pytest.mark.parametrize("users", [None, ["a", "b", "c", "d"]])
def test_a_user_without_a_known_item_gets_none_and_the_others_get_their_lists(users: list[str] | None) -> None:
    engine = make_engine()
    sequences = [["who?"], [IDS[3], IDS[4]], [], [IDS[4], "who?"]]
    rankings = engine.recommend(sequences, 3, users=users)
    assert (rankings[0], rankings[2]) == (None, None)
    assert_close(rankings, [engine.recommend([sequence], 3)[0] for sequence in sequences])
    assert rankings[1] != rankings[3]
    assert engine.recommend([["who?"], []], 3) == [None, None]


def test_unknown_items_are_left_out_of_the_sequence_but_count_as_events() -> None:
    engine = make_engine(max_len=4, slack=2)
    assert_close(
        engine.recommend([[IDS[1], "new", IDS[2]]], 3, filter_seen=False),
        engine.recommend([[IDS[1], IDS[2]]], 3, filter_seen=False),
    )
    # the fifth event moves the window by two, although one of the five is unknown
    assert_close(
        engine.recommend([[IDS[1], IDS[2], "new", IDS[3], IDS[4]]], 3, filter_seen=False),
        engine.recommend([[IDS[3], IDS[4]]], 3, filter_seen=False),
    )


@settings(deadline=None, max_examples=40)
@given(
    sequences=st.lists(st.lists(st.sampled_from([*IDS, "who?"]), max_size=20), min_size=1, max_size=6),
    position=st.sampled_from(["rope", "learned"]),
)
def test_a_batch_equals_its_sequences_one_by_one(sequences: list[list[str]], position: str) -> None:
    engine = make_engine(position=position)
    together = engine.recommend(sequences, 4, users=list(range(len(sequences))))
    assert_close(together, [engine.recommend([sequence], 4)[0] for sequence in sequences])


@pytest.mark.parametrize("fields", [{"users": ["u"]}, {"counts": [1]}, {"users": ["u", "v", "w"]}, {"counts": []}])
def test_each_sequence_needs_one_user_and_one_count(fields: dict[str, Any]) -> None:
    ((name, values),) = fields.items()
    with pytest.raises(ValueError, match=f"2 sequences but {len(values)} {name}; give one for each"):
        make_engine().recommend([[IDS[0]], [IDS[1]]], 5, **fields)


def test_sequences_cut_at_the_old_end_get_equal_answers_through_jumps_and_restarts() -> None:
    whole = [IDS[n * n % NUM_ITEMS] for n in range(60)]
    oracle = make_engine(slack=2, cache_bytes=0)
    daemon = make_engine(slack=2)
    for n in range(1, 61):
        if n % 17 == 0:
            daemon = make_engine(slack=2)  # another process takes over
        stored = whole[max(0, n - 6) : n]
        assert_close(
            daemon.recommend([stored], 5, users=["u"], counts=[n], filter_seen=False),
            oracle.recommend([whole[:n]], 5, filter_seen=False),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_is_served_without_a_cache(dtype: torch.dtype) -> None:
    model = SASRec(SASRecConfig(NUM_ITEMS, max_len=6, hidden_units=8)).to(dtype)
    engine = Engine(model, ItemVocab(IDS))
    assert engine.slots == 0
    (found,) = engine.recommend([IDS[:3]], k=4, users=["ann"])
    (again,) = engine.recommend([IDS[:3]], k=4)
    assert found is not None
    assert found == again
    assert len(found.items) == 4
    assert not set(found.items) & set(IDS[:3])
