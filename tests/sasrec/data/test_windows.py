"""Cut sequences into training windows and batches."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sasrec.data.windows import TrainingWindows

from support.interactions import sequences_of

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


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


def test_data_without_a_user_of_two_events_are_refused() -> None:
    with pytest.raises(ValueError, match="no user has two or more known events"):
        TrainingWindows(sequences_of([1, 0, 1]), max_len=5)
