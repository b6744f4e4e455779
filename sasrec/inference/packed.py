"""SASRec's forward pass without gradients on a CPU: the tokens of many users concatenated, without padding.

Weights and, to rounding, results are those of model.py; here one call of a compiled kernel computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sasrec.data.vocab import PADDING
from sasrec.inference.blocked import BlockedItems
from sasrec.inference.kernels import (
    PRECISIONS,
    Floats,
    Indices,
    KeyValues,
    Weights,
    encode,
    prepare_encode,
    prepare_rank,
    rank,
    weight_tiles,
)
from sasrec.model import Block, SASRec

T = TypeVar("T")
Rows = Sequence[Sequence[int] | Indices | Collection[int]]

# Kernels run in one thread. With more threads than this, PyTorch is faster on large batches.
PACKED_THREADS = 2


def few_threads() -> bool:
    """Return whether kernels are faster than PyTorch, whatever the size of a batch."""
    return torch.get_num_threads() <= PACKED_THREADS


class PackedForward:
    """A model's forward pass over packed tokens.

    The weights are copied, except the embedding: later changes of the model have no effect.

    Args:
        model: one for which ``supports`` is true.
    """

    def __init__(self, model: SASRec) -> None:
        config = model.config
        self.config = config
        self._items, self._scale = model.item_embedding.weight.detach().numpy(), model.item_scale
        self._weights = _weights(model)
        if config.position == "learned":
            self._positions: Floats = model.position_embedding.weight.detach().numpy()
            ones = np.ones((config.max_len, config.hidden_units // config.num_heads), self._items.dtype)
            self._rotation = ones, 0 * ones  # by an angle of 0
        else:
            self._positions = self._items[:0]  # nothing
            cos, sin = model.rotation
            self._rotation = cos.numpy(), sin.numpy()

    @staticmethod
    def supports(model: SASRec) -> bool:
        """Return whether the model is on a CPU, in a precision that the kernels know."""
        weight = model.item_embedding.weight
        return weight.device.type == "cpu" and weight.dtype in PRECISIONS

    def prepare(self, key_values: KeyValues) -> None:
        """Compile the kernel of ``encode``, or load it from disk, so that no click waits for it."""
        prepare_encode(self._items.dtype, key_values.dtype)

    def encode(self, items: Indices, key_values: KeyValues, slots: Indices, past: Indices, new: Indices) -> Floats:
        """Store the keys and values of new tokens; return the hidden state of each user's newest token, (B, D).

        Args:
            items: (M,) indices >= 1, the tokens of all users concatenated.
            key_values: (L, slots, H, 2, max_len, Dh), keys and values of each block. Where they are not needed later,
                (1, ...) may serve all blocks in turn.
            slots: (B,) the slot of each user's window.
            past: (B,) tokens of each user that their slot holds; 0 with learned positions, which shift on every click.
            new: (B,) tokens of each user in ``items``, at least one.

        Raises:
            IndexError: an item is outside the model's vocabulary.
        """
        # the kernel does not check its indices; as unsigned numbers, negative ones are too large as well
        if items.view(np.uint64).max() >= len(self._items):
            raise IndexError(f"items must be indices of at most {len(self._items) - 1}, and not negative")
        return encode(
            items,
            self._items,
            self._scale,
            self._positions,
            self._rotation,
            self._weights,
            key_values,
            slots,
            past,
            new,
        )

    def encode_windows(self, windows: Sequence[Indices]) -> Floats:
        """Return the hidden state of each window's newest token, (B, D), without caching anything.

        Args:
            windows: indices >= 1, oldest first, none empty or longer than max_len.

        Raises:
            IndexError: an item is outside the model's vocabulary.
        """
        lengths = np.array([len(window) for window in windows])
        heads = self.config.num_heads
        shape = (1, len(windows), heads, 2, lengths.max(), self.config.hidden_units // heads)
        key_values = np.empty(shape, self._items.dtype)
        return self.encode(
            np.concatenate(windows), key_values, np.arange(len(windows)), np.zeros_like(lengths), lengths
        )


def _weights(model: SASRec) -> Weights:
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    norms = [norm for block in blocks for norm in (block.attention_norm, block.feed_forward_norm)] + [model.final_norm]

    def products(layers: Sequence[nn.Module]) -> tuple[Floats, Floats]:
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        weights = torch.stack([layer.weight.detach() for layer in linear])
        biases = torch.stack([layer.bias.detach() for layer in linear])
        return weight_tiles(weights.mT.numpy()), biases.numpy()

    return Weights(
        torch.stack([torch.stack((norm.weight, norm.bias)) for norm in norms]).detach().numpy(),
        *products([block.attention.qkv for block in blocks]),
        *products([block.attention.out for block in blocks]),
        *products([block.feed_forward[0] for block in blocks]),
        *products([block.feed_forward[-1] for block in blocks]),
    )


class PackedItems:
    """A copy of a small catalogue's embedding, laid out for the top-k kernel.

    Args:
        embedding: (num_items + 1, D), row 0 padding, on a CPU, in a precision that the kernels know.
    """

    def __init__(self, embedding: Tensor) -> None:
        self._count, self._items = len(embedding), weight_tiles(embedding.detach().numpy().T)

    def prepare(self) -> None:
        """Compile the kernel of ``top_k``, or load it from disk, so that no click waits for it."""
        prepare_rank(self._items.dtype)

    def top_k(
        self, hidden: Floats, k: int, exclude: Rows | None, blocked: BlockedItems, allowed: Collection[int] | None
    ) -> tuple[Floats, Indices]:
        """Return scores and indices of the k best items of each row, (B, k); -inf where fewer items are left.

        Args:
            hidden: (B, D).
            k: at most ``sasrec.inference.kernels.COLUMNS``.
            exclude: for each row, indices to leave out.
            blocked: items to leave out of all rows.
            allowed: the only indices to choose from; all by default.

        Raises:
            IndexError: an index is outside the model's vocabulary.
        """
        bias = np.full(self._count, 0 if allowed is None else -np.inf, self._items.dtype)
        if allowed is not None:
            bias[list(allowed)] = 0
        if blocked.count:
            bias[blocked.mask] = -np.inf
        bias[PADDING] = -np.inf
        ends = np.zeros(len(hidden), np.int64)
        excluded = np.zeros(0, np.int64)
        if exclude is not None and len(hidden):
            excluded = concatenate_rows(exclude)
            ends = np.cumsum([len(row) for row in exclude])
            if len(excluded) and excluded.view(np.uint64).max() >= self._count:
                raise IndexError(f"exclude must hold indices of at most {self._count - 1}, and none below 0")
        return rank(np.ascontiguousarray(hidden, self._items.dtype), self._items, bias, excluded, ends, k)


def concatenate_rows(rows: Rows) -> Indices:
    """Return the indices of all rows in one array; at least one row must be given."""
    arrays = [row if isinstance(row, np.ndarray) else np.fromiter(row, np.int64, len(row)) for row in rows]
    return np.concatenate(arrays, dtype=np.int64, casting="unsafe")  # an empty array may be one of floats


def pad_rows(rows: Rows, device: torch.device) -> Tensor:
    """Return rows of indices as the model takes them, (B, T): a row's indices first, zeros behind them."""
    lengths = [len(row) for row in rows]
    items = np.full((len(rows), max(lengths, default=0)), PADDING, np.int64)
    real = np.arange(items.shape[1]) < np.array(lengths)[:, None]  # (B, T)
    if items.size:
        items[real] = concatenate_rows(rows)
    return torch.from_numpy(items).to(device)


def batches_of_tokens(rows: Iterable[T], tokens: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Divide rows into batches of at most ``limit`` tokens; a longer row is a batch of its own."""
    batch: list[T] = []
    total = 0
    for row in rows:
        more = tokens(row)
        if batch and total + more > limit:
            yield batch
            batch, total = [], 0
        batch.append(row)
        total += more
    if batch:
        yield batch
