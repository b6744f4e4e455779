"""Count-based baselines: provable answers, and a comparison with loops over exact fractions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec.data.sequences import Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.evaluation.baselines import CountBaseline, MarkovChain, Popularity, SequentialRules, all_baselines

NUM_ITEMS = 8
SESSIONS = st.lists(st.lists(st.integers(1, NUM_ITEMS), max_size=9), max_size=8)
HISTORIES = st.lists(st.lists(st.integers(0, NUM_ITEMS), max_size=6), min_size=1, max_size=5)
OPTIONS = st.fixed_dictionaries(
    {
        "last": st.integers(1, 4),
        "decay": st.sampled_from(["linear", "reciprocal"]),
        "remind": st.sampled_from([0.0, 0.25, 1.0]),
    }
)


def sequences_of(sessions: Iterable[Sequence[int]], num_items: int = NUM_ITEMS) -> Sequences:
    rows = [np.array(session, np.int64) for session in sessions]
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64)
    items = np.concatenate([np.zeros(0, np.int64), *rows])
    return Sequences(ItemVocab(map(str, range(num_items))), tuple(f"u{n}" for n in range(len(rows))), offsets, items)


def scores(baseline: CountBaseline, *histories: Sequence[int]) -> list[list[float]]:
    """Return the scores of items 1, 2, ... after each history."""
    result: list[list[float]] = baseline.scores([np.array(history, np.int64) for history in histories])[:, 1:].tolist()
    return result


def best_first(baseline: CountBaseline, history: Sequence[int]) -> list[int]:
    """Sort all items by score, tied ones by index."""
    (row,) = scores(baseline, history)
    return sorted(range(1, len(row) + 1), key=lambda item: -row[item - 1])


# --- comparison with loops


def rules_by_hand(sessions: list[list[int]], last: int) -> dict[int, dict[int, Fraction]]:
    rules: dict[int, dict[int, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    for session in sessions:
        for later, item in enumerate(session):
            for distance in range(1, min(last, later) + 1):
                rules[session[later - distance]][item] += Fraction(1, distance)
    return {i: {j: weight / sum(found.values()) for j, weight in found.items()} for i, found in rules.items()}


def keys_by_hand(
    sessions: list[list[int]], history: list[int], last: int, decay: str, remind: float
) -> list[tuple[Fraction, int]]:
    """Return (evidence, popularity) of items 1, 2, ..., by which the scores must order them."""
    rules, popularity = rules_by_hand(sessions, last), Counter(item for session in sessions for item in session)
    evidence: dict[int, Fraction] = defaultdict(Fraction)
    newest_first = [item for item in reversed(history) if item != 0]
    for age, source in enumerate(newest_first[:last]):
        weight = 1 - Fraction(age, last) if decay == "linear" else Fraction(1, age + 1)
        for item, share in rules.get(source, {}).items():
            evidence[item] += weight * share
    for item in set(newest_first):
        evidence[item] += Fraction(remind) / (newest_first.index(item) + 1)
    return [(evidence[item], popularity[item]) for item in range(1, NUM_ITEMS + 1)]


def same_order(row: list[float], keys: list[tuple[Fraction, int]]) -> bool:
    """Return whether scores rise, fall and tie exactly where the keys do."""
    place = {key: n for n, key in enumerate(sorted(set(keys)))}
    level = {score: n for n, score in enumerate(sorted(set(row)))}
    return [level[score] for score in row] == [place[key] for key in keys]


@settings(deadline=None, max_examples=200)
@given(sessions=SESSIONS, histories=HISTORIES, options=OPTIONS)
def test_sequential_rules_equal_counting_with_loops(
    sessions: list[list[int]], histories: list[list[int]], options: dict[str, Any]
) -> None:
    baseline = SequentialRules(**options).fit(sequences_of(sessions))
    for history, row in zip(histories, scores(baseline, *histories), strict=True):
        assert same_order(row, keys_by_hand(sessions, history, **options))


@settings(deadline=None)
@given(sessions=SESSIONS, histories=HISTORIES)
def test_a_markov_chain_orders_by_transitions_from_the_newest_known_item(
    sessions: list[list[int]], histories: list[list[int]]
) -> None:
    popularity = Counter(item for session in sessions for item in session)
    baseline = MarkovChain().fit(sequences_of(sessions))
    for history, row in zip(histories, scores(baseline, *histories), strict=True):
        newest = next((item for item in reversed(history) if item), None)
        steps = Counter(b for session in sessions for a, b in pairwise(session) if a == newest)
        assert same_order(row, [(Fraction(steps[item]), popularity[item]) for item in range(1, NUM_ITEMS + 1)])


@settings(deadline=None)
@given(sessions=SESSIONS, histories=HISTORIES)
def test_popularity_orders_by_events_for_any_history(sessions: list[list[int]], histories: list[list[int]]) -> None:
    popularity = Counter(item for session in sessions for item in session)
    for row in scores(Popularity().fit(sequences_of(sessions)), *histories):
        assert same_order(row, [(Fraction(0), popularity[item]) for item in range(1, NUM_ITEMS + 1)])


@settings(deadline=None)
@given(sessions=SESSIONS, histories=HISTORIES, name=st.sampled_from(list(all_baselines())))
def test_a_batch_equals_one_by_one_in_finite_float32_with_padding_last(
    sessions: list[list[int]], histories: list[list[int]], name: str
) -> None:
    baseline = all_baselines()[name].fit(sequences_of(sessions))
    arrays = [np.array(history, np.int64) for history in histories]
    together = baseline.scores(arrays)
    assert together.dtype == torch.float32
    assert together.shape == (len(histories), NUM_ITEMS + 1)
    assert torch.equal(together, torch.cat([baseline.scores([array]) for array in arrays]))
    assert (together[:, 0] == -torch.inf).all()
    assert together[:, 1:].isfinite().all()


# --- provable answers


@pytest.mark.parametrize("baseline", [MarkovChain(), SequentialRules(last=1), SequentialRules(last=5)])
def test_on_a_circle_the_successor_comes_first(baseline: CountBaseline) -> None:
    circle = [[(start + step) % NUM_ITEMS + 1 for step in range(12)] for start in range(NUM_ITEMS)]
    baseline.fit(sequences_of(circle))
    for item in range(1, NUM_ITEMS + 1):
        (row,) = scores(baseline, [item])
        successor = item % NUM_ITEMS + 1
        assert all(row[successor - 1] > score for other, score in enumerate(row, start=1) if other != successor)


@pytest.mark.parametrize("decay", ["linear", "reciprocal"])
def test_on_a_checkerboard_every_item_of_the_colour_beats_every_item_of_the_other(decay: Any) -> None:
    white, black = [1, 3, 5, 7], [2, 4, 6, 8]
    sessions = [white, white[::-1], black, black[::-1], *[[8, 6, 4, 2]] * 20]  # black is far more popular
    baseline = SequentialRules(last=3, decay=decay).fit(sequences_of(sessions))
    for colour, other in ((white, black), (black, white)):
        histories = [*([item] for item in colour), colour]
        for history, row in zip(histories, scores(baseline, *histories), strict=True):
            expected = [item for item in colour if history != [item]]  # no item follows itself here
            assert min(row[item - 1] for item in expected) > max(row[item - 1] for item in other)


def test_a_rule_weighs_the_reciprocal_of_its_distance_and_ends_at_last() -> None:
    sessions = sequences_of([[1, 2, 3, 4, 5], *[[6]] * 3, *[[5]] * 3])
    by_popularity = [5, 6, 1, 2, 3, 4, 7, 8]
    for last in (1, 2, 3, 4):
        ruled = [2, 3, 4, 5][:last]
        expected = ruled + [item for item in by_popularity if item not in ruled]
        assert best_first(SequentialRules(last=last).fit(sessions), [1]) == expected


def test_decay_decides_how_far_back_a_history_counts() -> None:
    # the newest item votes for 1; the third and fourth newest for 2: 0.8 + 0.7 of a vote, or 1/3 + 1/4 of a vote
    sessions, history = sequences_of([[3, 1], [4, 2], [5, 2], [6, 7]]), [4, 5, 6, 3]
    assert best_first(SequentialRules(last=10, decay="linear").fit(sessions), history)[:3] == [2, 1, 7]
    assert best_first(SequentialRules(last=10, decay="reciprocal").fit(sessions), history)[:3] == [1, 2, 7]
    assert scores(SequentialRules(last=1).fit(sessions), history) == scores(MarkovChain().fit(sessions), [3])


def test_rules_of_a_popular_item_do_not_outweigh_those_of_a_rare_item() -> None:
    popular, rare = [[1, n] for n in (3, 4, 5, 6)] * 50, [[2, 7]]
    # 7 gains half a vote from 2, each of the others a quarter from 1, despite its 50 events
    assert best_first(SequentialRules().fit(sequences_of(popular + rare)), [2, 1])[0] == 7


def test_a_reminder_ranks_the_items_of_the_session_newest_first_and_0_has_no_effect() -> None:
    sessions = sequences_of([[1, 2], [3, 4], [5, 6], [7, 8], [7], [7], [8]])
    assert best_first(SequentialRules(last=2, remind=10.0).fit(sessions), [1, 5, 3, 5])[:3] == [5, 3, 1]
    assert best_first(SequentialRules(last=2, remind=0.1).fit(sessions), [1, 5])[:4] == [6, 2, 5, 1]
    assert best_first(SequentialRules(last=2).fit(sessions), [1, 5])[:3] == [6, 2, 7]


# --- ties


def test_popularity_orders_equal_evidence_and_never_reverses_a_real_difference() -> None:
    often, rarely = [[2]] * 10_000, [[1, 4]] * 1_001
    sessions = sequences_of([[1, 2]] * 1_000 + [[1, 3]] * 1_000 + rarely + often)
    for baseline in (MarkovChain(), SequentialRules()):
        (row,) = scores(baseline.fit(sessions), [1])
        assert row[4 - 1] > row[2 - 1] > row[3 - 1] > row[1 - 1]


def test_evidence_that_differs_only_by_rounding_is_equal() -> None:
    # after 2, 1: item 3 gains half of 3/5, item 4 gains 1/5 and half of 1/5; in floating point 0.1 + 0.2 > 0.3
    rules = [[1, 4], *[[1, 8]] * 4, *[[2, 3]] * 3, [2, 4], [2, 8]]
    for popular, other in ((3, 4), (4, 3)):
        baseline = SequentialRules(last=2).fit(sequences_of([*rules, *[[popular]] * 9]))
        assert best_first(baseline, [2, 1])[:3] == [8, popular, other]


def test_items_of_equal_evidence_and_popularity_are_tied() -> None:
    (row,) = scores(MarkovChain().fit(sequences_of([[1, 2], [1, 3], [4, 5]])), [1])
    assert row[2 - 1] == row[3 - 1] > row[4 - 1] == row[5 - 1] > row[6 - 1] == row[7 - 1]


# --- histories without a known item or rule, and mistakes


@pytest.mark.parametrize("name", all_baselines())
def test_unknown_items_are_ignored_and_an_empty_history_falls_back_to_popularity(name: str) -> None:
    sessions = sequences_of([[1, 2, 3, 1, 2, 4, 2], [5, 2, 6]])
    baseline, popular = all_baselines()[name].fit(sessions), Popularity().fit(sessions)
    with_unknown, without = scores(baseline, [0, 1, 0, 3, 0, 0], [1, 3])
    assert with_unknown == without
    no_rule = [8]
    for row in scores(baseline, [], [0, 0], no_rule):
        assert row == scores(popular, [])[0]
    assert baseline.scores([]).shape == (0, NUM_ITEMS + 1)


def test_only_events_of_one_user_make_a_rule() -> None:
    sessions = sequences_of([[1], [], [2, 3], [4]])
    (row,) = scores(SequentialRules(last=9).fit(sessions), [1])
    assert row == scores(Popularity().fit(sessions), [])[0]


def test_fitting_returns_the_baseline_and_fitting_again_starts_anew() -> None:
    for baseline in all_baselines().values():
        first, second = sequences_of([[1, 2], [1, 2]]), sequences_of([[3, 4, 5]], 5)
        assert baseline.fit(first) is baseline
        baseline.fit(second)
        fresh = type(baseline)().fit(second)
        assert scores(baseline, [3], [1]) == scores(fresh, [3], [1])


def test_every_call_returns_new_baselines_by_their_names_in_tables() -> None:
    assert list(all_baselines()) == ["popularity", "Markov chain", "sequential rules"]
    assert all_baselines()["popularity"] is not all_baselines()["popularity"]


def test_histories_are_not_changed() -> None:
    history = np.array([0, 3, 1, 3], np.int64)
    SequentialRules(remind=1.0).fit(sequences_of([[3, 1, 2]])).scores([history])
    assert history.tolist() == [0, 3, 1, 3]


@pytest.mark.parametrize("name", all_baselines())
def test_scores_before_fit_and_indices_outside_the_catalogue_are_refused(name: str) -> None:
    baseline = all_baselines()[name]
    with pytest.raises(ValueError, match=r"has counted nothing yet; call fit\(sequences\)"):
        scores(baseline, [1])
    baseline.fit(sequences_of([[1, 2]]))
    for index in (-1, NUM_ITEMS + 1):
        with pytest.raises(ValueError, match=f"item index {index} in a history; must lie between 0 and num_items=8"):
            scores(baseline, [1, index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0}, "last=0: must be at least 1"),
        ({"decay": "log"}, "decay='log': must be one of linear, reciprocal"),
        ({"remind": -0.5}, "remind=-0.5: must be at least 0"),
        ({"remind": float("nan")}, "remind=nan: must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequentialRules(**options)
