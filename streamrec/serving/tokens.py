"""UserSequence -> vocabulary indices. A click encodes one new item; the others come from a cache."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from sasrec import ItemVocab
from streamrec.schemas import NO_ITEMS, StoredItems, UserSequence

NO_TOKENS = np.zeros(0, np.int64)


class TokenCache:
    """Vocabulary indices of the sequences of recently active users; 0 for items outside the vocabulary.

    If a sequence is the cached one without some oldest items and with new items behind it, only the new items are
    encoded, else all.

    Args:
        users: number of users to cache, some kB each; the least recently used are evicted.
    """

    def __init__(self, vocab: ItemVocab, users: int) -> None:
        self._vocab = vocab
        self._users = users
        self._cached: OrderedDict[str, tuple[StoredItems, NDArray[np.int64]]] = OrderedDict()  # least recent first

    def encode(self, sequence: UserSequence) -> NDArray[np.int64]:
        """Return the indices of the items, oldest first. The array is shared: do not write to it."""
        stored = sequence.stored
        before, tokens = self._cached.pop(sequence.user_id, (NO_ITEMS, NO_TOKENS))
        if stored != before:
            dropped = max(0, len(tokens) + sequence.applied - len(stored))
            new = stored.ids_after(before, dropped)
            if new is None:
                dropped, new = len(tokens), stored.ids()
            tokens = np.concatenate((tokens[dropped:], np.array(self._vocab.encode(new), np.int64)))
        self._cached[sequence.user_id] = stored, tokens
        if len(self._cached) > self._users:
            self._cached.popitem(last=False)
        return tokens
