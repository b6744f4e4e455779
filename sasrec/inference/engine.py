"""Incremental inference: a click costs one token through the model, not max_len.

Three nouns. A *window* is the part of a user's history that the model sees: the known items from ``anchor(n)`` to the
newest. A *slot* is a user's row of the cache (kv_cache.py). A *step* encodes a batch of windows, each from its slot:

    the slot's tokens are a prefix of the window              -> decode only the tokens after it
    no slot, or its tokens are no prefix (the window jumped)  -> prefill the whole window

New tokens of all users go through the model at once. ranking.py then chooses the best items.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.vocab import PADDING, ItemVocab
from sasrec.inference.blocked import BlockedItems
from sasrec.inference.index import IndexChoice, ItemIndex
from sasrec.inference.kernels import Floats
from sasrec.inference.kv_cache import CacheStats, Indices, KVCache, ScheduledWindow, SlotManager
from sasrec.inference.packed import PackedForward, batches_of_tokens, few_threads, pad_rows
from sasrec.inference.ranking import Ranker, Ranking
from sasrec.model import SASRec

T = TypeVar("T")
DEFAULT_CACHE_BYTES = 256 * 2**20
# Tokens of one forward pass, so that activations stay in the processor's cache: of the kernel, of PyTorch.
PACKED_TOKENS, PADDED_TOKENS = 512, 4_096


def anchor(n: int, max_len: int, slack: int) -> int:
    """Return where the window of a user with n events starts: 0 up to max_len events, then forward in jumps of slack.

    From max_len events on, the window holds between ``max_len - slack + 1`` and ``max_len`` of them.
    """
    return 0 if n <= max_len else -(-(n - max_len) // slack) * slack


class Engine:
    """A model, its vocabulary and a cache; it recommends items to many users at once. Not thread-safe.

    Args:
        model: is put into evaluation mode.
        vocab: the model's ``num_items`` items.
        version: name of the model, which recommendations carry.
        cache_bytes: memory for cached keys and values; 0, learned positions, a GPU and 16 bits re-encode every window.
        half_cache: cache float16: twice the users in the same memory, scores that differ in the third digit.
        slack: events by which a full window jumps; half of max_len by default, 1 with learned positions.
        max_len: the longest window, at most the model's own (the default).
        index: top-k chooses from all items ("exact") or from candidates of an ItemIndex ("approximate"); "auto" uses an
            index from ``AUTO_ITEMS`` items on. Scores are exact in either case.

    Raises:
        ValueError: vocabulary and model differ in size, or slack, max_len, cache_bytes or index are out of range.
        ImportError: index is "approximate", and faiss is not installed.
    """

    def __init__(
        self,
        model: SASRec,
        vocab: ItemVocab,
        *,
        version: str = "",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        half_cache: bool = False,
        slack: int | None = None,
        max_len: int | None = None,
        index: IndexChoice = "auto",
    ) -> None:
        config = model.config
        if len(vocab) != config.num_items:
            raise ValueError(f"the vocabulary has {len(vocab)} items but the model {config.num_items}")
        self.max_len = config.max_len if max_len is None else max_len
        if not 1 <= self.max_len <= config.max_len:
            raise ValueError(f"max_len={max_len}: must lie between 1 and the model's {config.max_len}")
        # half of max_len re-encodes about one token per click; without a cache a jump saves nothing
        jump = self.max_len // 2 if config.position == "rope" else 1
        self.slack = max(1, jump) if slack is None else slack
        if not 1 <= self.slack <= self.max_len:
            raise ValueError(f"slack={slack}: must lie between 1 and max_len={self.max_len}")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes={cache_bytes}: must be at least 0")
        self.model = model.eval()
        self.vocab = vocab
        self.version = version
        self._ranker = Ranker(model, vocab, index)
        self._packed = PackedForward(model) if PackedForward.supports(model) else None
        weight = model.item_embedding.weight
        # only with relative positions does a key stay valid while its window grows
        cacheable = self._packed is not None and config.position == "rope"
        slots = cache_bytes // KVCache.bytes_per_slot(config, weight, half_cache) if cacheable else 0
        self._slots = SlotManager(slots)
        self._cache = KVCache(config, slots, weight, half_cache) if slots else None
        if self._packed and self._cache:
            self._packed.prepare(self._cache.key_values)
            self._ranker.prepare()

    @property
    def index(self) -> ItemIndex | None:
        """The index that names candidates for top-k; None where top-k is exact."""
        return self._ranker.index

    @property
    def slots(self) -> int:
        """The number of users that can be cached at once."""
        return self._slots.slots

    @property
    def cached_users(self) -> int:
        """The number of users that are cached now."""
        return self._slots.cached_users

    def take_stats(self) -> CacheStats:
        """Return the cache's counts since the last call."""
        return self._slots.take_stats()

    def forget(self, users: Collection[Hashable] | None = None) -> None:
        """Release the slots of these users, or of all users."""
        self._slots.release(users)

    def window(self, tokens: Indices, n: int | None = None) -> NDArray[np.int64]:
        """Return the known tokens of the anchored window.

        Args:
            tokens: the newest events as indices, oldest first, 0 for items outside the vocabulary.
            n: all events that the sequence has ever had; the number of tokens by default.

        Raises:
            ValueError: n is smaller than the number of tokens.
        """
        n = len(tokens) if n is None else n
        if n < len(tokens):
            raise ValueError(f"n={n} events in all, but {len(tokens)} tokens were given")
        start = max(0, anchor(n, self.max_len, self.slack) - (n - len(tokens)))
        newest = np.asarray(tokens[start:], np.int64)
        return newest if newest.all() else newest[newest != PADDING]

    def encode(self, windows: Sequence[Indices], users: Sequence[Hashable] | None = None) -> Tensor:
        """Return the hidden state of each window's newest token, (B, D).

        Args:
            windows: indices >= 1, oldest first, none empty, none longer than max_len.
            users: the windows' users, each at most once; None does not use the cache.

        Raises:
            ValueError: a window is empty or too long, or a user occurs twice.
            IndexError: an item of a window is not in the vocabulary.
        """
        lengths = list(map(len, windows))
        for length in (min(lengths, default=1), max(lengths, default=1)):
            if not 0 < length <= self.max_len:
                raise ValueError(f"a window of {length} tokens; 1 to max_len={self.max_len} are possible")
        if users is None or self._cache is None:
            return self._encode_uncached([np.asarray(window, np.int64) for window in windows])
        if len(set(users)) != len(users):
            raise ValueError("a user occurs twice in one batch; give one window a user, with all its events")
        rows = list(zip(users, windows, strict=True))
        parts = [self._step(part) for part in _batches(rows, self.slots)]
        return torch.from_numpy(np.concatenate([self._cache.hidden[:0], *parts]))

    @torch.inference_mode()
    def scores(self, histories: Sequence[NDArray[np.int64]]) -> Tensor:
        """Return scores of all items after each history of indices, (B, num_items + 1), re-encoded.

        Column 0 (padding) is -inf, and so is the row of a history whose window holds no known item.
        """
        windows = [self.window(history) for history in histories]
        known = [i for i, window in enumerate(windows) if len(window)]
        weight = self.model.item_embedding.weight
        scores = weight.new_full((len(windows), len(self.vocab) + 1), -torch.inf)
        known_windows = [windows[i] for i in known]
        scores[known] = self._ranker.logits(self.encode(known_windows), known_windows)
        scores[:, PADDING] = -torch.inf
        return scores

    def top_k(
        self,
        hidden: Tensor,
        k: int,
        exclude: Sequence[Indices | Collection[int]] | None = None,
        blocked: Collection[int] | BlockedItems = (),
        allowed: Collection[int] | None = None,
        windows: Sequence[Indices] = (),
    ) -> list[Ranking]:
        """Return the k best items of each row with their scores.

        With an index they are the best of its candidates; without one, with ``allowed``, and for rows with too few
        candidates left after filtering, they are exact.

        Args:
            hidden: (B, D).
            exclude: for each row, indices that must not be recommended (0 is ignored).
            blocked: indices or mask of items that no row may contain.
            allowed: the only indices that may be recommended; all by default.
            windows: the windows that the rows were encoded from; only a model with a reminder needs them.

        Raises:
            ValueError: k is smaller than 1, or the model has a reminder and a row has no window.
        """
        return self._ranker.top_k(hidden, k, exclude, BlockedItems.of(blocked, len(self.vocab)), allowed, windows)

    def recommend(
        self,
        sequences: Sequence[Sequence[str] | NDArray[np.int64]],
        k: int = 10,
        *,
        users: Sequence[Hashable] | None = None,
        counts: Sequence[int] | None = None,
        filter_seen: bool = True,
        blocked: Collection[str] | BlockedItems = (),
        allowed: Collection[str] | None = None,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[Ranking | None]:
        """Return the top k after each sequence; None where the window holds no known item.

        Args:
            sequences: item ids, oldest first, or arrays of their indices, 0 for unknown items, which are left out.
            users: cache under these names, each at most once; None re-encodes.
            counts: all events that each sequence has ever had; it may be cut.
            filter_seen: do not recommend items of the sequence, in the window or before it.
            blocked: items that are recommended to no user: ids, or a mask; ``exclude``: ids that are not to each.
            allowed: the only item ids that are recommended; all by default.

        Raises:
            ValueError: k is smaller than 1, a user occurs twice, or an argument does not fit the sequences.
        """
        for name, given in (("users", users), ("counts", counts), ("exclude", exclude)):
            if given is not None and len(given) != len(sequences):
                raise ValueError(f"{len(sequences)} sequences but {len(given)} {name}; give one for each")
        tokens = [self._tokens(sequence) for sequence in sequences]
        windows = [self.window(t, None if counts is None else counts[i]) for i, t in enumerate(tokens)]
        known = [i for i, window in enumerate(windows) if len(window)]
        rankings: list[Ranking | None] = [None] * len(tokens)
        if not known:
            return rankings
        windows = [windows[i] for i in known]
        hidden = self.encode(windows, None if users is None else [users[i] for i in known])
        out = [tokens[i] if filter_seen else tokens[i][:0] for i in known] if filter_seen or exclude else None
        if exclude and out:
            out = [np.concatenate((row, self._tokens([*exclude[i]]))) for row, i in zip(out, known, strict=True)]
        no = blocked if isinstance(blocked, BlockedItems) else self.vocab.encode(blocked)
        allowed_indices = None if allowed is None else [index for index in self.vocab.encode(allowed) if index]
        for i, ranking in zip(known, self.top_k(hidden, k, out, no, allowed_indices, windows), strict=True):
            rankings[i] = ranking
        return rankings

    def _tokens(self, sequence: Sequence[str] | NDArray[np.int64]) -> NDArray[np.int64]:
        if isinstance(sequence, np.ndarray) and sequence.dtype == np.int64:
            return sequence
        return np.array(self.vocab.encode(sequence), np.int64)

    def _step(self, batch: Sequence[tuple[Hashable, Indices]]) -> Floats:
        """Encode the windows of at most ``slots`` users, each from its slot."""
        scheduled = self._slots.schedule(batch)
        unfinished = (row for row in scheduled if row.past < len(row.window))
        for part in batches_of_tokens(unfinished, lambda row: len(row.window) - row.past, PACKED_TOKENS):
            self._forward(part)
        assert self._cache is not None
        hidden: Floats = self._cache.hidden[[row.slot.index for row in scheduled]]
        return hidden

    def _forward(self, scheduled: list[ScheduledWindow]) -> None:
        assert self._packed is not None and self._cache is not None
        for row in scheduled:
            row.slot.tokens = b""  # if the forward pass fails, the slot's content is unknown
        items = np.concatenate([row.window[row.past :] for row in scheduled])
        slots, past, new = np.array([(r.slot.index, r.past, len(r.window) - r.past) for r in scheduled]).T.copy()
        self._cache.hidden[slots] = self._packed.encode(items, self._cache.key_values, slots, past, new)
        for row in scheduled:
            row.slot.tokens = row.tokens

    def _encode_uncached(self, windows: Sequence[NDArray[np.int64]]) -> Tensor:
        """Encode whole windows, (B, D)."""
        if not windows:
            return self.model.item_embedding.weight.detach()[:0]
        if self._packed and (few_threads() or sum(map(len, windows)) <= PACKED_TOKENS):
            batches = batches_of_tokens(windows, len, PACKED_TOKENS)
            return torch.from_numpy(np.concatenate([self._packed.encode_windows(batch) for batch in batches]))
        rows = max(1, PADDED_TOKENS // max(map(len, windows)))
        return torch.cat([self._encode_padded(batch) for batch in _batches(windows, rows)])

    @torch.inference_mode()
    def _encode_padded(self, windows: Sequence[NDArray[np.int64]]) -> Tensor:
        items = pad_rows(windows, self.model.item_embedding.weight.device)  # (B, T)
        last = torch.tensor([len(window) - 1 for window in windows], device=items.device)
        hidden: Tensor = self.model(items, last)
        return hidden


def _batches(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
