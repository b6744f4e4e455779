"""Cached keys and values of users' windows.

``KVCache`` is the memory: one preallocated slab, divided into slots. ``SlotManager`` lends the slots to users and
remembers which tokens each slot holds.

Keys and values at a position depend on the tokens up to it and on nothing else. So a slot is valid for a window exactly
when its tokens are a prefix of that window, whatever crashed, moved or was lost before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.inference.kernels import Floats, KeyValues
from sasrec.model import SASRecConfig

Indices = Sequence[int] | NDArray[np.int64]


class KVCache:
    """A slab of shape (num_blocks, slots, num_heads, keys and values 2, max_len, head_units).

    In each head, all keys of a slot are contiguous in memory, and so are all values: attention reads them in place.

    Args:
        like: the model's weights, on a CPU; keys and values have their precision.
        half: store float16.
    """

    def __init__(self, config: SASRecConfig, slots: int, like: Tensor, half: bool = False) -> None:
        head_units = config.hidden_units // config.num_heads
        shape = (config.num_blocks, slots, config.num_heads, 2, config.max_len, head_units)
        # empty, not zeros: the operating system commits memory only as slots are used
        slab = torch.empty(shape, dtype=torch.float16 if half else like.dtype)
        self.slots = slots
        self.key_values: KeyValues = (slab.view(torch.uint16) if half else slab).numpy()
        # (slots, D), the hidden state of each slot's newest token
        self.hidden: Floats = torch.empty((slots, config.hidden_units), dtype=like.dtype).numpy()

    @staticmethod
    def bytes_per_slot(config: SASRecConfig, like: Tensor, half: bool = False) -> int:
        """Return the memory that one cached user takes, in bytes."""
        size = torch.float16.itemsize if half else like.element_size()
        return 2 * config.num_blocks * config.max_len * config.hidden_units * size


@dataclass
class CacheStats:
    """Counts of a cache's work since they were last taken."""

    hits: int = 0  # windows that continued a cached prefix
    misses: int = 0  # windows encoded whole: a new user, a jump, an eviction
    evictions: int = 0


@dataclass
class Slot:
    """A row of the cache, and the tokens whose keys and values it holds."""

    index: int
    tokens: bytes = b""  # the bytes of an int64 array: prefixes are then compared at the speed of memory


class ScheduledWindow(NamedTuple):
    """A user's window and the slot for it, which holds ``window[:past]`` already."""

    slot: Slot
    past: int
    window: NDArray[np.int64]
    tokens: bytes  # of the window


class SlotManager:
    """Lends slots to users; when all are lent, the least recently used user loses theirs."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots))
        self._lent: OrderedDict[Hashable, Slot] = OrderedDict()  # least recently used first
        self._stats = CacheStats()

    @property
    def cached_users(self) -> int:
        """The number of users who have a slot."""
        return len(self._lent)

    def take_stats(self) -> CacheStats:
        """Return the counts since the last call, and start new ones."""
        stats, self._stats = self._stats, CacheStats()
        return stats

    def schedule(self, rows: Sequence[tuple[Hashable, Indices]]) -> list[ScheduledWindow]:
        """Find a slot for each user's window, and how much of the window the slot holds.

        Args:
            rows: at most ``slots`` users, each once, with their windows.
        """
        for user, _ in rows:  # before any slot is lent, so that no user of this batch evicts another
            if user in self._lent:
                self._lent.move_to_end(user)
        scheduled = []
        hits = 0
        for user, indices in rows:
            window = np.asarray(indices, np.int64)
            tokens = window.tobytes()
            slot = self._lent.get(user) or self._lend(user)
            past = len(slot.tokens) // window.itemsize if tokens.startswith(slot.tokens) else 0
            hits += past > 0
            scheduled.append(ScheduledWindow(slot, past, window, tokens))
        self._stats.hits += hits
        self._stats.misses += len(scheduled) - hits
        return scheduled

    def release(self, users: Collection[Hashable] | None = None) -> None:
        """Release the slots of these users, or of all users."""
        for user in list(self._lent) if users is None else users:
            slot = self._lent.pop(user, None)
            if slot is not None:
                self._free.append(slot.index)

    def _lend(self, user: Hashable) -> Slot:
        if self._free:
            index = self._free.pop()
        else:
            _, evicted = self._lent.popitem(last=False)
            index = evicted.index
            self._stats.evictions += 1
        slot = self._lent[user] = Slot(index)
        return slot
