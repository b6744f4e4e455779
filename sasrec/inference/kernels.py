"""Serving on a processor, compiled by numba: a whole forward over packed tokens, and the few best of many scores.

PyTorch would do it in dozens of calls. Each costs microseconds, and the first of them a tenth of a millisecond when
something else ran in between, until the processor has its code at hand again; here there is one call, of little code.

A kernel is compiled when it is first wanted, once for each precision, and kept on disk where numba may write (beside
this file or in the user's cache folder), so that the next process need not wait seconds for each. All of them are in
this file, since numba compiles anew when the file of a kernel changes, but not when that of a function in it does.
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

from sasrec.model import LAYER_NORM_EPS

Floats = NDArray[np.floating[Any]]
Held = NDArray[np.number[Any]]
Indices = NDArray[np.int64]

# Sums in any order, so that they are done in vector registers.
FAST_SUMS = {"reassoc", "contract", "arcp", "nsz", "nnan"}
PRECISIONS: dict[torch.dtype, Any] = {torch.float32: types.float32, torch.float64: types.float64}

# A product is done in tiles of so many rows and columns, what a processor has vector registers for; of fewer rows one
# by one, in tiles of so many times as many columns.
ROWS, LANES, WIDE = 8, 16, 4
# So many users' scores are there at once: of small catalogues they stay in a core's cache.
RANKED_AT_ONCE = 32
# Rows of scores are looked through in so many columns, and then in so many neighbours at once.
COLUMNS, NEIGHBOURS = 64, 16


class Weights(NamedTuple):
    """Of L blocks of width D: ``panels`` and biases of their products, all in one piece."""

    norms: Floats  # (2 L + 1, 2, D), weight and bias: before attention, before the feed-forward, ..., the final one
    query_key_value: Floats  # of (D, 3 D)
    query_key_value_bias: Floats  # (L, 3 D)
    attention_out: Floats  # of (D, D)
    attention_out_bias: Floats  # (L, D)
    feed_forward_in: Floats  # of (D, F)
    feed_forward_in_bias: Floats  # (L, F)
    feed_forward_out: Floats  # of (F, D)
    feed_forward_out_bias: Floats  # (L, D)


def panels(weight: Floats) -> Floats:
    """Weights (..., inputs, outputs) as kernels read them, (..., P, inputs, LANES): columns that one tile of a product
    needs in one piece. Where LANES does not divide the outputs, the last panel lies partly over the one before; fewer
    outputs than LANES are filled up.
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
    held: Held,
    slots: Indices,
    past: Indices,
    new: Indices,
) -> Floats:
    """Keep the keys and values of new tokens, and give the hidden state of each user's newest, (B, D).

    Args:
        items: (M,) rows of the embedding, those of a user behind those of the one before him.
        embedding: (num_items + 1, D), of one precision with all that follows, float32 or float64.
        scale: what they are multiplied by.
        positions: (max_len, D) what is added to them, the last row to a user's newest; (0, D) for nothing.
        rotation: cosines and sines (max_len, Dh) as ``sasrec.model.rotation_table`` gives them.
        held: (L, slots, H, 2, max_len, Dh), keys and values of each block; of the same precision, or uint16 for the
            bits of float16. Where nothing is kept for later, (1, ...) stands for all blocks.
        slots: (B,) where each user's window lies.
        past: (B,) how many of his tokens lie there.
        new: (B,) how many of the items follow them, at least one.
    """
    hidden = np.empty((len(slots), embedding.shape[1]), embedding.dtype)
    kernel = _encode_kernel(embedding.dtype, held.dtype)
    kernel(items, embedding, scale, positions, *rotation, *weights, held, slots, past, new, hidden)
    return hidden


def rank(
    hidden: Floats, items: Floats, bias: Floats, excluded: Indices, ends: Indices, k: int
) -> tuple[Floats, Indices]:
    """The k best scores of each row and their items, (B, k) each, best first; of equal ones the first.

    What is not a number is not among them; where fewer than k are above -inf, the rest is -inf.

    Args:
        hidden: (B, D).
        items: ``panels`` of the embedding on its side, (D, N).
        bias: (N,) added to the scores; -inf for items that nobody is to see.
        excluded: items that are not to be found, of all rows one behind another.
        ends: (B,) where those of each row end.
        k: at most COLUMNS.
    """
    values, indices = np.empty((len(hidden), k), hidden.dtype), np.empty((len(hidden), k), np.int64)
    _rank_kernel(hidden.dtype)(hidden, items, bias, excluded, ends, values, indices)
    return values, indices


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What ``torch.topk`` gives of scores (B, N), values and indices (B, k), best first; of equal ones the first.

    What is not a number is not among them; where fewer than k are above -inf, the rest is -inf.
    """
    if k > COLUMNS or scores.dtype not in PRECISIONS or scores.device.type != "cpu":
        best = scores.topk(k)
        return best.values, best.indices
    values = scores.new_empty(len(scores), k)
    indices = torch.empty(len(scores), k, dtype=torch.int64)
    _top_k_kernel(scores.numpy().dtype)(scores.contiguous().numpy(), values.numpy(), indices.numpy())
    return values, indices


def prepare_encode(precision: Any, held: Any) -> None:
    """Compile, or read, what ``encode`` runs on numbers of numpy's types, so that no click waits for it."""
    _encode_kernel(precision, held)


def prepare_rank(precision: Any) -> None:
    """The same of ``rank``."""
    _rank_kernel(precision)


@functools.cache
def _encode_kernel(precision: Any, stored: Any) -> Callable[..., None]:
    number, kept = numba.from_dtype(precision), numba.from_dtype(stored)
    rows, whole = number[:, ::1], types.int64[::1]
    weights = (number[:, :, ::1], *4 * (number[:, :, :, ::1], rows))
    held = kept[:, :, :, :, :, ::1]
    signature = types.void(whole, rows, number, rows, rows, rows, *weights, held, whole, whole, whole, rows)
    return _compiled(_encode, signature, fastmath=FAST_SUMS)


@functools.cache
def _rank_kernel(precision: Any) -> Callable[..., None]:
    number, whole = numba.from_dtype(precision), types.int64
    rows, items = number[:, ::1], number[:, :, ::1]
    return _compiled(_rank, types.void(rows, items, number[::1], whole[::1], whole[::1], rows, whole[:, ::1]))


@functools.cache
def _top_k_kernel(precision: Any) -> Callable[..., None]:
    number = numba.from_dtype(precision)
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


def _encode(
    items: Any, embedding: Any, scale: Any, positions: Any, cos: Any, sin: Any, norms: Any,
    query_key_value: Any, query_key_value_bias: Any, attention_out: Any, attention_out_bias: Any,
    feed_forward_in: Any, feed_forward_in_bias: Any, feed_forward_out: Any, feed_forward_out_bias: Any,
    held: Any, slots: Any, past: Any, new: Any, hidden: Any,
) -> None:  # fmt: skip
    tokens, width, blocks = len(items), embedding.shape[1], len(query_key_value)
    heads, units = held.shape[2], held.shape[5]
    of, places, newest = np.empty(tokens, np.int64), np.empty(tokens, np.int64), np.empty(len(slots), np.int64)
    x, normed = np.empty((tokens, width), hidden.dtype), np.empty((tokens, width), hidden.dtype)
    token = 0
    for user in range(len(slots)):
        for step in range(new[user]):
            of[token], places[token] = slots[user], past[user] + step
            item = embedding[items[token]]
            for unit in range(width):
                x[token, unit] = item[unit] * scale
            if len(positions):
                position = positions[len(positions) - new[user] + step]
                for unit in range(width):
                    x[token, unit] += position[unit]
            token += 1
        newest[user] = token - 1
    asking = np.arange(tokens)
    for block in range(blocks):
        _norm(x, norms[2 * block], normed)
        qkv = np.empty((tokens, 3 * width), hidden.dtype)
        _linear(normed, query_key_value[block], query_key_value_bias[block], qkv)
        if block == blocks - 1:  # from here on each user's newest token alone
            asking = newest
            for user in range(len(slots)):
                x[user] = x[newest[user]]
            x, normed = x[: len(slots)], normed[: len(slots)]
        attended, added = np.empty_like(x), np.empty_like(x)
        own = held[min(block, len(held) - 1)]
        _attend(qkv.reshape(tokens, 3, heads, units), cos, sin, own, of, places, asking, attended)
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
    """Rows times a weight, in panels, plus the bias; of few rows, as clicks are, in two thirds of the time of a
    library's product. Where tiles do not fill the rows, the last one lies partly over the one before.
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
        for panel in range(len(weight)):
            for row in range(0, rows, ROWS):
                _multiply_tall(x, min(row, rows - ROWS), weight, panel, last, bias, out)
    elif len(weight) >= WIDE:
        for row in range(rows):
            for panel in range(0, len(weight), WIDE):
                _multiply_wide(x, row, weight, min(panel, len(weight) - WIDE), last, bias, out)
    else:
        for row in range(rows):
            for panel in range(len(weight)):
                _multiply_one(x, row, weight, panel, last, bias, out)


def _multiply(rows: int, width: int) -> Any:
    """The product of a tile: so many rows of x from ``row`` on, and so many panels from ``panel`` on, of which none
    begins behind the column ``last``.

    Written for LLVM, which keeps the sums in vector registers then. Loops over arrays it turns into vector operations
    too, but reads and writes the sums each time, in half as much again of the time.
    """

    @intrinsic
    def multiply(_: Any, x: Any, row: Any, weight: Any, panel: Any, last: Any, bias: Any, out: Any) -> Any:
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
            _, row, _, panel, last, *_ = arguments
            number = context.get_data_type(signature.args[0].dtype)
            vector, size, whole = ir.VectorType(number, LANES), context.get_abi_sizeof(number), row.type
            inputs, outputs = (builder.extract_value(matrix.shape, 1) for matrix in (x, out))
            lines = [builder.add(row, whole(line)) for line in range(rows)]
            parts = [builder.add(panel, whole(part)) for part in range(width)]
            usual = [builder.mul(part, whole(LANES)) for part in parts]
            columns = [builder.select(builder.icmp_signed("<", place, last), place, last) for place in usual]
            begins = [at(weight, part, builder.mul(inputs, whole(LANES)), whole(0)) for part in parts]
            sums = [[cgutils.alloca_once(builder, vector) for _ in columns] for _ in lines]  # type: ignore[no-untyped-call]
            for own in sums:
                for total, place in zip(own, columns, strict=True):
                    builder.store(load(builder.gep(bias.data, [place])), total)
            with cgutils.for_range(builder, inputs) as loop:
                factors = [load(builder.gep(begin, [builder.mul(loop.index, whole(LANES))])) for begin in begins]
                for line, own in zip(lines, sums, strict=True):
                    value = builder.load(at(x, line, inputs, loop.index))
                    one = builder.insert_element(vector(ir.Undefined), value, ir.IntType(32)(0))
                    each = builder.shuffle_vector(one, one, ir.VectorType(ir.IntType(32), LANES)([0] * LANES))
                    for total, factor in zip(own, factors, strict=True):
                        product = builder.fmul(each, factor, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for line, own in zip(lines, sums, strict=True):
                for total, place in zip(own, columns, strict=True):
                    builder.store(builder.load(total), vector_at(at(out, line, outputs, place)), align=size)
            return context.get_dummy_value()

        return types.void(x, row, weight, panel, last, bias, out), generate

    return multiply


_multiply_tall, _multiply_wide, _multiply_one = _multiply(ROWS, 1), _multiply(1, WIDE), _multiply(1, 1)


@register_jitable
def _norm(x: Any, weights: Any, out: Any) -> None:
    """Layer norm (Ba, Kiros & Hinton 2016) of rows, with weight and bias (2, D)."""
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


@register_jitable
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
