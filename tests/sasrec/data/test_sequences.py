"""Sort interactions, group them by user and split off test cases."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec.data.formats import DataFileError
from sasrec.data.readers import Event
from sasrec.data.sequences import Holdout, Interactions, Sequences
from sasrec.data.vocab import ItemVocab

from support.interactions import sequences_of

SHORT_IDS = st.text("abc", min_size=1, max_size=2)
CLICKS = st.lists(st.tuples(SHORT_IDS, SHORT_IDS, st.integers(0, 4)), min_size=1, max_size=60)
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def events(text: str) -> list[Event]:
    """Parse "u1:a u2:b@5": user, item and, after @, the timestamp."""
    found = []
    for word in text.split():
        ids, _, time = word.partition("@")
        user, item = ids.split(":")
        found.append(Event(user, item, int(time) if time else None))
    return found


# --- Interactions


@given(CLICKS)
def test_events_are_sorted_by_time_and_ties_stay_in_file_order(clicks: list[tuple[str, str, int]]) -> None:
    interactions = Interactions.from_events(Event(*click) for click in clicks)
    expected = sorted(clicks, key=lambda click: click[2])  # Python's sort is stable
    stored = zip(interactions.user_ids, interactions.item_ids, interactions.timestamps_ms.tolist(), strict=True)
    assert list(stored) == expected


def test_a_thousand_events_of_one_timestamp_keep_their_order() -> None:
    # long enough to reveal an unstable sort
    clicks = [Event("u", str(n), 7) for n in range(1000)]
    assert Interactions.from_events(clicks).item_ids == [str(n) for n in range(1000)]


def test_events_without_timestamps_stay_in_file_order() -> None:
    assert Interactions.from_events(events("u:c v:a u:b")).item_ids == ["c", "a", "b"]


def test_some_events_with_and_some_without_timestamp_are_refused() -> None:
    with pytest.raises(DataFileError, match="1 of 3 rows have no timestamp"):
        Interactions.from_events(events("u:a@1 u:b u:c@3"))


def test_no_events_at_all_are_refused() -> None:
    with pytest.raises(DataFileError, match="no interactions"):
        Interactions.from_events([])


def test_at_least_drops_rare_items_first_and_then_users_left_with_too_few_events() -> None:
    interactions = Interactions.from_events(events("u:a@1 v:a@2 u:b@3 v:rare@4 u:b@5 w:b@6"))
    left = interactions.at_least(user_events=2, item_events=2)
    # v had two events, but one of them was on an item of a single event
    assert (left.user_ids, left.item_ids) == (["u", "u", "u"], ["a", "b", "b"])
    assert left.timestamps_ms.tolist() == [1, 3, 5]


@given(CLICKS, st.integers(1, 4), st.integers(1, 4))
def test_at_least_equals_counting_by_hand(clicks: list[tuple[str, str, int]], user_least: int, item_least: int) -> None:
    left = Interactions.from_events(Event(*click) for click in clicks).at_least(user_least, item_least)
    ordered = sorted(clicks, key=lambda click: click[2])
    items = Counter(item for _, item, _ in ordered)
    ordered = [click for click in ordered if items[click[1]] >= item_least]
    users = Counter(user for user, _, _ in ordered)
    expected = [click for click in ordered if users[click[0]] >= user_least]
    assert list(zip(left.user_ids, left.item_ids, left.timestamps_ms.tolist(), strict=True)) == expected


def test_split_at_cuts_the_time_line_once() -> None:
    interactions = Interactions.from_events(events("u:d@4 u:a@1 u:b@2 u:c@3"))
    early, late = interactions.split_at(0.75)
    assert early.item_ids == ["a", "b", "c"]
    assert late.item_ids == ["d"]
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction="):
            interactions.split_at(fraction)


# --- Sequences


@given(CLICKS)
def test_sequences_are_every_users_items_in_stream_order(clicks: list[tuple[str, str, int]]) -> None:
    interactions = Interactions.from_events(Event(*click) for click in clicks)
    vocab = ItemVocab(sorted({item for _, item, _ in clicks})[1:])  # one item stays unknown
    sequences = Sequences.build(interactions, vocab)
    by_user: dict[str, list[int]] = {}
    for user, item, _ in sorted(clicks, key=lambda click: click[2]):
        by_user.setdefault(user, []).extend(vocab.encode([item]) if item in vocab else [])
    found = {user: sequences[n].tolist() for n, user in enumerate(sequences.user_ids)}
    assert found == by_user


def test_a_sequence_outside_the_range_is_an_index_error_so_that_iteration_ends() -> None:
    sequences = sequences_of([2, 1])
    assert [sequence.tolist() for sequence in sequences] == [[1, 2], [3]]
    with pytest.raises(IndexError):
        sequences[-1]


@given(LENGTHS)
def test_leave_last_out_takes_the_last_event_of_users_with_two_events(lengths: list[int]) -> None:
    sequences = sequences_of(lengths)
    train, holdout = sequences.leave_last_out()
    expected_histories, expected_targets = [], []
    for user, length in enumerate(lengths):
        whole = sequences[user].tolist()
        assert train[user].tolist() == (whole[:-1] if length >= 2 else whole)
        if length >= 2:
            expected_histories.append(whole[:-1])
            expected_targets.append(whole[-1])
    assert [history.tolist() for history in holdout.histories] == expected_histories
    assert holdout.targets.tolist() == expected_targets
    assert train.user_ids == sequences.user_ids


def test_leaving_out_twice_gives_the_last_event_and_the_one_before() -> None:
    rest, test = sequences_of([4]).leave_last_out()
    rest, validation = rest.leave_last_out()
    assert (rest[0].tolist(), validation.targets.tolist(), test.targets.tolist()) == ([1, 2], [3], [4])


def test_a_sample_of_a_holdout_is_a_subset_that_the_seed_decides() -> None:
    _, holdout = sequences_of([3] * 40).leave_last_out()
    sample = holdout.sample(10, seed=1)
    pairs = {(tuple(h), t) for h, t in zip(holdout.histories, holdout.targets, strict=True)}
    drawn = {(tuple(h), t) for h, t in zip(sample.histories, sample.targets, strict=True)}
    assert len(sample) == len(drawn) == 10
    assert drawn <= pairs
    assert sample.targets.tolist() == holdout.sample(10, seed=1).targets.tolist()
    assert sample.targets.tolist() != holdout.sample(10, seed=2).targets.tolist()
    assert holdout.sample(40, seed=1) is holdout


def test_each_event_after_the_first_is_a_case() -> None:
    cases = sequences_of([3, 0, 1, 2]).each_after_the_first()
    assert [history.tolist() for history in cases.histories] == [[1], [1, 2], [5]]
    assert cases.targets.tolist() == [2, 3, 6]


def test_a_holdout_without_cases_is_empty() -> None:
    _, holdout = sequences_of([1, 0]).leave_last_out()
    assert (len(holdout), holdout.histories) == (0, [])
    assert isinstance(holdout.sample(5, seed=0), Holdout)
