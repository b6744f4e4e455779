"""SASRec's forward without gradients, on a processor: tokens of many users one behind another, nothing padded.

The same weights and the same numbers as model.py's, to rounding: matrix products by PyTorch, what is between them by
compiled kernels. Module by module one token costs 480 microseconds, nearly all of them calls; here 120. Windows of 37
tokens take two thirds of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sasrec.kernels import PRECISIONS, Floats, Held, add_norm, attend, gelu_, prepare
from sasrec.model import Block, SASRec


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


class PackedForward:
    """A model's forward over packed tokens; its weights are not copied.

    Args:
        model: one that ``supports`` tells.
    """

    def __init__(self, model: SASRec) -> None:
        config = model.config
        self.config = config
        self._items, self._scale = model.item_embedding.weight.detach().numpy(), model.item_scale
        self._blocks = [_Layers.of(block) for block in model.blocks]
        self._norms = [layers.attention_norm for layers in self._blocks] + [_Norm.of(model.final_norm)]
        self._positions: Floats | None = None
        if config.position == "learned":
            self._positions = model.position_embedding.weight.detach().numpy()
            unturned = np.ones((config.max_len, config.hidden_units // config.num_heads), self._items.dtype)
            self._cos, self._sin = unturned, 0 * unturned
        else:
            self._cos, self._sin = (table.numpy() for table in model.rotation)

    @staticmethod
    def supports(model: SASRec) -> bool:
        """Whether it is on a processor, in a precision that kernels calculate with."""
        weight = model.item_embedding.weight
        return weight.device.type == "cpu" and weight.dtype in PRECISIONS

    def prepare(self, held: Held) -> None:
        """Compile what ``encode`` runs, or read it, before something waits for it."""
        prepare(self._items.dtype, held.dtype)

    def encode(
        self,
        items: NDArray[np.int64],
        held: Sequence[Held],
        slots: Sequence[int],
        past: Sequence[int],
        new: Sequence[int],
    ) -> Tensor:
        """Keep the keys and values of new tokens, and give the hidden state of each user's newest, (B, D).

        Args:
            items: (M,) indices >= 1, those of a user behind those of the one before him.
            held: of each block (slots, H, 2, max_len, Dh), keys and values. Where nothing is kept for later, one array
                may stand for all blocks.
            slots: (B,) where each user's window lies.
            past: (B,) how many of his tokens lie there; 0 with learned positions, which shift on every click.
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
        added = self._items[:0]  # nothing
        if self._positions is not None:  # the newest token of a window is at max_len - 1
            added = self._positions[places + np.repeat(self.config.max_len - np.array(new), new)]
        x, normed = add_norm(self._items, items, self._scale, added, *self._norms[0])  # (M, D) each
        for layers, own, next_norm in zip(self._blocks, held, self._norms[1:], strict=True):
            # the last block does no more than each user's newest token
            asking = ends - 1 if layers is self._blocks[-1] else every
            heads = layers.query_key_value.product(normed).reshape(len(items), 3, own.shape[1], own.shape[4])
            attended = attend(heads, self._cos, self._sin, own, of, places, asking)
            x, normed = add_norm(x, asking, 1.0, layers.attention_out.product(attended), *layers.feed_forward_norm)
            inner = gelu_(layers.feed_forward_in.product(normed))
            x, normed = add_norm(x, every[: len(x)], 1.0, layers.feed_forward_out.product(inner), *next_norm)
        return torch.from_numpy(normed)

    def encode_windows(self, windows: Sequence[NDArray[np.int64]]) -> Tensor:
        """Hidden state of each window's newest token, (B, D), with nothing kept.

        Args:
            windows: indices >= 1, oldest first, none empty or longer than max_len.

        Raises:
            IndexError: an item is not the model's.
        """
        lengths = [len(window) for window in windows]
        heads = self.config.num_heads
        shape = (len(windows), heads, 2, max(lengths), self.config.hidden_units // heads)
        held = np.empty(shape, self._items.dtype)
        every = range(len(windows))
        return self.encode(np.concatenate(windows), [held] * len(self._blocks), every, [0] * len(windows), lengths)
