"""Keys and values of users' windows, kept from click to click, and attention over them.

Rows of a slab, lent to users by the Engine. CachedTokens are the model's tokens (model.py) of users whose prefixes
lie there.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec.model import SASRecConfig, attention

# Keys and values gathered at once: they stay in the processor's cache until attention has read them.
GATHERED_BYTES = 3_000_000


class KVCache:
    """Preallocated slab: (num_blocks, slots, max_len, keys and values 2, num_heads, head_units).

    All that a row of a batch needs of a block lies in one piece of memory, and is gathered by one copy.
    """

    def __init__(self, config: SASRecConfig, slots: int, like: Tensor, half: bool = False) -> None:
        head_units = config.hidden_units // config.num_heads
        shape = (config.num_blocks, slots, config.max_len, 2, config.num_heads, head_units)
        # empty, not zeros: the system commits memory only as slots are used
        self.slab = torch.empty(shape, dtype=torch.float16 if half else like.dtype, device=like.device)
        self._rows = self.slab.flatten(2)  # (num_blocks, slots, numbers of a slot)
        self._scratch = self.slab.new_empty(0)

    @property
    def slots(self) -> int:
        """How many users fit."""
        return self.slab.shape[1]

    def write(self, block: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values, (M, H, Dh) each, at places (M,): ``slot * max_len + position``."""
        kept = torch.stack((keys, values), dim=1).to(self.slab.dtype)
        self.slab[block].flatten(0, 1).index_copy_(0, places, kept)

    def gather(self, block: int, slots: Tensor, length: int) -> Tensor:
        """The first keys and values of these slots, (B, length, 2, H, Dh), until the next call."""
        a_user = length * self.slab.stride(2)  # numbers, in one piece
        if self._scratch.numel() < len(slots) * a_user:
            # kept: the system takes longer to hand out fresh memory than to fill it
            self._scratch = self.slab.new_empty(len(slots) * self._rows.shape[2])
        held = self._scratch[: len(slots) * a_user].view(len(slots), a_user)
        torch.index_select(self._rows[block, :, :a_user], 0, slots, out=held)
        return held.view(len(slots), length, *self.slab.shape[3:])

    def clear(self, slot: int) -> None:
        """Zero a slot: a masked row weighs 0, but 0 times what uninitialised memory may hold (NaN) is NaN."""
        self.slab[:, slot] = 0

    @staticmethod
    def bytes_per_slot(config: SASRecConfig, like: Tensor, half: bool = False) -> int:
        """Memory one cached user takes."""
        size = torch.float16.itemsize if half else like.element_size()
        return 2 * config.num_blocks * config.max_len * config.hidden_units * size


class _Group:
    """Users of one forward who are alike; their tokens lie one behind another, and are padded for attention alone.

    Args:
        last: (B,) where the users' newest tokens are among the forward's.
        first: where the first token of all is.
    """

    def __init__(self, slots: list[int], past: list[int], new: list[int], last: Tensor, first: int) -> None:
        device = last.device
        self.slots = torch.tensor(slots, device=device)  # (B,)
        self.cached = past[0] > 0
        self.last = last
        self._own = slice(first, first + sum(new))
        self._shape = len(new), max(new)
        counts, behind = np.array(new), np.array(past)
        self._real: Tensor | None = None  # (B, T) where they are of different numbers
        if min(new) < max(new):
            self._real = torch.from_numpy(np.arange(max(new)) < counts[:, None]).to(device)
        self.length = int((behind + counts).max())  # of the longest window
        # what tokens may attend to, (B, T, L), each user's newest (B, 1, L)
        self.newest_mask = _reach((behind + counts - 1)[:, None], self.length).to(device)
        self.mask: Tensor | None = None  # whole windows are causal
        if self.cached and max(new) == 1:
            self.mask = self.newest_mask
        elif self.cached:
            self.mask = _reach(behind[:, None] + np.arange(max(new)), self.length).to(device)

    def pad(self, x: Tensor) -> Tensor:
        """(M, ...) of the forward -> (B, T, ...), zeros behind."""
        own = x[self._own]
        if self._real is None:
            return own.view(*self._shape, *x.shape[1:])
        padded = x.new_zeros(*self._shape, *x.shape[1:])
        padded[self._real] = own
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        """Back to the users' own tokens, one behind another."""
        return x.flatten(0, 1) if self._real is None else x[self._real]


class CachedTokens:
    """The Tokens (M,) of one forward of users in slots: those that continue a cached prefix first, then whole windows.

    All go through the model together, unpadded; attention alone tells the two apart.
    """

    def __init__(self, cache: KVCache, slots: list[int], past: list[int], new: list[int]) -> None:
        self._cache = cache
        device = cache.slab.device
        ends = np.cumsum(new)
        begins = ends - new
        positions = np.arange(ends[-1]) + np.repeat(np.array(past) - begins, new)
        self.positions = torch.from_numpy(positions).to(device)  # (M,)
        places = np.repeat(slots, new) * cache.slab.shape[2] + positions
        self._places = torch.from_numpy(places).to(device)  # (M,) in the cache
        self._newest = torch.from_numpy(ends - 1).to(device)  # (B,)
        continued = sum(p > 0 for p in past)
        longest = max((p + n for p, n in zip(past[:continued], new, strict=False)), default=1)
        users = max(1, GATHERED_BYTES // (longest * cache.slab[0, 0, 0].nbytes))
        bounds = [*range(0, continued, users), continued, len(new)]
        self._groups = [
            _Group(slots[begin:end], past[begin:end], new[begin:end], self._newest[begin:end], int(begins[begin]))
            for begin, end in pairwise(bounds)
            if begin < end
        ]

    def newest(self, x: Tensor) -> Tensor:
        """(M, ...) -> (B, ...)."""
        return x[self._newest]

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, newest_alone: bool) -> Tensor:
        """Keep the new keys and values, then attend to them and to what was there."""
        self._cache.write(block, self._places, key, value)
        parts = []
        for group in self._groups:
            if group.cached:
                held = self._cache.gather(block, group.slots, group.length).to(key.dtype)
                keys, values = held[:, :, 0], held[:, :, 1]  # (B, L, H, Dh)
            else:
                keys, values = group.pad(key), group.pad(value)
            if newest_alone:
                parts.append(attention(query[group.last][:, None], keys, values, group.newest_mask)[:, 0])
            else:
                parts.append(group.unpad(attention(group.pad(query), keys, values, group.mask)))
        return torch.cat(parts)


def _reach(places: NDArray[np.int64], length: int) -> Tensor:
    """(B, T) places of tokens -> (B, T, length): True up to the token's own."""
    return torch.from_numpy(np.arange(length) <= places[..., None])
