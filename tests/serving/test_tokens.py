"""Sequences as indices: with any cached part, the result is that of encoding the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec import ItemVocab
from streamrec.schemas import UserSequence
from streamrec.serving.sequences import parse_sequence
from streamrec.serving.tokens import TokenCache

from support.redis_access import stored

VOCAB = ItemVocab(["a", "b", "bb", "c", "ab", "é"])
ITEMS = st.sampled_from([*VOCAB.ids, "?", "aa"])
MAX_LEN = 6


def sequence(user: str, items: list[str], applied: int) -> UserSequence:
    return UserSequence(user, stored(items), len(items), len(items), 0, applied)


class Counting(ItemVocab):
    """A vocabulary that counts the items it encodes."""

    encoded = 0

    def encode(self, item_ids):  # type: ignore[no-untyped-def]
        found = super().encode(item_ids)
        self.encoded += len(found)
        return found


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["ann", "bob", "cem"]), st.lists(ITEMS, max_size=9), st.booleans(), st.integers(-1, 3)
        ),
        max_size=25,
    ),
    users=st.integers(0, 3),
)
def test_any_clicks_sessions_losses_and_wrong_counts_give_what_encoding_all_gives(
    steps: list[tuple[str, list[str], bool, int]], users: int
) -> None:
    cache, kept = TokenCache(VOCAB, users), dict[str, list[str]]()
    for user, items, new_session, off in steps:
        kept[user] = (([] if new_session else kept.get(user, [])) + items)[-MAX_LEN:]
        given = sequence(user, kept[user], max(0, len(items) + off))
        assert cache.encode(given).tolist() == VOCAB.encode(kept[user])


@pytest.mark.parametrize("new", [1, 2, MAX_LEN])
def test_a_click_of_a_full_sequence_encodes_what_is_new(new: int) -> None:
    vocab = Counting(VOCAB.ids)
    cache, items = TokenCache(vocab, 10), ["a", "b", "a", "?", "bb", "é"]
    cache.encode(sequence("ann", items, 6))
    for step in range(1, 4):
        items = [*items, *([VOCAB.ids[step]] * new)][-MAX_LEN:]
        assert cache.encode(sequence("ann", items, new)).tolist() == VOCAB.encode(items)
        assert vocab.encoded == 6 + step * new
    assert cache.encode(sequence("ann", items, 0)).tolist() == VOCAB.encode(items)
    assert vocab.encoded == 6 + 3 * new


def test_the_number_of_cached_users_is_limited() -> None:
    vocab = Counting(VOCAB.ids)
    cache = TokenCache(vocab, 2)
    for user in ("ann", "bob", "cem", "bob", "ann"):
        assert np.array_equal(cache.encode(sequence(user, ["a"], 1)), [1])
    assert vocab.encoded == 4  # ann was evicted for cem, and encoded again


def test_an_unterminated_item_in_redis_is_not_the_beginning_of_the_next() -> None:
    cache, kept = TokenCache(VOCAB, 10), list[str]()
    for value, applied in ((b"1 1 1 1 0 0 0:1\0a\0b", 1), (b"1 2 2 2 0 0 0:2\0a\0bb\0", 1)):
        read = parse_sequence("ann", value, applied)
        kept = read.items
        assert cache.encode(read).tolist() == VOCAB.encode(kept)
    assert kept == ["a", "bb"]
