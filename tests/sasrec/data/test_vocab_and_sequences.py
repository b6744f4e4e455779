"""Test vocabularies, interactions, sequences, splits and training windows."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec.data.formats import DataFileError
from sasrec.data.readers import Event
from sasrec.data.sequences import Holdout, Interactions, Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.data.windows import TrainingWindows

SHORT_IDS = st.text("abc", min_size=1, max_size=2)
CLICKS = st.lists(st.tuples(SHORT_IDS, SHORT_IDS, st.integers(0, 4)), min_size=1, max_size=60)
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def sequences_of(lengths: list[int]) -> Sequences:
    """Return a sequence of each length; every event has an index of its own."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    total = int(offsets[-1])
    vocab = ItemVocab(f"i{n}" for n in range(total))
    return Sequences(vocab, tuple(f"u{n}" for n in range(len(lengths))), offsets, np.arange(1, total + 1))


def events(text: str) -> list[Event]:
    """Parse "u1:a u2:b@5": user, item and, after @, the timestamp."""
    found = []
    for word in text.split():
        ids, _, time = word.partition("@")
        user, item = ids.split(":")
        found.append(Event(user, item, int(time) if time else None))
    return found


# --- ItemVocab


@given(st.lists(st.text(max_size=3), unique=True, max_size=20))
def test_indices_count_from_one_and_decode_to_the_ids_they_came_from(ids: list[str]) -> None:
    vocab = ItemVocab(ids)
    assert vocab.encode(ids) == list(range(1, len(ids) + 1))
    assert vocab.decode(vocab.encode(ids)) == ids
    assert len(vocab) == len(ids)


def test_an_id_outside_the_vocabulary_is_padding() -> None:
    vocab = ItemVocab(["a", "b"])
    assert vocab.encode(["b", "unknown", "a"]) == [2, 0, 1]
    assert "a" in vocab
    assert "unknown" not in vocab


def test_a_vocabulary_from_clicks_has_counts_and_the_order_of_first_appearance() -> None:
    clicks = ["c", "a", "c", "b", "c", "a"]
    vocab = ItemVocab.from_items(clicks)
    assert vocab.ids == ("c", "a", "b")
    assert vocab.counts.tolist() == [3, 2, 1]
    assert ItemVocab.from_items(clicks, min_count=2).ids == ("c", "a")


def test_vocabulary_refuses_duplicates_and_counts_of_another_length() -> None:
    with pytest.raises(ValueError, match="'b' occurs more than once"):
        ItemVocab(["a", "b", "c", "b"])
    with pytest.raises(ValueError, match="2 item ids but counts of shape"):
        ItemVocab(["a", "b"], [1, 2, 3])


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


# --- TrainingWindows


def trained_pairs(windows: TrainingWindows, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """Return every (input, target) of an epoch; check the form of the batches, too."""
    pairs = []
    for items, targets, _ in windows.batches(batch_size, np.random.default_rng(seed)):
        assert items.shape == targets.shape
        assert len(items) <= batch_size
        real = targets != 0
        assert ((items != 0) == real).all()
        assert real[:, 0].all(), "tokens come first, zeros behind them"
        assert (np.diff(real.astype(int), axis=1) <= 0).all()
        assert real.any(0).all(), "no column of padding alone"
        pairs += list(zip(items[real].tolist(), targets[real].tolist(), strict=True))
    return pairs


@settings(deadline=None)
@given(LENGTHS.filter(lambda lengths: max(lengths) > 1), st.integers(1, 12), st.integers(1, 5), st.integers(0, 9))
def test_every_event_but_each_users_first_is_a_target_exactly_once(
    lengths: list[int], max_len: int, batch_size: int, seed: int
) -> None:
    sequences = sequences_of(lengths)
    windows = TrainingWindows(sequences, max_len)
    expected = [pair for sequence in map(sequences.__getitem__, range(len(lengths))) for pair in pairwise(sequence)]
    assert sorted(trained_pairs(windows, batch_size, seed)) == sorted(expected)
    assert windows.lengths.max() <= max_len
    assert len(list(windows.batches(batch_size, np.random.default_rng(seed)))) == math.ceil(len(windows) / batch_size)


def test_windows_are_cut_from_the_newest_end_so_the_newest_is_the_fullest() -> None:
    windows = TrainingWindows(sequences_of([8]), max_len=3)  # 7 targets: 3 + 3 + 1
    found = [
        items[0].tolist()
        for length in (1, 3)
        for items, _, _ in windows.batches(1, np.random.default_rng(0))
        if items.shape[1] == length
    ]
    assert sorted(found) == [[1], [2, 3, 4], [5, 6, 7]]


def test_each_user_has_one_newest_window() -> None:
    windows = TrainingWindows(sequences_of([8, 0, 3]), max_len=3, newest=True)
    batches = [items.tolist() for items, _, _ in windows.batches(1, np.random.default_rng(0))]
    assert sorted(batches) == [[[5, 6, 7]], [[9, 10]]]


def test_batches_group_windows_of_similar_length_and_vary_from_epoch_to_epoch() -> None:
    windows = TrainingWindows(sequences_of([3, 40] * 32), max_len=50)
    rng = np.random.default_rng(0)
    first = [items for items, _, _ in windows.batches(8, rng)]
    second = [items for items, _, _ in windows.batches(8, rng)]
    assert {items.shape[1] for items in first} == {2, 39}, "no short window is padded to a long one"
    assert [items.tolist() for items in first] != [items.tolist() for items in second]


@settings(deadline=None)
@given(st.data(), LENGTHS.filter(lambda lengths: max(lengths) > 1), st.integers(1, 12))
def test_the_windows_with_new_events_are_those_that_train_one(
    data: st.DataObject, lengths: list[int], max_len: int
) -> None:
    sequences = sequences_of(lengths)
    windows = TrainingWindows(sequences, max_len)
    new = np.array([data.draw(st.integers(0, length)) for length in lengths])
    fresh = {int(sequences.offsets[u + 1]) - n for u, count in enumerate(new) for n in range(1, count + 1)}
    expected = [
        any(start + 1 + step in fresh for step in range(length))
        for start, length in zip(windows.starts.tolist(), windows.lengths.tolist(), strict=True)
    ]
    assert windows.with_new(new).tolist() == expected


@settings(deadline=None)
@given(LENGTHS.filter(lambda lengths: max(lengths) > 1), st.integers(1, 12), st.integers(0, 9))
def test_the_share_of_an_item_in_the_targets_is_counted(lengths: list[int], max_len: int, seed: int) -> None:
    windows = TrainingWindows(sequences_of(lengths), max_len)
    which = np.random.default_rng(seed).permutation(len(windows))[: 1 + seed % len(windows)]
    for chosen in (None, which):
        found = windows.batches(3, np.random.default_rng(seed), chosen)
        targets = np.concatenate([targets[targets > 0] for _, targets, _ in found])
        share = windows.target_share(chosen)
        assert share == pytest.approx(np.bincount(targets, minlength=len(share)) / len(targets))


def test_each_event_after_the_first_is_a_case() -> None:
    cases = sequences_of([3, 0, 1, 2]).each_after_the_first()
    assert [history.tolist() for history in cases.histories] == [[1], [1, 2], [5]]
    assert cases.targets.tolist() == [2, 3, 6]


def test_an_extended_vocabulary_changes_no_index_and_adds_counts() -> None:
    old = ItemVocab(["a", "b"], [5, 1])
    new = old.extended(["c", "b", "d", "c"])
    assert new.ids == ("a", "b", "c", "d")
    assert new.counts.tolist() == [5, 2, 2, 1]
    fixed = old.extended(["c", "b"], grow=False)
    assert (fixed.ids, fixed.counts.tolist()) == (("a", "b"), [5, 2])
    assert old.extended([]).ids == old.ids


def test_data_without_a_user_of_two_events_are_refused() -> None:
    with pytest.raises(ValueError, match="no user has two or more known events"):
        TrainingWindows(sequences_of([1, 0, 1]), max_len=5)


def test_a_holdout_without_cases_is_empty() -> None:
    _, holdout = sequences_of([1, 0]).leave_last_out()
    assert (len(holdout), holdout.histories) == (0, [])
    assert isinstance(holdout.sample(5, seed=0), Holdout)
