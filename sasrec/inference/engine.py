"""Incremental inference: a click costs one token through the model, not max_len.

Three nouns. A *window* is what the model sees of a user: the known items from ``anchor(n)`` to the newest.
A *slot* is a row of the KVCache (kv_cache.py), lent to a user, the least recently used one taken back when all are
lent. A *step* encodes the windows of a batch of users, each from the longest cached prefix:

    a slot whose tokens are a prefix of the window   -> decode only the tokens that came after
    no slot, or another prefix (the window jumped)   -> prefill the whole window

Both go through the model at once, tokens of all users one behind another.

Keys and values at a position depend on the tokens up to it and on nothing else, so a matching prefix is
all that correctness needs: whatever crashed, moved or was lost, cached and re-encoded answers agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.vocab import PADDING, ItemVocab
from sasrec.inference.index import AUTO_ITEMS, IndexChoice, ItemIndex, open_index
from sasrec.inference.kernels import COLUMNS, Floats, top_k
from sasrec.inference.kv_cache import KVCache
from sasrec.inference.packed import PackedForward, PackedItems, one_behind_another
from sasrec.model import SASRec

T = TypeVar("T")
Indices = Sequence[int] | NDArray[np.int64]

DEFAULT_CACHE_BYTES = 256 * 2**20
# Tokens encoded in one forward, so that activations stay in the processor's cache: by the kernel, by PyTorch.
PACKED_TOKENS, PADDED_TOKENS = 512, 4_096
# Kernels use one thread. With more than so many PyTorch is faster, unless there are few tokens, or rows to rank.
PACKED_THREADS, PACKED_ROWS = 2, 64
# Of up to so many items a copy of the embedding is kept as the kernel reads it; of more an index names candidates.
PACKED_ITEMS = AUTO_ITEMS
# Embeddings of candidates gathered at once: they stay in a core's cache until scored, in a quarter of the time.
RESCORED_BYTES = 600_000


def anchor(n: int, max_len: int, slack: int) -> int:
    """Where the window of a user with n events starts: 0 up to max_len events, then forward in jumps of slack.

    The window holds between ``max_len - slack + 1`` and ``max_len`` events once a user has that many.
    """
    return 0 if n <= max_len else -(-(n - max_len) // slack) * slack


class Ranking(NamedTuple):
    """Best items first, with their scores (logits). Shorter than asked only when fewer items are allowed."""

    items: list[str]
    scores: list[float]


@dataclass
class CacheStats:
    """What an Engine's cache did since it was last asked."""

    hits: int = 0  # windows that continued a cached prefix
    misses: int = 0  # windows encoded whole: new user, jump, evicted
    evictions: int = 0


@dataclass
class _Slot:
    index: int
    tokens: bytes = b""  # of an array of int64: two prefixes are compared as fast as memory is read


class _Work(NamedTuple):
    """What a step does for a user: encode ``window[past:]`` behind what his slot holds."""

    slot: _Slot
    past: int
    window: NDArray[np.int64]
    tokens: bytes  # of the window


class Engine:
    """A model, its vocabulary and a cache, answering "what next?" for many users at once.

    Not thread-safe: one thread at a time may call it.

    Args:
        model: put into evaluation mode.
        vocab: of the model's ``num_items`` items.
        version: name of the model, carried into recommendations.
        cache_bytes: memory for cached keys and values; 0 re-encodes every window, as do learned positions, and a model
            on a GPU or in 16 bits.
        half_cache: keep them as float16: twice the users in the same memory, scores that differ in the third digit.
        slack: how far the window jumps when it is full; half of max_len by default, 1 with learned positions.
        max_len: the longest window, at most the model's own (the default).
        index: which items top-k chooses from: "exact" all, "approximate" those that an ItemIndex names, which is
            built here, "auto" approximate from ``AUTO_ITEMS`` items on. Scores are exact in either case.

    Raises:
        ValueError: vocabulary and model differ in size, or slack, max_len, cache_bytes or index are out of range.
        ImportError: the index is to be approximate, and faiss is not installed.
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
        # half: a jump then encodes about one token for each click since the last one, a quarter would encode three,
        # for lists no better; where nothing can be cached, windows gain nothing by staying put
        jump = self.max_len // 2 if config.position == "rope" else 1
        self.slack = max(1, jump) if slack is None else slack
        if not 1 <= self.slack <= self.max_len:
            raise ValueError(f"slack={slack}: must lie between 1 and max_len={self.max_len}")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes={cache_bytes}: must be at least 0")
        self.model = model.eval()
        self.vocab = vocab
        self.version = version
        self._stats = CacheStats()
        weight = model.item_embedding.weight
        self.index = open_index(weight, index)
        a_slot = KVCache.bytes_per_slot(config, weight, half_cache)
        self._packed = PackedForward(model) if PackedForward.supports(model) else None
        # a key stays valid while a window grows only where distances alone count
        slots = cache_bytes // a_slot if self._packed and config.position == "rope" else 0
        self._cache = KVCache(config, slots, weight, half_cache) if slots else None
        if self._packed and self._cache:
            self._packed.prepare(self._cache.held)  # now, and not while a click waits
        small = self._packed is not None and config.num_items <= PACKED_ITEMS
        self._items = PackedItems(weight) if small and not config.reminder else None
        if self._items and self._cache:
            self._items.prepare()
        self._free = list(range(slots))
        self._slots: OrderedDict[Hashable, _Slot] = OrderedDict()  # least recently used first

    @property
    def slots(self) -> int:
        """How many users can be cached at once."""
        return 0 if self._cache is None else self._cache.slots

    @property
    def cached_users(self) -> int:
        """How many users are cached now."""
        return len(self._slots)

    def take_stats(self) -> CacheStats:
        """What the cache did since the last call."""
        stats, self._stats = self._stats, CacheStats()
        return stats

    def window(self, tokens: Indices, n: int | None = None) -> NDArray[np.int64]:
        """The known tokens of the anchored window.

        Args:
            tokens: the newest events as indices, oldest first, 0 for items outside the vocabulary.
            n: how many events the sequence has had in all; the number of tokens by default.

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
        """Hidden state of each window's newest token, (B, D).

        Args:
            windows: indices >= 1, oldest first, none empty, none longer than max_len.
            users: whose windows they are, each at most once; None leaves the cache out of it.

        Raises:
            ValueError: a window is empty or too long, or a user occurs twice.
            IndexError: an item of a window is not in the vocabulary.
        """
        lengths = list(map(len, windows))
        for length in (min(lengths, default=1), max(lengths, default=1)):
            if not 0 < length <= self.max_len:
                raise ValueError(f"a window of {length} tokens; 1 to max_len={self.max_len} are possible")
        if users is None or self._cache is None:
            return self._encode_windows([np.asarray(window, np.int64) for window in windows])
        if len(set(users)) != len(users):
            raise ValueError("a user occurs twice in one batch; give one window a user, with all its events")
        rows = list(zip(users, windows, strict=True))
        parts = [self._step(part) for part in _chunks(rows, self.slots)]
        return torch.from_numpy(np.concatenate([self._cache.hidden[:0], *parts]))

    @torch.inference_mode()
    def scores(self, histories: Sequence[NDArray[np.int64]]) -> Tensor:
        """Scores of all items after each history of indices, (B, num_items + 1), re-encoded.

        Column 0 (padding) is -inf, and so is the row of a history whose window holds no known item.
        """
        windows = [self.window(history) for history in histories]
        known = [i for i, window in enumerate(windows) if len(window)]
        weight = self.model.item_embedding.weight
        scores = weight.new_full((len(windows), len(self.vocab) + 1), -torch.inf)
        of_known = [windows[i] for i in known]
        scores[known] = self._logits(self.encode(of_known), of_known)
        scores[:, PADDING] = -torch.inf
        return scores

    def top_k(
        self,
        hidden: Tensor,
        k: int,
        exclude: Sequence[Indices | Collection[int]] | None = None,
        blocked: Collection[int] = (),
        allowed: Collection[int] | None = None,
        windows: Sequence[Indices] = (),
    ) -> list[Ranking]:
        """The k best items of each row with their scores; where there is an index, the best of those that it names.

        Exact where there is none, where ``allowed`` is given, and for rows of which filters leave too few candidates.

        Args:
            hidden: (B, D).
            windows: the windows that the rows were encoded from; of use to a model with a reminder alone.
            exclude: for each row, indices that must not be recommended (0 is ignored).
            blocked: indices that must not be recommended to anyone.
            allowed: the only indices that may be; all by default.

        Raises:
            ValueError: k is smaller than 1, or the model has a reminder and not each row a window.
        """
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        if self.index is None or allowed is not None or not len(hidden):
            return self._rank_all(hidden, k, exclude, blocked, allowed, windows)
        exclude = [()] * len(hidden) if exclude is None else exclude
        found = self._rank_candidates(self.index, hidden, k, exclude, blocked, windows)
        short = [i for i, ranking in enumerate(found) if ranking is None]
        if short:
            of_short = [windows[i] for i in short] if windows else ()
            whole = self._rank_all(hidden[short], k, [exclude[i] for i in short], blocked, None, of_short)
            for i, ranking in zip(short, whole, strict=True):
                found[i] = ranking
        return [ranking for ranking in found if ranking is not None]

    @torch.inference_mode()
    def _rank_all(
        self,
        hidden: Tensor,
        k: int,
        exclude: Sequence[Indices | Collection[int]] | None,
        blocked: Collection[int],
        allowed: Collection[int] | None,
        windows: Sequence[Indices],
    ) -> list[Ranking]:
        """The best of the whole catalogue."""
        if self._items and k <= COLUMNS and (_few_threads() or len(hidden) <= PACKED_ROWS):
            states = hidden.detach().numpy()
            return self._rankings(*self._items.top_k(states, min(k, len(self.vocab)), exclude, blocked, allowed))
        scores = self._logits(hidden, windows)  # (B, num_items + 1)
        scores[:, PADDING] = -torch.inf
        if allowed is not None:
            others = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
            others[list(allowed)] = False
            scores[:, others] = -torch.inf
        if blocked:
            scores[:, list(blocked)] = -torch.inf
        if exclude is not None:
            scores.scatter_(1, self.padded(exclude), -torch.inf)  # of shorter rows padding once more
        best, indices = top_k(scores, min(k, len(self.vocab)))
        return self._rankings(*_as_arrays(best, indices))

    @torch.inference_mode()
    def _rank_candidates(
        self,
        index: ItemIndex,
        hidden: Tensor,
        k: int,
        exclude: Sequence[Indices | Collection[int]],
        blocked: Collection[int],
        windows: Sequence[Indices],
    ) -> list[Ranking | None]:
        """The best of what the index names and of what the reminder may raise; None where too little is left."""
        reminded = self._reminded(hidden, windows) or [set()] * len(hidden)
        excluded, own = (F.pad(self.padded(rows), (0, 1), value=PADDING) for rows in (exclude, reminded))  # 0 in each
        depth = index.candidates(k)
        filtered = excluded.shape[1] + own.shape[1] + min(len(blocked), depth)  # may take so many away
        found = index.search(hidden, min(depth + filtered, len(self.vocab)))  # (B, F)
        candidates = torch.cat((found.masked_fill(_among(found, own), PADDING), own), 1)  # (B, C), none but 0 twice
        banned = torch.zeros(len(self.vocab) + 1, dtype=torch.bool, device=hidden.device)
        banned[list(blocked)] = True
        scores = self._scores_of(candidates, hidden)  # (B, C)
        scores[:, found.shape[1] :] += self.model.config.reminder
        scores[banned[candidates] | _among(candidates, excluded)] = -torch.inf
        best, places = top_k(scores, min(k, scores.shape[1]))  # (B, k)
        enough = (scores.isfinite().sum(1) >= depth).tolist()
        rankings = self._rankings(*_as_arrays(best, candidates.gather(1, places)))
        return [ranking if whole else None for ranking, whole in zip(rankings, enough, strict=True)]

    def _scores_of(self, items: Tensor, hidden: Tensor) -> Tensor:
        """Scores of items (B, C), without the reminder."""
        weight = self.model.item_embedding.weight
        users = max(1, RESCORED_BYTES // (items.shape[1] * weight[0].nbytes))
        scratch = weight.new_empty(users * items.shape[1], weight.shape[1])
        parts = []
        for of_part, states in zip(torch.split(items, users), torch.split(hidden, users), strict=True):
            embedding = scratch[: of_part.numel()]
            torch.index_select(weight, 0, of_part.flatten(), out=embedding)
            parts.append(torch.bmm(embedding.view(*of_part.shape, -1), states[:, :, None])[:, :, 0])
        return torch.cat(parts)

    def _rankings(self, best: Floats, indices: NDArray[np.int64]) -> list[Ranking]:
        """Of scores and indices (B, k), best first; what is not finite was filtered."""
        items, scores = self.vocab.decode(indices), best.tolist()
        rankings = list(map(Ranking, items, scores))
        for row in np.flatnonzero(~np.isfinite(best[:, -1])).tolist():
            count = int(np.isfinite(best[row]).sum())
            rankings[row] = Ranking(items[row][:count], scores[row][:count])
        return rankings

    def recommend(
        self,
        sequences: Sequence[Sequence[str] | NDArray[np.int64]],
        k: int = 10,
        *,
        users: Sequence[Hashable] | None = None,
        counts: Sequence[int] | None = None,
        filter_seen: bool = True,
        blocked: Collection[str] = (),
        allowed: Collection[str] | None = None,
    ) -> list[Ranking | None]:
        """Top-k after each sequence of item ids; None where the window holds no known item.

        Args:
            sequences: item ids, oldest first, or arrays of their indices, 0 for items outside the vocabulary; these are
                left out.
            users: cache under these names, each at most once; None re-encodes.
            counts: how many events each sequence has had in all (it may be cut at the old end).
            filter_seen: leave out the items of the sequence, in the window or before it.
            blocked: item ids that are not recommended to anyone.
            allowed: the only item ids that are; all by default.

        Raises:
            ValueError: k is smaller than 1, a user occurs twice, or users or counts do not fit the sequences.
        """
        for name, given in (("users", users), ("counts", counts)):
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
        exclude = [tokens[i] for i in known] if filter_seen else None
        blocked_indices = self.vocab.encode(blocked)
        allowed_indices = None if allowed is None else [index for index in self.vocab.encode(allowed) if index]
        best = self.top_k(hidden, k, exclude, blocked_indices, allowed_indices, windows)
        for i, ranking in zip(known, best, strict=True):
            rankings[i] = ranking
        return rankings

    def _tokens(self, sequence: Sequence[str] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of item ids, or what are indices already."""
        if isinstance(sequence, np.ndarray) and sequence.dtype == np.int64:
            return sequence
        return np.array(self.vocab.encode(sequence), np.int64)

    def forget(self, users: Collection[Hashable] | None = None) -> None:
        """Give back the slots of these users, or of all."""
        for user in list(self._slots) if users is None else users:
            slot = self._slots.pop(user, None)
            if slot is not None:
                self._free.append(slot.index)

    def _logits(self, hidden: Tensor, windows: Sequence[Indices]) -> Tensor:
        """Scores (B, num_items + 1) of the model, and its reminder on the items of the windows, each once."""
        scores = self.model.logits(hidden)
        if reminded := self._reminded(hidden, windows):
            row = [i for i, items in enumerate(reminded) for _ in items]
            scores[row, [item for items in reminded for item in items]] += self.model.config.reminder
        return scores

    def _reminded(self, hidden: Tensor, windows: Sequence[Indices]) -> list[set[int]]:
        """For each row the items whose scores the reminder raises; nothing where the model has none."""
        if not self.model.config.reminder:
            return []
        if len(windows) != len(hidden):
            raise ValueError(f"{len(hidden)} rows, {len(windows)} windows: a reminder needs the window of each row")
        return [set(np.asarray(window).tolist()) for window in windows]

    def _step(self, batch: Sequence[tuple[Hashable, Indices]]) -> Floats:
        """Encode the windows of at most ``slots`` users, from what is cached of them."""
        work = self._schedule(batch)
        unseen = (row for row in work if row.past < len(row.window))
        for part in _parts(unseen, lambda row: len(row.window) - row.past, PACKED_TOKENS):
            self._forward(part)
        assert self._cache is not None
        hidden: Floats = self._cache.hidden[[row.slot.index for row in work]]
        return hidden

    def _schedule(self, rows: Sequence[tuple[Hashable, Indices]]) -> list[_Work]:
        """For each row its slot, and how much of the window is cached there."""
        for user, _ in rows:  # first, so that no row of this batch evicts another
            if user in self._slots:
                self._slots.move_to_end(user)
        work = []
        hits = 0
        for user, indices in rows:
            window = np.asarray(indices, np.int64)
            tokens = window.tobytes()
            slot = self._slots.get(user) or self._lend(user)
            past = len(slot.tokens) // window.itemsize if tokens.startswith(slot.tokens) else 0
            hits += past > 0
            work.append(_Work(slot, past, window, tokens))
        self._stats.hits += hits
        self._stats.misses += len(work) - hits
        return work

    def _lend(self, user: Hashable) -> _Slot:
        if self._free:
            index = self._free.pop()
        else:
            _, evicted = self._slots.popitem(last=False)
            index = evicted.index
            self._stats.evictions += 1
        slot = self._slots[user] = _Slot(index)
        return slot

    def _forward(self, work: list[_Work]) -> None:
        assert self._packed is not None and self._cache is not None
        for row in work:
            row.slot.tokens = b""  # nothing is trusted of a slot whose forward did not come back
        items = np.concatenate([row.window[row.past :] for row in work])
        slots, past, new = np.array([(row.slot.index, row.past, len(row.window) - row.past) for row in work]).T.copy()
        self._cache.hidden[slots] = self._packed.encode(items, self._cache.held, slots, past, new)
        for row in work:
            row.slot.tokens = row.tokens

    def _encode_windows(self, windows: Sequence[NDArray[np.int64]]) -> Tensor:
        """Whole windows, nothing kept, (B, D)."""
        if not windows:
            return self.model.item_embedding.weight.detach()[:0]
        if self._packed and (_few_threads() or sum(map(len, windows)) <= PACKED_TOKENS):
            parts = [self._packed.encode_windows(part) for part in _parts(windows, len, PACKED_TOKENS)]
            return torch.from_numpy(np.concatenate(parts))
        rows = max(1, PADDED_TOKENS // max(map(len, windows)))
        return torch.cat([self._encode_padded(part) for part in _chunks(windows, rows)])

    @torch.inference_mode()
    def _encode_padded(self, windows: Sequence[NDArray[np.int64]]) -> Tensor:
        items = self.padded(windows)
        last = torch.tensor([len(window) - 1 for window in windows], device=items.device)
        hidden: Tensor = self.model(items, last)
        return hidden

    def padded(self, rows: Sequence[Indices | Collection[int]]) -> Tensor:
        """Windows as the model takes them, (B, T): tokens first, zeros behind."""
        lengths = [len(row) for row in rows]
        items = np.full((len(rows), max(lengths, default=0)), PADDING, np.int64)
        real = np.arange(items.shape[1]) < np.array(lengths)[:, None]  # (B, T)
        if items.size:
            items[real] = one_behind_another(rows)
        return torch.from_numpy(items).to(self.model.item_embedding.weight.device)


def _as_arrays(best: Tensor, indices: Tensor) -> tuple[Floats, NDArray[np.int64]]:
    """Scores and indices; of 16 bits numpy knows too little."""
    return best.cpu().double().numpy(), indices.cpu().numpy()


def _few_threads() -> bool:
    return torch.get_num_threads() <= PACKED_THREADS


def _parts(rows: Iterable[T], tokens: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """What goes through the model at once."""
    part: list[T] = []
    taken = 0
    for row in rows:
        more = tokens(row)
        if part and taken + more > limit:
            yield part
            part, taken = [], 0
        part.append(row)
        taken += more
    if part:
        yield part


def _among(items: Tensor, rows: Tensor) -> Tensor:
    """Which of the items (B, C) are in the same row of ``rows`` (B, R), R at least 1; (B, C)."""
    ordered = rows.sort(1).values
    places = torch.searchsorted(ordered, items).clamp(max=ordered.shape[1] - 1)
    return ordered.gather(1, places) == items


def _chunks(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk
