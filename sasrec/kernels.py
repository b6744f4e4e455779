"""What PyTorch has no fast operation for on a processor, compiled by numba: what packed.py does between matrix
products, and the few best of many scores.

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

Floats = NDArray[np.floating[Any]]
Held = NDArray[np.number[Any]]
Indices = NDArray[np.int64]

# Sums in any order, so that they are done in vector registers.
FAST_SUMS = {"reassoc", "contract", "arcp", "nsz", "nnan"}
PRECISIONS: dict[torch.dtype, Any] = {torch.float32: types.float32, torch.float64: types.float64}

# Rows of scores are looked through in so many columns, and then in so many neighbours at once.
COLUMNS, NEIGHBOURS = 64, 16


def attend(
    new: Floats, cos: Floats, sin: Floats, held: Held, slots: Indices, places: Indices, asking: Indices
) -> Floats:
    """Turn queries and keys of new tokens by their places, keep keys and values, then attend from some of the tokens to
    all that their slots hold up to them.

    Args:
        new: (M, 3, H, Dh), queries, keys and values, float32 or float64, all in one piece.
        cos, sin: (max_len, Dh) as ``sasrec.model.rotation_table`` gives them, of the same precision.
        held: (slots, H, 2, max_len, Dh), of the same precision, or uint16 for the bits of float16.
        slots: (M,) whose token each is.
        places: (M,) where in its slot it stands; what is before it has been kept, or is among these tokens.
        asking: (B,) which tokens attend.

    Returns:
        (B, H * Dh).
    """
    out = np.empty((len(asking), new.shape[2] * new.shape[3]), new.dtype)
    _attention_kernel(new.dtype, held.dtype)(new, cos, sin, held, slots, places, asking, out)
    return out


def add_norm(
    x: Floats, rows: Indices, scale: float, added: Floats, weight: Floats, bias: Floats, eps: float
) -> tuple[Floats, Floats]:
    """Rows of x times scale, plus what is added, and the layer norm (Ba, Kiros & Hinton 2016) of these sums.

    Args:
        x: (N, D), as everything float32 or float64, in one piece.
        rows: (M,) of x.
        added: (M, D), or (0, D) for nothing.
        weight, bias: (D,) of the norm.
        eps: added to the variances.

    Returns:
        Sums and norms, (M, D) each.
    """
    sums, norms = np.empty((len(rows), x.shape[1]), x.dtype), np.empty((len(rows), x.shape[1]), x.dtype)
    _add_norm_kernel(x.dtype)(x, rows, scale, added, weight, bias, eps, sums, norms)
    return sums, norms


def gelu_(x: Floats) -> Floats:
    """What ``torch.nn.functional.gelu`` gives of x (M, N), float32 or float64, in its place."""
    _gelu_kernel(x.dtype)(x)
    return x


def prepare(precision: Any, held: Any) -> None:
    """Compile, or read, what these three run for numbers of numpy's types, so that no click waits for it."""
    _attention_kernel(precision, held)
    _add_norm_kernel(precision)
    _gelu_kernel(precision)


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
def _attention_kernel(precision: Any, stored: Any) -> Callable[..., None]:
    number, kept = numba.from_dtype(precision), numba.from_dtype(stored)
    table, whole, held, out = number[:, ::1], types.int64[::1], kept[:, :, :, :, ::1], number[:, ::1]
    signature = types.void(number[:, :, :, ::1], table, table, held, whole, whole, whole, out)
    return _compiled(_attend, signature, fastmath=FAST_SUMS)


@functools.cache
def _add_norm_kernel(precision: Any) -> Callable[..., None]:
    number = numba.from_dtype(precision)
    rows, vector = number[:, ::1], number[::1]
    signature = types.void(rows, types.int64[::1], number, rows, vector, vector, number, rows, rows)
    return _compiled(_add_norm, signature, fastmath=FAST_SUMS)


@functools.cache
def _gelu_kernel(precision: Any) -> Callable[..., None]:
    return _compiled(_gelu, types.void(numba.from_dtype(precision)[:, ::1]), fastmath=FAST_SUMS)


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


def _attend(new: Any, cos: Any, sin: Any, held: Any, slots: Any, places: Any, asking: Any, out: Any) -> None:
    heads, units = new.shape[2:]
    zero, one = out.dtype.type(0), out.dtype.type(1)
    scale = out.dtype.type(1 / math.sqrt(units))
    turned, mixed = np.empty(units, out.dtype), np.empty(units, out.dtype)
    for token in range(len(slots)):
        place = places[token]
        for head in range(heads):
            key, value = held[slots[token], head, 0, place], held[slots[token], head, 1, place]
            _turn(new[token, 1, head], cos[place], sin[place], one, turned)
            for unit in range(units):
                key[unit] = _kept(turned[unit], key[unit])
            own = new[token, 2, head]
            for unit in range(units):
                value[unit] = _kept(own[unit], value[unit])
    weights = np.empty(held.shape[3], out.dtype)
    for row in range(len(asking)):
        token = asking[row]
        length = places[token] + 1
        for head in range(heads):
            keys, values = held[slots[token], head, 0], held[slots[token], head, 1]
            _turn(new[token, 0, head], cos[length - 1], sin[length - 1], scale, turned)
            for group in range(length // 4):  # four at once, or it waits for its sums
                at = 4 * group
                first, second, third, fourth = zero, zero, zero, zero
                for unit in range(units):
                    first += turned[unit] * _number(keys[at, unit])
                    second += turned[unit] * _number(keys[at + 1, unit])
                    third += turned[unit] * _number(keys[at + 2, unit])
                    fourth += turned[unit] * _number(keys[at + 3, unit])
                weights[at], weights[at + 1], weights[at + 2], weights[at + 3] = first, second, third, fourth
            for at in range(length // 4 * 4, length):
                first = zero
                for unit in range(units):
                    first += turned[unit] * _number(keys[at, unit])
                weights[at] = first
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
                first, second, third, fourth = weights[at], weights[at + 1], weights[at + 2], weights[at + 3]
                for unit in range(units):
                    mixed[unit] += (
                        first * _number(values[at, unit])
                        + second * _number(values[at + 1, unit])
                        + third * _number(values[at + 2, unit])
                        + fourth * _number(values[at + 3, unit])
                    )
            for at in range(length // 4 * 4, length):
                first = weights[at]
                for unit in range(units):
                    mixed[unit] += first * _number(values[at, unit])
            for unit in range(units):
                out[row, head * units + unit] = mixed[unit] / total


@register_jitable
def _turn(own: Any, cos: Any, sin: Any, scale: Any, turned: Any) -> None:
    """``sasrec.model.rotate`` of one token in a head, times scale; an odd unit is not turned."""
    half = len(own) // 2
    for unit in range(half):
        one, two = own[unit] * scale, own[half + unit] * scale
        turned[unit] = one * cos[unit] + two * sin[unit]
        turned[half + unit] = two * cos[half + unit] + one * sin[half + unit]
    for unit in range(2 * half, len(own)):
        turned[unit] = own[unit] * scale


def _add_norm(
    x: Any, rows: Any, scale: Any, added: Any, weight: Any, bias: Any, eps: Any, sums: Any, norms: Any
) -> None:
    units = x.shape[1]
    for row in range(len(rows)):
        own, summed, out = x[rows[row]], sums[row], norms[row]
        if len(added):
            for unit in range(units):
                summed[unit] = own[unit] * scale + added[row, unit]
        else:
            for unit in range(units):
                summed[unit] = own[unit] * scale
        mean = x.dtype.type(0)
        for unit in range(units):
            mean += summed[unit]
        mean /= x.dtype.type(units)
        square = x.dtype.type(0)
        for unit in range(units):
            square += (summed[unit] - mean) * (summed[unit] - mean)
        factor = x.dtype.type(1) / np.sqrt(square / x.dtype.type(units) + eps)
        for unit in range(units):
            out[unit] = (summed[unit] - mean) * factor * weight[unit] + bias[unit]


def _gelu(x: Any) -> None:
    for row in range(len(x)):
        own = x[row]
        for at in range(x.shape[1]):
            own[at] = own[at] * _normal_cdf(own[at])


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


def _kept(number: Any, like: Any) -> Any:
    """What to keep of a number, ``like`` what is kept already: as it is, or uint16 for float16."""


@overload(_kept, strict=False)
def _(number: Any, like: Any) -> Any:
    if like != types.uint16:
        return lambda number, like: number

    def narrowed(number: Any, like: Any) -> Any:
        bits = np.float32(number).view(np.uint32)
        size = np.uint32(min(bits & np.uint32(0x7FFFFFFF), np.uint32(0x477FE000)))  # 65504 is the largest
        # half a float16's last digit added, less where the digit before is even; below 2**-14, where float16 has fewer
        # digits, float32 rounds to as many once 0.5 is added
        digit = (size >> np.uint32(13)) & np.uint32(1)
        usual = np.uint32(np.uint32(size - np.uint32(0x38000000)) + np.uint32(0xFFF) + digit) >> np.uint32(13)
        small = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        return np.uint16(
            (small if size < np.uint32(0x38800000) else usual) | (bits >> np.uint32(16) & np.uint32(0x8000))
        )

    return narrowed


def _normal_cdf(x: Any) -> Any:
    """The share of a standard normal distribution below x."""


@overload(_normal_cdf, strict=False)
def _(x: Any) -> Any:
    if x != types.float32:
        return lambda x: 0.5 * math.erfc(-x * math.sqrt(0.5))

    def vectorised(x: Any) -> Any:
        # Abramowitz & Stegun 1964, 7.1.26: exact to 7.5e-8
        size = abs(x) * np.float32(0.7071067811865476)
        t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * size)
        low = np.float32(0.254829592) + t * np.float32(-0.284496736)
        series = low + t * t * (np.float32(1.421413741) + t * (np.float32(-1.453152027) + t * np.float32(1.061405429)))
        tail = np.float32(0.5) * t * series * _exp(-size * size)
        return tail if x < np.float32(0) else np.float32(1) - tail

    return vectorised


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
