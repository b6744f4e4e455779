"""Map item ids to indices and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec.data.vocab import ItemVocab


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


def test_an_extended_vocabulary_changes_no_index_and_adds_counts() -> None:
    old = ItemVocab(["a", "b"], [5, 1])
    new = old.extended(["c", "b", "d", "c"])
    assert new.ids == ("a", "b", "c", "d")
    assert new.counts.tolist() == [5, 2, 2, 1]
    fixed = old.extended(["c", "b"], grow=False)
    assert (fixed.ids, fixed.counts.tolist()) == (("a", "b"), [5, 2])
    assert old.extended([]).ids == old.ids
