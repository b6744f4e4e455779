"""SASRec's forward without gradients, on a processor: tokens of many users one behind another, nothing padded.

The same weights and the same numbers as model.py's, to rounding, in one call of a compiled kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sasrec.data.vocab import PADDING
from sasrec.inference.kernels import (
    PRECISIONS,
    Floats,
    Held,
    Indices,
    Weights,
    encode,
    panels,
    prepare_encode,
    prepare_rank,
    rank,
)
from sasrec.model import Block, SASRec

Rows = Sequence[Indices | Collection[int]]


class PackedForward:
    """A model's forward over packed tokens. Weights are copied, but for the embedding: later changes do not count.

    Args:
        model: one that ``supports`` tells.
    """

    def __init__(self, model: SASRec) -> None:
        config = model.config
        self.config = config
        self._items, self._scale = model.item_embedding.weight.detach().numpy(), model.item_scale
        self._weights = _weights(model)
        if config.position == "learned":
            self._positions: Floats = model.position_embedding.weight.detach().numpy()
            unturned = np.ones((config.max_len, config.hidden_units // config.num_heads), self._items.dtype)
            self._rotation = unturned, 0 * unturned
        else:
            self._positions = self._items[:0]  # nothing
            cos, sin = model.rotation
            self._rotation = cos.numpy(), sin.numpy()

    @staticmethod
    def supports(model: SASRec) -> bool:
        """Whether it is on a processor, in a precision that kernels calculate with."""
        weight = model.item_embedding.weight
        return weight.device.type == "cpu" and weight.dtype in PRECISIONS

    def prepare(self, held: Held) -> None:
        """Compile what ``encode`` runs, or read it, before something waits for it."""
        prepare_encode(self._items.dtype, held.dtype)

    def encode(self, items: Indices, held: Held, slots: Indices, past: Indices, new: Indices) -> Floats:
        """Keep the keys and values of new tokens, and give the hidden state of each user's newest, (B, D).

        Args:
            items: (M,) indices >= 1, those of a user behind those of the one before him.
            held: (L, slots, H, 2, max_len, Dh), keys and values of each block. Where nothing is kept for later,
                (1, ...) may stand for all blocks.
            slots: (B,) where each user's window lies.
            past: (B,) how many of his tokens lie there; 0 with learned positions, which shift on every click.
            new: (B,) how many of the items follow them, at least one.

        Raises:
            IndexError: an item is not the model's.
        """
        if items.view(np.uint64).max() >= len(self._items):  # the kernel would read on; what is below 0 is large here
            raise IndexError(f"items must be indices of at most {len(self._items) - 1}, and not negative")
        return encode(
            items, self._items, self._scale, self._positions, self._rotation, self._weights, held, slots, past, new
        )

    def encode_windows(self, windows: Sequence[Indices]) -> Floats:
        """Hidden state of each window's newest token, (B, D), with nothing kept.

        Args:
            windows: indices >= 1, oldest first, none empty or longer than max_len.

        Raises:
            IndexError: an item is not the model's.
        """
        lengths = np.array([len(window) for window in windows])
        heads = self.config.num_heads
        shape = (1, len(windows), heads, 2, lengths.max(), self.config.hidden_units // heads)
        held = np.empty(shape, self._items.dtype)
        return self.encode(np.concatenate(windows), held, np.arange(len(windows)), np.zeros_like(lengths), lengths)


def _weights(model: SASRec) -> Weights:
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    norms = [norm for block in blocks for norm in (block.attention_norm, block.feed_forward_norm)] + [model.final_norm]

    def products(layers: Sequence[nn.Module]) -> tuple[Floats, Floats]:
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        weights, biases = ([getattr(layer, name).detach() for layer in linear] for name in ("weight", "bias"))
        return panels(torch.stack(weights).mT.numpy()), torch.stack(biases).numpy()

    return Weights(
        torch.stack([torch.stack((norm.weight, norm.bias)) for norm in norms]).detach().numpy(),
        *products([block.attention.qkv for block in blocks]),
        *products([block.attention.out for block in blocks]),
        *products([block.feed_forward[0] for block in blocks]),
        *products([block.feed_forward[-1] for block in blocks]),
    )


class PackedItems:
    """The items of a small catalogue, for the few best scores of many users; a copy of their embedding.

    Args:
        embedding: (num_items + 1, D), row 0 padding, on a processor, in a precision that kernels calculate with.
    """

    def __init__(self, embedding: Tensor) -> None:
        self._count, self._items = len(embedding), panels(embedding.detach().numpy().T)

    def prepare(self) -> None:
        """Compile what ``top_k`` runs, or read it, before something waits for it."""
        prepare_rank(self._items.dtype)

    def top_k(
        self, hidden: Floats, k: int, exclude: Rows | None, blocked: Collection[int], allowed: Collection[int] | None
    ) -> tuple[Floats, Indices]:
        """Scores and indices of the k best of each row, (B, k); -inf where fewer are left.

        Args:
            hidden: (B, D).
            k: at most ``sasrec.inference.kernels.COLUMNS``.
            exclude: for each row, indices that are left out.
            blocked: indices that are left out of all.
            allowed: the only ones that are not; all by default.

        Raises:
            IndexError: an index is not the model's.
        """
        bias = np.full(self._count, 0 if allowed is None else -np.inf, self._items.dtype)
        if allowed is not None:
            bias[list(allowed)] = 0
        bias[[PADDING, *blocked]] = -np.inf
        ends = np.zeros(len(hidden), np.int64)
        excluded = np.zeros(0, np.int64)
        if exclude is not None and len(hidden):
            excluded = one_behind_another(exclude)
            ends = np.cumsum([len(row) for row in exclude])
            if len(excluded) and excluded.view(np.uint64).max() >= self._count:
                raise IndexError(f"exclude must hold indices of at most {self._count - 1}, and none below 0")
        return rank(np.ascontiguousarray(hidden, self._items.dtype), self._items, bias, excluded, ends, k)


def one_behind_another(rows: Rows) -> Indices:
    """The indices of at least one row in one array."""
    arrays = [row if isinstance(row, np.ndarray) else np.fromiter(row, np.int64, len(row)) for row in rows]
    return np.concatenate(arrays, dtype=np.int64, casting="unsafe")  # an empty array may be one of floats
