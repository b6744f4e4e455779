"""Serving on a CPU, compiled by numba: a whole forward pass over packed tokens, and the top k of many scores.

In PyTorch this takes dozens of calls. Each costs microseconds, and the first one after other work a tenth of a
millisecond, until PyTorch's code is in the processor's cache again. Here it is one call of little code.

A kernel is compiled on first use, once per precision, and cached on disk where numba may write (beside this file or in
the user's cache folder), so that the next process does not wait seconds for each (kernel_cache.py).

Over 300 lines: numba recompiles a kernel when the file of that kernel changes, but not when a function that it
calls changes in another file. So all kernels and their functions are in one file.
Over 40 lines: functions that are loops over many shared local arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable
from numpy.typing import NDArray
from torch import Tensor

from sasrec.inference.kernel_cache import compiled
from sasrec.model import LAYER_NORM_EPS

Floats = NDArray[np.floating[Any]]
KeyValues = NDArray[np.number[Any]]
Indices = NDArray[np.int64]

# Sums may run in any order, so that the compiler can use vector registers.
FAST_SUMS = {"reassoc", "contract", "arcp", "nsz", "nnan"}
PRECISIONS: dict[torch.dtype, Any] = {torch.float32: types.float32, torch.float64: types.float64}

# A matrix product is computed in tiles of this many rows and columns, which fit into a processor's vector registers;
# with fewer rows, row by row in tiles of WIDE times as many columns.
ROWS, LANES, WIDE = 8, 16, 4
# Users ranked at once: the scores of a small catalogue then stay in a core's cache.
RANKED_AT_ONCE = 32
# Top-k first takes the maxima of this many columns of a row of scores, and then skips blocks of this many scores.
COLUMNS, BLOCK = 64, 16


class Weights(NamedTuple):
    """Weights of L blocks of width D: norms and biases as they are, matrices as ``weight_tiles``."""

    norms: Floats  # (2 L + 1, 2, D), weight and bias: before attention, before the feed-forward, ..., the final one
    query_key_value: Floats  # of (D, 3 D)
    query_key_value_bias: Floats  # (L, 3 D)
    attention_out: Floats  # of (D, D)
    attention_out_bias: Floats  # (L, D)
    feed_forward_in: Floats  # of (D, F)
    feed_forward_in_bias: Floats  # (L, F)
    feed_forward_out: Floats  # of (F, D)
    feed_forward_out_bias: Floats  # (L, D)


def weight_tiles(weight: Floats) -> Floats:
    """Return weights (..., inputs, outputs) as kernels read them, (..., tiles, inputs, LANES).

    Each tile holds LANES columns in one piece of memory. Where LANES does not divide the outputs, the last tile
    overlaps the one before it; fewer outputs than LANES are filled up with zeros.
    """
    if weight.shape[-1] < LANES:
        weight = np.concatenate((weight, np.zeros((*weight.shape[:-1], LANES - weight.shape[-1]), weight.dtype)), -1)
    last = weight.shape[-1] - LANES
    starts = [min(start, last) for start in range(0, weight.shape[-1], LANES)]
    return np.ascontiguousarray(np.stack([weight[..., start : start + LANES] for start in starts], -3))


def encode(
    items: Indices,
    embedding: Floats,
    scale: float,
    positions: Floats,
    rotation: tuple[Floats, Floats],
    weights: Weights,
    key_values: KeyValues,
    slots: Indices,
    past: Indices,
    new: Indices,
) -> Floats:
    """Store the keys and values of new tokens; return the hidden state of each user's newest token, (B, D).

    Args:
        items: (M,) rows of the embedding, the tokens of all users concatenated.
        embedding: (num_items + 1, D), float32 or float64; all other numbers have its precision.
        scale: factor of the embedding.
        positions: (max_len, D) added to the tokens, the last row to a user's newest; (0, D) for none.
        rotation: cosines and sines (max_len, Dh) as ``sasrec.model.rotation_table`` returns them.
        key_values: (L, slots, H, 2, max_len, Dh), keys and values of each block; of the same precision, or uint16 for
            the bits of float16. Where they are not needed later, (1, ...) may serve all blocks in turn.
        slots: (B,) the slot of each user's window.
        past: (B,) tokens of each user that their slot holds.
        new: (B,) tokens of each user in ``items``, at least one.
    """
    hidden = np.empty((len(slots), embedding.shape[1]), embedding.dtype)
    kernel = _encode_kernel(embedding.dtype, key_values.dtype)
    kernel(items, embedding, scale, positions, *rotation, *weights, key_values, slots, past, new, hidden)
    return hidden


def rank(
    hidden: Floats, items: Floats, bias: Floats, excluded: Indices, ends: Indices, k: int
) -> tuple[Floats, Indices]:
    """Return the k best scores of each row and their items, (B, k) each, best first; of equal scores the first item.

    NaN is never among them. Where fewer than k scores are above -inf, the rest is -inf.

    Args:
        hidden: (B, D).
        items: ``weight_tiles`` of the transposed embedding, (D, N).
        bias: (N,) added to the scores; -inf for items that no user may get.
        excluded: items that a row must not get, those of all rows concatenated.
        ends: (B,) the end of each row's items in ``excluded``.
        k: at most COLUMNS.
    """
    values, indices = np.empty((len(hidden), k), hidden.dtype), np.empty((len(hidden), k), np.int64)
    _rank_kernel(hidden.dtype)(hidden, items, bias, excluded, ends, values, indices)
    return values, indices


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and indices of the k best scores of each row of (B, N), (B, k) each, as ``torch.topk`` does.

    Best first; of equal scores the first. NaN is never among them. Where fewer than k scores are above -inf, the rest
    is -inf.
    """
    if k > COLUMNS or scores.dtype not in PRECISIONS or scores.device.type != "cpu":
        best = scores.topk(k)
        return best.values, best.indices
    values = scores.new_empty(len(scores), k)
    indices = torch.empty(len(scores), k, dtype=torch.int64)
    _top_k_kernel(scores.numpy().dtype)(scores.contiguous().numpy(), values.numpy(), indices.numpy())
    return values, indices


def prepare_encode(precision: Any, stored: Any) -> None:
    """Compile the kernel of ``encode`` for these NumPy types, or load it from disk, so that no click waits for it."""
    _encode_kernel(precision, stored)


def prepare_rank(precision: Any) -> None:
    """Compile the kernel of ``rank`` for this NumPy type, or load it from disk, so that no click waits for it."""
    _rank_kernel(precision)


@functools.cache
def _encode_kernel(precision: Any, stored: Any) -> Callable[..., None]:
    number, stored_number = numba.from_dtype(precision), numba.from_dtype(stored)
    rows, indices = number[:, ::1], types.int64[::1]
    weights = (number[:, :, ::1], *4 * (number[:, :, :, ::1], rows))
    key_values = stored_number[:, :, :, :, :, ::1]
    signature = types.void(
        indices, rows, number, rows, rows, rows, *weights, key_values, indices, indices, indices, rows
    )
    return _compiled(_encode, signature, fastmath=FAST_SUMS)


@functools.cache
def _rank_kernel(precision: Any) -> Callable[..., None]:
    number, index = numba.from_dtype(precision), types.int64
    rows, items = number[:, ::1], number[:, :, ::1]
    return _compiled(_rank, types.void(rows, items, number[::1], index[::1], index[::1], rows, index[:, ::1]))


@functools.cache
def _top_k_kernel(precision: Any) -> Callable[..., None]:
    number = numba.from_dtype(precision)
    return _compiled(_top_k, types.void(number[:, ::1], number[:, ::1], types.int64[:, ::1]))


def _compiled(function: Callable[..., None], signature: Any, **options: Any) -> Callable[..., None]:
    # an explicit signature: a batch of one has another memory layout, and numba would compile again while a click waits
    return compiled(function, signature, nogil=True, error_model="numpy", **options)


def _encode(
    items: Any,
    embedding: Any,
    scale: Any,
    positions: Any,
    cos: Any,
    sin: Any,
    norms: Any,
    query_key_value: Any,
    query_key_value_bias: Any,
    attention_out: Any,
    attention_out_bias: Any,
    feed_forward_in: Any,
    feed_forward_in_bias: Any,
    feed_forward_out: Any,
    feed_forward_out_bias: Any,
    key_values: Any,
    slots: Any,
    past: Any,
    new: Any,
    hidden: Any,
) -> None:
    tokens, width, blocks = len(items), embedding.shape[1], len(query_key_value)
    heads, units = key_values.shape[2], key_values.shape[5]
    slot_of, place_of = np.empty(tokens, np.int64), np.empty(tokens, np.int64)
    newest = np.empty(len(slots), np.int64)
    x, normed = np.empty((tokens, width), hidden.dtype), np.empty((tokens, width), hidden.dtype)
    token = 0
    for user in range(len(slots)):
        for step in range(new[user]):
            slot_of[token], place_of[token] = slots[user], past[user] + step
            item = embedding[items[token]]
            for unit in range(width):
                x[token, unit] = item[unit] * scale
            if len(positions):
                position = positions[len(positions) - new[user] + step]
                for unit in range(width):
                    x[token, unit] += position[unit]
            token += 1
        newest[user] = token - 1
    queries = np.arange(tokens)
    for block in range(blocks):
        _norm(x, norms[2 * block], normed)
        qkv = np.empty((tokens, 3 * width), hidden.dtype)
        _linear(normed, query_key_value[block], query_key_value_bias[block], qkv)
        if block == blocks - 1:  # the rest of the last block needs only each user's newest token
            queries = newest
            for user in range(len(slots)):
                x[user] = x[newest[user]]
            x, normed = x[: len(slots)], normed[: len(slots)]
        attended, added = np.empty_like(x), np.empty_like(x)
        cache = key_values[min(block, len(key_values) - 1)]
        _attend(qkv.reshape(tokens, 3, heads, units), cos, sin, cache, slot_of, place_of, queries, attended)
        _linear(attended, attention_out[block], attention_out_bias[block], added)
        x += added
        _norm(x, norms[2 * block + 1], normed)
        inner = np.empty((len(x), feed_forward_in_bias.shape[1]), hidden.dtype)
        _linear(normed, feed_forward_in[block], feed_forward_in_bias[block], inner)
        _gelu(inner)
        _linear(inner, feed_forward_out[block], feed_forward_out_bias[block], added)
        x += added
    _norm(x, norms[2 * blocks], hidden)


@register_jitable
def _linear(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """Multiply rows by ``weight_tiles`` and add the bias.

    With few rows, as clicks have, this takes two thirds of the time of a library's product. Where the tiles do not
    divide the rows, the last one overlaps the one before it.
    """
    rows, outputs = len(x), len(bias)
    last = outputs - LANES
    if last < 0:
        for row in range(rows):
            for column in range(outputs):
                out[row, column] = bias[column]
                for at in range(x.shape[1]):
                    out[row, column] += x[row, at] * weight[0, at, column]
    elif rows >= ROWS:
        for tile in range(len(weight)):
            for row in range(0, rows, ROWS):
                _multiply_tall(x, min(row, rows - ROWS), weight, tile, last, bias, out)
    elif len(weight) >= WIDE:
        for row in range(rows):
            for tile in range(0, len(weight), WIDE):
                _multiply_wide(x, row, weight, min(tile, len(weight) - WIDE), last, bias, out)
    else:
        for row in range(rows):
            for tile in range(len(weight)):
                _multiply_one(x, row, weight, tile, last, bias, out)


def _multiply(rows: int, width: int) -> Any:
    """Return a function that computes a part of a product: some rows from ``row`` on and some tiles from ``tile`` on.

    No tile begins after the column ``last``. In LLVM's own language, the sums stay in vector registers. Loops over
    arrays become vector operations as well, but these load and store the sums each time, half as long again.
    """

    @intrinsic
    def multiply(_: Any, x: Any, row: Any, weight: Any, tile: Any, last: Any, bias: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def array(place: int) -> Any:
                return context.make_array(signature.args[place])(context, builder, arguments[place])

            def at(matrix: Any, line: Any, length: Any, place: Any) -> Any:
                return builder.gep(matrix.data, [builder.add(builder.mul(line, length), place)])

            def vector_at(pointer: Any) -> Any:
                return builder.bitcast(pointer, vector.as_pointer())

            def load(pointer: Any) -> Any:
                return builder.load(vector_at(pointer), align=size)

            x, weight, bias, out = map(array, (0, 2, 5, 6))
            _, row, _, tile, last, *_ = arguments
            number = context.get_data_type(signature.args[0].dtype)
            vector, size, whole = ir.VectorType(number, LANES), context.get_abi_sizeof(number), row.type
            inputs, outputs = (builder.extract_value(matrix.shape, 1) for matrix in (x, out))
            lines = [builder.add(row, whole(line)) for line in range(rows)]
            parts = [builder.add(tile, whole(part)) for part in range(width)]
            first_columns = [builder.mul(part, whole(LANES)) for part in parts]
            columns = [builder.select(builder.icmp_signed("<", place, last), place, last) for place in first_columns]
            begins = [at(weight, part, builder.mul(inputs, whole(LANES)), whole(0)) for part in parts]
            sums = [[cgutils.alloca_once(builder, vector) for _ in columns] for _ in lines]  # type: ignore[no-untyped-call]
            for line_sums in sums:
                for total, place in zip(line_sums, columns, strict=True):
                    builder.store(load(builder.gep(bias.data, [place])), total)
            with cgutils.for_range(builder, inputs) as loop:
                factors = [load(builder.gep(begin, [builder.mul(loop.index, whole(LANES))])) for begin in begins]
                for line, line_sums in zip(lines, sums, strict=True):
                    value = builder.load(at(x, line, inputs, loop.index))
                    one = builder.insert_element(vector(ir.Undefined), value, ir.IntType(32)(0))
                    each = builder.shuffle_vector(one, one, ir.VectorType(ir.IntType(32), LANES)([0] * LANES))
                    for total, factor in zip(line_sums, factors, strict=True):
                        product = builder.fmul(each, factor, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for line, line_sums in zip(lines, sums, strict=True):
                for total, place in zip(line_sums, columns, strict=True):
                    builder.store(builder.load(total), vector_at(at(out, line, outputs, place)), align=size)
            return context.get_dummy_value()

        return types.void(x, row, weight, tile, last, bias, out), generate

    return multiply


_multiply_tall, _multiply_wide, _multiply_one = _multiply(ROWS, 1), _multiply(1, WIDE), _multiply(1, 1)


@register_jitable
def _norm(x: Any, weights: Any, out: Any) -> None:
    """Normalise rows (layer norm: Ba, Kiros & Hinton 2016), with weight and bias (2, D)."""
    units = x.shape[1]
    weight, bias = weights
    for row in range(len(x)):
        own, normed = x[row], out[row]
        mean = x.dtype.type(0)
        for unit in range(units):
            mean += own[unit]
        mean /= x.dtype.type(units)
        square = x.dtype.type(0)
        for unit in range(units):
            square += (own[unit] - mean) * (own[unit] - mean)
        factor = x.dtype.type(1) / np.sqrt(square / x.dtype.type(units) + x.dtype.type(LAYER_NORM_EPS))
        for unit in range(units):
            normed[unit] = (own[unit] - mean) * factor * weight[unit] + bias[unit]


@register_jitable
def _attend(qkv: Any, cos: Any, sin: Any, key_values: Any, slots: Any, places: Any, queries: Any, out: Any) -> None:
    """Store the keys and values of all tokens; let the tokens ``queries`` attend to their slots.

    Args:
        qkv: (M, 3, H, Dh) queries, keys and values of the tokens.
        key_values: (slots, H, 2, max_len, Dh).
        slots: (M,) the slot of each token, ``places`` its position there.
        queries: (Q,) tokens whose attention is wanted.
        out: (Q, H * Dh).
    """
    heads, units = qkv.shape[2:]
    zero, one = out.dtype.type(0), out.dtype.type(1)
    scale = out.dtype.type(1 / math.sqrt(units))
    rotated, mixed = np.empty(units, out.dtype), np.empty(units, out.dtype)
    for token in range(len(slots)):
        place = places[token]
        for head in range(heads):
            key, value = key_values[slots[token], head, 0, place], key_values[slots[token], head, 1, place]
            _rotate(qkv[token, 1, head], cos[place], sin[place], one, rotated)
            for unit in range(units):
                key[unit] = _to_stored(rotated[unit], key[unit])
            own = qkv[token, 2, head]
            for unit in range(units):
                value[unit] = _to_stored(own[unit], value[unit])
    weights = np.empty(key_values.shape[3], out.dtype)
    for row in range(len(queries)):
        token = queries[row]
        length = places[token] + 1
        for head in range(heads):
            keys, values = key_values[slots[token], head, 0], key_values[slots[token], head, 1]
            _rotate(qkv[token, 0, head], cos[length - 1], sin[length - 1], scale, rotated)
            for group in range(length // 4):  # four at once, so that no sum waits for the one before
                at = 4 * group
                first, second, third, fourth = zero, zero, zero, zero
                for unit in range(units):
                    first += rotated[unit] * _to_number(keys[at, unit])
                    second += rotated[unit] * _to_number(keys[at + 1, unit])
                    third += rotated[unit] * _to_number(keys[at + 2, unit])
                    fourth += rotated[unit] * _to_number(keys[at + 3, unit])
                weights[at], weights[at + 1], weights[at + 2], weights[at + 3] = first, second, third, fourth
            for at in range(length // 4 * 4, length):
                first = zero
                for unit in range(units):
                    first += rotated[unit] * _to_number(keys[at, unit])
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
                        first * _to_number(values[at, unit])
                        + second * _to_number(values[at + 1, unit])
                        + third * _to_number(values[at + 2, unit])
                        + fourth * _to_number(values[at + 3, unit])
                    )
            for at in range(length // 4 * 4, length):
                first = weights[at]
                for unit in range(units):
                    mixed[unit] += first * _to_number(values[at, unit])
            for unit in range(units):
                out[row, head * units + unit] = mixed[unit] / total


@register_jitable
def _rotate(own: Any, cos: Any, sin: Any, scale: Any, rotated: Any) -> None:
    """Rotate one token in a head as ``sasrec.model.rotate`` does, times scale; an odd last unit is only scaled."""
    half = len(own) // 2
    for unit in range(half):
        one, two = own[unit] * scale, own[half + unit] * scale
        rotated[unit] = one * cos[unit] + two * sin[unit]
        rotated[half + unit] = two * cos[half + unit] + one * sin[half + unit]
    for unit in range(2 * half, len(own)):
        rotated[unit] = own[unit] * scale


@register_jitable
def _gelu(x: Any) -> None:
    for row in range(len(x)):
        own = x[row]
        for at in range(x.shape[1]):
            own[at] = own[at] * _normal_cdf(own[at])


def _to_number(stored: Any) -> Any:
    """Return a stored number: itself, or the float16 whose bits a uint16 is."""


@overload(_to_number, inline="always", strict=False)
def _(stored: Any) -> Any:
    if stored != types.uint16:
        return lambda stored: stored

    def widened(stored: Any) -> Any:
        # place exponent and mantissa where float32 has them, and raise the exponent by 112 with a product: exact
        half = np.uint32(stored)
        bits = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))
        return np.uint32(bits).view(np.float32) * np.float32(2.0**112)

    return widened


def _to_stored(number: Any, like: Any) -> Any:
    """Return a number in the type of ``like``: itself, or the bits of a float16 as uint16."""


@overload(_to_stored, strict=False)
def _(number: Any, like: Any) -> Any:
    if like != types.uint16:
        return lambda number, like: number

    def narrowed(number: Any, like: Any) -> Any:
        bits = np.float32(number).view(np.uint32)
        size = np.uint32(min(bits & np.uint32(0x7FFFFFFF), np.uint32(0x477FE000)))  # 65504 is the largest
        # round to nearest, ties to even: add half of float16's last digit, less if the digit before is even; below
        # 2**-14, where float16 has fewer digits, adding 0.5 makes float32 round to as many
        digit = (size >> np.uint32(13)) & np.uint32(1)
        usual = np.uint32(np.uint32(size - np.uint32(0x38000000)) + np.uint32(0xFFF) + digit) >> np.uint32(13)
        small = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        return np.uint16(
            (small if size < np.uint32(0x38800000) else usual) | (bits >> np.uint32(16) & np.uint32(0x8000))
        )

    return narrowed


def _normal_cdf(x: Any) -> Any:
    """Return the share of a standard normal distribution below x."""


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
    """Return the exponential of a number that is at most 0."""


@overload(_exp, inline="always", strict=False)
def _(x: Any) -> Any:
    if x != types.float32:
        return lambda x: math.exp(x)

    def vectorised(x: Any) -> Any:
        # e**x = 2**whole, written into the exponent, times e**rest with |rest| < 0.35, where this Taylor series is as
        # exact as float32. The library's function is called number by number, which takes ten times as long.
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


def _rank(hidden: Any, items: Any, bias: Any, excluded: Any, ends: Any, values: Any, indices: Any) -> None:
    scores = np.empty((min(len(hidden), RANKED_AT_ONCE), len(bias)), hidden.dtype)
    at = 0
    for begin in range(0, len(hidden), RANKED_AT_ONCE):
        end = min(begin + RANKED_AT_ONCE, len(hidden))
        part = scores[: end - begin]
        _linear(hidden[begin:end], items, bias, part)
        for row in range(begin, end):
            while at < ends[row]:
                part[row - begin, excluded[at]] = -np.inf
                at += 1
        _top_k(part, values[begin:end], indices[begin:end])


@register_jitable
def _top_k(scores: Any, values: Any, indices: Any) -> None:
    """Find the k best scores of each row.

    The k-th largest column maximum is a lower bound of the k-th best score; blocks below it are skipped.
    """
    count, k = scores.shape[1], values.shape[1]
    lowest = scores.dtype.type(-np.inf)
    column_max = np.empty(COLUMNS, scores.dtype)
    candidates = np.empty(count // BLOCK + 1, np.int64)  # blocks with a score above the bound
    for row in range(len(scores)):
        row_scores, best, where = scores[row], values[row], indices[row]
        bound = lowest
        if count >= COLUMNS:
            for column in range(COLUMNS):
                column_max[column] = row_scores[column]
            for line in range(1, count // COLUMNS):
                for column in range(COLUMNS):
                    score = row_scores[line * COLUMNS + column]
                    column_max[column] = score if score > column_max[column] else column_max[column]
            _clear(best, where, lowest)
            for column in range(COLUMNS):
                if column_max[column] > best[k - 1]:
                    _insert(best, where, column_max[column], column)
            bound = best[k - 1]
        _clear(best, where, lowest)
        found = 0
        for block in range(count // BLOCK):
            reaches = False
            for offset in range(BLOCK):
                reaches |= row_scores[block * BLOCK + offset] >= bound
            candidates[found] = block
            found += reaches
        for block in candidates[:found]:
            for at in range(block * BLOCK, (block + 1) * BLOCK):
                if row_scores[at] > best[k - 1]:
                    _insert(best, where, row_scores[at], at)
        for at in range(count // BLOCK * BLOCK, count):
            if row_scores[at] > best[k - 1]:
                _insert(best, where, row_scores[at], at)


@register_jitable
def _clear(best: Any, where: Any, lowest: Any) -> None:
    for place in range(len(best)):
        best[place], where[place] = lowest, 0


@register_jitable
def _insert(best: Any, where: Any, score: Any, at: Any) -> None:
    """Insert a score and its index among the best, behind equal scores."""
    place = len(best) - 1
    while place > 0 and best[place - 1] < score:
        best[place], where[place] = best[place - 1], where[place - 1]
        place -= 1
    best[place], where[place] = score, at
