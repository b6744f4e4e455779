"""UserSequence -> indices of a vocabulary. A click adds one to what is known of its user; nothing is encoded twice."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from sasrec import ItemVocab
from streamrec.schemas import UserSequence

NO_TOKENS = np.zeros(0, np.int64)


class TokenCache:
    """The sequences of users who clicked lately, as indices, 0 for items outside the vocabulary.

    What was encoded of a user is continued where his stored bytes say that it can be: his sequence is the one before,
    less what was cut off at its old end, and new items behind it. Else it is encoded whole.

    Args:
        users: how many are kept, some kB each.
    """

    def __init__(self, vocab: ItemVocab, users: int) -> None:
        self._vocab = vocab
        self._users = users
        self._known: OrderedDict[str, tuple[bytes, NDArray[np.int64]]] = OrderedDict()  # least recently used first

    def encode(self, sequence: UserSequence) -> NDArray[np.int64]:
        """Indices of the items, oldest first; not to be written to."""
        stored = sequence.stored
        before, tokens = self._known.pop(sequence.user_id, (b"", NO_TOKENS))
        if stored != before:
            cut = max(0, len(tokens) + sequence.applied - stored.count(b"\0"))
            kept = before.split(b"\0", cut)[-1]
            if not stored.startswith(kept):
                cut, kept = len(tokens), b""
            new = stored[len(kept) :].decode(errors="replace").split("\0")[:-1]
            tokens = np.concatenate((tokens[cut:], np.array(self._vocab.encode(new), np.int64)))
        self._known[sequence.user_id] = stored, tokens
        if len(self._known) > self._users:
            self._known.popitem(last=False)
        return tokens
