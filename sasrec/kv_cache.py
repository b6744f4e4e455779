"""Keys and values of users' windows, kept from click to click, and the forward of tokens behind them.

Rows of a slab, lent to users by the Engine. What goes through is SASRec.forward once more, for tokens of many users one
behind another, nothing padded, without gradients: matrix products by PyTorch, what is between them by compiled kernels.
Module by module, one token costs 480 microseconds, nearly all of them calls; here 120.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sasrec.kernels import PRECISIONS, Floats, add_norm, attend, gelu_, prepare
from sasrec.model import Block, SASRec, SASRecConfig


class _Norm(NamedTuple):
    weight: Floats  # (D,)
    bias: Floats  # (D,)
    eps: float

    @classmethod
    def of(cls, layer: nn.LayerNorm) -> _Norm:
        return cls(layer.weight.detach().numpy(), layer.bias.detach().numpy(), layer.eps)


class _Linear(NamedTuple):
    weight: Tensor  # (inputs, outputs)
    bias: Tensor  # (outputs,)

    @classmethod
    def of(cls, layer: nn.Linear) -> _Linear:
        return cls(layer.weight.detach().T, layer.bias.detach())

    def product(self, x: Floats) -> Floats:
        """(M, inputs) -> (M, outputs)."""
        out: Floats = torch.addmm(self.bias, torch.from_numpy(x), self.weight).numpy()
        return out


class _Layers(NamedTuple):
    """What a block is made of."""

    attention_norm: _Norm
    query_key_value: _Linear
    attention_out: _Linear
    feed_forward_norm: _Norm
    feed_forward_in: _Linear
    feed_forward_out: _Linear

    @classmethod
    def of(cls, block: nn.Module) -> _Layers:
        assert isinstance(block, Block)
        attention, (inner, *_, outer) = block.attention, block.feed_forward
        assert isinstance(inner, nn.Linear) and isinstance(outer, nn.Linear)
        return cls(
            _Norm.of(block.attention_norm),
            _Linear.of(attention.qkv),
            _Linear.of(attention.out),
            _Norm.of(block.feed_forward_norm),
            _Linear.of(inner),
            _Linear.of(outer),
        )


class KVCache:
    """Preallocated slab: (num_blocks, slots, num_heads, keys and values 2, max_len, head_units).

    All that a token attends to in a head lies in two pieces of memory, and is read where it lies.

    Args:
        model: one that ``supports`` tells; its weights are not copied.
        half: keep float16.
    """

    def __init__(self, model: SASRec, slots: int, half: bool = False) -> None:
        config = model.config
        head_units = config.hidden_units // config.num_heads
        shape = (config.num_blocks, slots, config.num_heads, 2, config.max_len, head_units)
        items = model.item_embedding.weight.detach()
        # empty, not zeros: the system commits memory only as slots are used
        self.slab = torch.empty(shape, dtype=torch.float16 if half else items.dtype)
        self._held = list((self.slab.view(torch.uint16) if half else self.slab).numpy())  # of each block
        self._items, self._scale = items.numpy(), model.item_scale
        self._cos, self._sin = (table.numpy() for table in model.rotation)
        self._blocks = [_Layers.of(block) for block in model.blocks]
        self._norms = [layers.attention_norm for layers in self._blocks] + [_Norm.of(model.final_norm)]
        prepare(self._items.dtype, self._held[0].dtype)

    @property
    def slots(self) -> int:
        """How many users fit."""
        return self.slab.shape[1]

    @staticmethod
    def supports(config: SASRecConfig, like: Tensor) -> bool:
        """Whether keys stay valid while a window grows, and kernels are at hand: on a processor.

        Args:
            like: the model's weights.
        """
        return config.position == "rope" and like.device.type == "cpu" and like.dtype in PRECISIONS

    @staticmethod
    def bytes_per_slot(config: SASRecConfig, like: Tensor, half: bool = False) -> int:
        """Memory one cached user takes."""
        size = torch.float16.itemsize if half else like.element_size()
        return 2 * config.num_blocks * config.max_len * config.hidden_units * size

    def encode(self, items: NDArray[np.int64], slots: Sequence[int], past: Sequence[int], new: Sequence[int]) -> Tensor:
        """Keep the keys and values of new tokens, and give the hidden state of each user's newest, (B, D).

        Args:
            items: (M,) indices >= 1, those of a user behind those of the one before him.
            slots: (B,) where each user's window lies.
            past: (B,) how many of his tokens lie there.
            new: (B,) how many of the items follow them, at least one.

        Raises:
            IndexError: an item is not the model's.
        """
        if items.view(np.uint64).max() >= len(self._items):  # a kernel would read on; what is below 0 is large here
            raise IndexError(f"items must be indices of at most {len(self._items) - 1}, and not negative")
        ends = np.cumsum(new)
        of = np.repeat(slots, new)  # (M,)
        every = np.arange(len(items))
        places = every + np.repeat(np.array(past) - (ends - new), new)  # (M,)
        x, normed = add_norm(self._items, items, self._scale, self._items[:0], *self._norms[0])  # (M, D) each
        for layers, held, next_norm in zip(self._blocks, self._held, self._norms[1:], strict=True):
            # the last block does no more than each user's newest token
            asking = ends - 1 if layers is self._blocks[-1] else every
            heads = layers.query_key_value.product(normed).reshape(len(items), 3, held.shape[1], held.shape[4])
            attended = attend(heads, self._cos, self._sin, held, of, places, asking)
            x, normed = add_norm(x, asking, 1.0, layers.attention_out.product(attended), *layers.feed_forward_norm)
            inner = gelu_(layers.feed_forward_in.product(normed))
            x, normed = add_norm(x, every[: len(x)], 1.0, layers.feed_forward_out.product(inner), *next_norm)
        return torch.from_numpy(normed)
