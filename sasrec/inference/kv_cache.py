"""Keys and values of users' windows, kept from click to click: rows of a slab, lent to users by the Engine."""

from __future__ import annotations

import torch
from torch import Tensor

from sasrec.inference.kernels import Floats, Held
from sasrec.model import SASRecConfig


class KVCache:
    """Preallocated slab: (num_blocks, slots, num_heads, keys and values 2, max_len, head_units).

    All that a token attends to in a head lies in two pieces of memory, and is read where it lies.

    Args:
        like: the model's weights, on a processor; keys are kept in their precision.
        half: keep float16.
    """

    def __init__(self, config: SASRecConfig, slots: int, like: Tensor, half: bool = False) -> None:
        head_units = config.hidden_units // config.num_heads
        shape = (config.num_blocks, slots, config.num_heads, 2, config.max_len, head_units)
        # empty, not zeros: the system commits memory only as slots are used
        slab = torch.empty(shape, dtype=torch.float16 if half else like.dtype)
        self.slots = slots
        self.hidden: Floats = torch.empty(
            (slots, config.hidden_units), dtype=like.dtype
        ).numpy()  # newest tokens' states
        self.held: Held = (slab.view(torch.uint16) if half else slab).numpy()

    @staticmethod
    def bytes_per_slot(config: SASRecConfig, like: Tensor, half: bool = False) -> int:
        """Memory one cached user takes."""
        size = torch.float16.itemsize if half else like.element_size()
        return 2 * config.num_blocks * config.max_len * config.hidden_units * size
