"""Keys and values of users' windows, kept from click to click, and attention over them.

Rows of a slab, lent to users by the Engine. CachedTokens are the model's tokens (model.py) of users whose prefixes
lie there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sasrec.kernels import PRECISIONS, attend, attention_kernel
from sasrec.model import SASRecConfig


class KVCache:
    """Preallocated slab: (num_blocks, slots, num_heads, keys and values 2, max_len, head_units).

    All that a token attends to in a head lies in two pieces of memory, and is read where it lies.

    Args:
        like: the model's weights, of a precision and on a device that ``supports`` tells.
    """

    def __init__(self, config: SASRecConfig, slots: int, like: Tensor, half: bool = False) -> None:
        head_units = config.hidden_units // config.num_heads
        shape = (config.num_blocks, slots, config.num_heads, 2, config.max_len, head_units)
        # empty, not zeros: the system commits memory only as slots are used
        self.slab = torch.empty(shape, dtype=torch.float16 if half else like.dtype)
        attention_kernel(like.dtype, self.slab.dtype)  # now, and not while a click waits

    @property
    def slots(self) -> int:
        """How many users fit."""
        return self.slab.shape[1]

    @staticmethod
    def supports(config: SASRecConfig, like: Tensor) -> bool:
        """Whether keys stay valid while a window grows, and attention over them is at hand: on a processor."""
        return config.position == "rope" and like.device.type == "cpu" and like.dtype in PRECISIONS

    @staticmethod
    def bytes_per_slot(config: SASRecConfig, like: Tensor, half: bool = False) -> int:
        """Memory one cached user takes."""
        size = torch.float16.itemsize if half else like.element_size()
        return 2 * config.num_blocks * config.max_len * config.hidden_units * size


class CachedTokens:
    """The Tokens (M,) of one forward of users in slots, one behind another, nothing padded.

    Args:
        slots: of each user.
        past: how many tokens of each lie in the cache.
        new: how many follow, at least one.
    """

    def __init__(self, cache: KVCache, slots: list[int], past: list[int], new: list[int]) -> None:
        self._slab = cache.slab
        ends = np.cumsum(new)
        self._slots = np.repeat(slots, new)  # (M,)
        self._places = np.arange(ends[-1]) + np.repeat(np.array(past) - (ends - new), new)  # (M,)
        self._all, self._last = np.arange(ends[-1]), ends - 1  # (M,), (B,)
        self.positions = torch.from_numpy(self._places)
        self._newest = torch.from_numpy(self._last)

    def newest(self, x: Tensor) -> Tensor:
        """(M, ...) -> (B, ...)."""
        return x[self._newest]

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, newest_alone: bool) -> Tensor:
        """Keep the new keys and values, then attend to them and to what was there."""
        asking = self._last if newest_alone else self._all
        return attend(query, key, value, self._slab[block], self._slots, self._places, asking)
