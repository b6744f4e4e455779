"""What PyTorch has no fast operation for on a processor, compiled by numba: attention over cached keys and values,
and the few best of many scores.

A kernel is compiled when it is first wanted, once for each precision, and kept on disk where numba may write (beside
this file or in the user's cache folder), so that the next process need not wait a second for each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload, register_jitable
from numpy.typing import NDArray
from torch import Tensor

# Sums in any order, so that they are done in vector registers.
FAST_SUMS = {"reassoc", "contract", "arcp", "nsz", "nnan"}
PRECISIONS: dict[torch.dtype, Any] = {torch.float32: types.float32, torch.float64: types.float64}
STORED: dict[torch.dtype, Any] = PRECISIONS | {torch.float16: types.uint16}  # no processor calculates with 16 bits

# Rows of scores are looked through in so many columns, and then in so many neighbours at once.
COLUMNS, NEIGHBOURS = 64, 16


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: Tensor,
    slots: NDArray[np.int64],
    places: NDArray[np.int64],
    asking: NDArray[np.int64],
) -> Tensor:
    """Keep the keys and values of new tokens, then attend from some of them to all that their slots hold up to them.

    Args:
        query: (M, H, Dh), as key and value, float32 or float64.
        held: (slots, H, 2, max_len, Dh), in one piece, of the same precision or float16.
        slots: (M,) whose token each is.
        places: (M,) where in its slot it stands; what is before it has been kept, or is among these tokens.
        asking: (B,) which tokens attend.

    Returns:
        (B, H, Dh).
    """
    kept = [x.to(held.dtype).numpy() for x in (key, value)]
    rows = held.numpy()
    if held.dtype == torch.float16:
        kept, rows = [x.view(np.uint16) for x in kept], rows.view(np.uint16)
    out = torch.empty((len(asking), *query.shape[1:]), dtype=query.dtype)
    attention_kernel(query.dtype, held.dtype)(query.numpy(), *kept, rows, slots, places, asking, out.numpy())
    return out


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What ``torch.topk`` gives of scores (B, N), values and indices (B, k), best first; of equal ones the first.

    What is not a number is not among them; where fewer than k are above -inf, the rest is -inf.
    """
    if k > COLUMNS or scores.dtype not in PRECISIONS or scores.device.type != "cpu":
        best = scores.topk(k)
        return best.values, best.indices
    values = scores.new_empty(len(scores), k)
    indices = torch.empty(len(scores), k, dtype=torch.int64)
    _top_k_kernel(scores.dtype)(scores.contiguous().numpy(), values.numpy(), indices.numpy())
    return values, indices


@functools.cache
def attention_kernel(precision: torch.dtype, stored: torch.dtype) -> Callable[..., None]:
    """What ``attend`` runs for queries and held keys of these precisions; compiled or read when first asked for."""
    number, kept, whole = PRECISIONS[precision], STORED[stored], types.int64[::1]
    new, held, out = kept[:, :, :], kept[:, :, :, :, ::1], number[:, :, ::1]
    signature = types.void(number[:, :, :], new, new, held, whole, whole, whole, out)
    return _compiled(_attend, signature, fastmath=FAST_SUMS)


@functools.cache
def _top_k_kernel(precision: torch.dtype) -> Callable[..., None]:
    number = PRECISIONS[precision]
    return _compiled(_top_k, types.void(number[:, ::1], number[:, ::1], types.int64[:, ::1]))


def _compiled(function: Callable[..., None], signature: Any, **options: Any) -> Callable[..., None]:
    # the signature is given: a batch of one has another memory layout, and a click would wait for the compiler
    options |= {"nogil": True, "error_model": "numpy"}
    kernel: Callable[..., None]
    try:
        kernel = numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # there is no folder that numba may write to
        kernel = numba.njit(signature, **options)(function)
    return kernel


def _attend(query: Any, key: Any, value: Any, held: Any, slots: Any, places: Any, asking: Any, out: Any) -> None:
    heads, units = query.shape[1:]
    for token in range(len(slots)):
        for head in range(heads):
            own = held[slots[token], head]
            for unit in range(units):
                own[0, places[token], unit] = key[token, head, unit]
                own[1, places[token], unit] = value[token, head, unit]
    zero = out.dtype.type(0)
    scale = out.dtype.type(1 / math.sqrt(units))
    weights = np.empty(held.shape[3], out.dtype)
    asked, mixed = np.empty(units, out.dtype), np.empty(units, out.dtype)
    for row in range(len(asking)):
        token = asking[row]
        length = places[token] + 1
        for head in range(heads):
            keys, values = held[slots[token], head, 0], held[slots[token], head, 1]
            for unit in range(units):
                asked[unit] = query[token, head, unit] * scale
            for group in range(length // 4):  # four at once, or it waits for its sums
                at = 4 * group
                one, two, three, four = zero, zero, zero, zero
                for unit in range(units):
                    one += asked[unit] * _number(keys[at, unit])
                    two += asked[unit] * _number(keys[at + 1, unit])
                    three += asked[unit] * _number(keys[at + 2, unit])
                    four += asked[unit] * _number(keys[at + 3, unit])
                weights[at], weights[at + 1], weights[at + 2], weights[at + 3] = one, two, three, four
            for at in range(length // 4 * 4, length):
                one = zero
                for unit in range(units):
                    one += asked[unit] * _number(keys[at, unit])
                weights[at] = one
            largest = weights[0]
            for at in range(length):
                largest = max(largest, weights[at])
            total = zero
            for at in range(length):
                weight = _exp(weights[at] - largest)
                weights[at] = weight
                total += weight
            for unit in range(units):
                mixed[unit] = zero
            for group in range(length // 4):
                at = 4 * group
                one, two, three, four = weights[at], weights[at + 1], weights[at + 2], weights[at + 3]
                for unit in range(units):
                    mixed[unit] += (
                        one * _number(values[at, unit])
                        + two * _number(values[at + 1, unit])
                        + three * _number(values[at + 2, unit])
                        + four * _number(values[at + 3, unit])
                    )
            for at in range(length // 4 * 4, length):
                one = weights[at]
                for unit in range(units):
                    mixed[unit] += one * _number(values[at, unit])
            for unit in range(units):
                out[row, head, unit] = mixed[unit] / total


def _number(kept: Any) -> Any:
    """What to calculate with: a number as it is, or what uint16 says of float16."""


@overload(_number, inline="always", strict=False)
def _(kept: Any) -> Any:
    if kept != types.uint16:
        return lambda kept: kept

    def widened(kept: Any) -> Any:
        # exponent and mantissa where float32 has them, and 112 added to the exponent by a product: exact
        half = np.uint32(kept)
        bits = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
        return np.uint32(bits).view(np.float32) * np.float32(2.0**112)

    return widened


def _exp(x: Any) -> Any:
    """The exponential of what is at most 0."""


@overload(_exp, inline="always", strict=False)
def _(x: Any) -> Any:
    if x != types.float32:
        return lambda x: math.exp(x)

    def vectorised(x: Any) -> Any:
        # 2 to a whole number, put into the exponent, times e to what is left, within 0.35: a Taylor series is as
        # exact as float32 there; the library's function is called number by number, in ten times the time
        doublings = max(x * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(doublings + np.float32(0.5))
        rest = (doublings - whole) * np.float32(0.6931471805599453)
        square = rest * rest
        low = np.float32(1) + rest + square * (np.float32(1 / 2) + rest * np.float32(1 / 6))
        series = low + square * square * (
            np.float32(1 / 24) + rest * np.float32(1 / 120) + square * np.float32(1 / 720)
        )
        return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)

    return vectorised


def _top_k(scores: Any, values: Any, indices: Any) -> None:
    """Any k columns' best are k scores: what is below the least of the best of them is not looked at twice."""
    count, k = scores.shape[1], values.shape[1]
    least = scores.dtype.type(-np.inf)
    best_of = np.empty(COLUMNS, scores.dtype)
    promising = np.empty(count // NEIGHBOURS + 1, np.int64)  # where neighbours begin of which one is large enough
    for row in range(len(scores)):
        own, best, where = scores[row], values[row], indices[row]
        enough = least
        if count >= COLUMNS:
            for column in range(COLUMNS):
                best_of[column] = own[column]
            for line in range(1, count // COLUMNS):
                for column in range(COLUMNS):
                    score = own[line * COLUMNS + column]
                    best_of[column] = score if score > best_of[column] else best_of[column]
            _clear(best, where, least)
            for column in range(COLUMNS):
                if best_of[column] > best[k - 1]:
                    _insert(best, where, best_of[column], column)
            enough = best[k - 1]
        _clear(best, where, least)
        found = 0
        for block in range(count // NEIGHBOURS):
            large = False
            for neighbour in range(NEIGHBOURS):
                large |= own[block * NEIGHBOURS + neighbour] >= enough
            promising[found] = block
            found += large
        for block in promising[:found]:
            for at in range(block * NEIGHBOURS, (block + 1) * NEIGHBOURS):
                if own[at] > best[k - 1]:
                    _insert(best, where, own[at], at)
        for at in range(count // NEIGHBOURS * NEIGHBOURS, count):
            if own[at] > best[k - 1]:
                _insert(best, where, own[at], at)


@register_jitable
def _clear(best: Any, where: Any, least: Any) -> None:
    for place in range(len(best)):
        best[place], where[place] = least, 0


@register_jitable
def _insert(best: Any, where: Any, score: Any, at: Any) -> None:
    """Put a score into its place among the best, behind equal ones, and its index."""
    place = len(best) - 1
    while place > 0 and best[place - 1] < score:
        best[place], where[place] = best[place - 1], where[place - 1]
        place -= 1
    best[place], where[place] = score, at
