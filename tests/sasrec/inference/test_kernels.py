"""Compiled kernels, compared with PyTorch's own operations."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.caching import CompileResultCacheImpl
from torch import Tensor

from sasrec.inference import kernels
from sasrec.inference.kernels import (
    COLUMNS,
    FAST_SUMS,
    RANKED_AT_ONCE,
    Floats,
    Indices,
    KeyValues,
    rank,
    top_k,
    weight_tiles,
)
from sasrec.model import LAYER_NORM_EPS, rotate, rotation_table

compiled = numba.njit(fastmath=FAST_SUMS, error_model="numpy")


# Parts of kernels, compiled by themselves.
@compiled
def _attend(*arguments: Any) -> None:
    kernels._attend(*arguments)


@compiled
def _linear(x: Floats, weight: Floats, bias: Floats, out: Floats) -> None:
    kernels._linear(x, weight, bias, out)


@compiled
def _norm(x: Floats, weights: Floats, out: Floats) -> None:
    kernels._norm(x, weights, out)


@compiled
def _gelu(x: Floats) -> None:
    kernels._gelu(x)


def attend(
    qkv: Floats, cos: Floats, sin: Floats, key_values: KeyValues, slots: Indices, places: Indices, queries: Indices
) -> Floats:
    out = np.empty((len(queries), qkv.shape[2] * qkv.shape[3]), qkv.dtype)
    _attend(qkv, cos, sin, key_values, slots, places, queries, out)
    return out


ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-6}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attended(query: Tensor, key_values: Tensor, length: int) -> Tensor:
    """Attention of (H, Dh) to the first ``length`` keys and values of a slot (H, 2, max_len, Dh)."""
    keys, values = key_values[:, 0, :length].double(), key_values[:, 1, :length].double()
    return F.scaled_dot_product_attention(query.double()[:, None], keys, values)[:, 0]


def stored_bits(key_values: Tensor) -> Tensor:
    return key_values.view(torch.uint16) if key_values.dtype == torch.float16 else key_values


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 2**16),
    st.sampled_from([0.01, 1.0, 30.0]),
)
def test_attention_equals_pytorchs_over_the_stored_keys_and_values(
    stored: torch.dtype, heads: int, half_units: int, new: list[int], newest_alone: bool, seed: int, scale: float
) -> None:
    precision = torch.float32 if stored == torch.float16 else stored
    random = np.random.default_rng(seed)
    max_len, units = 24, 2 * half_units
    key_values = draw(seed, 8, heads, 2, max_len, units).to(stored)
    slots = random.permutation(8)[: len(new)]
    past = random.integers(0, max_len - 7, len(new))
    of = np.repeat(slots, new)
    places = np.concatenate([np.arange(p, p + n) for p, n in zip(past, new, strict=True)])
    tokens = (scale * draw(seed + 1, len(of), 3, heads, units)).to(precision)
    queries = np.cumsum(new) - 1 if newest_alone else np.arange(len(of))
    cos, sin = (table.to(precision) for table in rotation_table(max_len, units))

    query, key, value = tokens.unbind(1)
    query, key = (rotate(x, cos[places, None], sin[places, None]) for x in (query, key))
    ours = key_values.clone()
    out = torch.from_numpy(
        attend(tokens.numpy(), cos.numpy(), sin.numpy(), stored_bits(ours).numpy(), of, places, queries)
    ).view(-1, heads, units)

    for token in range(len(of)):
        # the kernel rounds rotated keys in another order; a key between two float16 numbers may become either
        stored_key, largest = ours[of[token], :, 0, places[token]].double(), float(key.abs().max())
        assert (stored_key - key[token]).abs().max() <= largest * (
            1e-3 if stored == torch.float16 else ROUNDING[stored]
        )
        key_values[of[token], :, 0, places[token]] = ours[of[token], :, 0, places[token]]
        key_values[of[token], :, 1, places[token]] = value[token].to(stored)
    assert torch.equal(ours, key_values), "values are stored unchanged, and nothing else changes"
    wanted = torch.stack([attended(query[t], key_values[of[t]], int(places[t]) + 1) for t in queries])
    assert out.dtype == precision
    # rounding errors grow with the size of the products, and are then multiplied by the values
    products = query.abs().max() * key_values.abs().max().double() * units
    assert (out - wanted).abs().max() <= ROUNDING[stored] * (1 + products) * key_values.abs().max()


@pytest.mark.parametrize("largest", [65504.0, 70_000.0, 1.0, 6.2e-5, 5.9e-5, 3e-6, 6e-8, 2e-8, 0.0])
def test_float16_is_stored_and_read_as_pytorch_does(largest: float) -> None:
    value = torch.linspace(-1, 1, 1000) * largest
    new = torch.zeros(1, 3, 1, 1000)
    new[0, 2, 0] = value
    key_values, table = torch.zeros(1, 1, 2, 1, 1000, dtype=torch.float16), np.zeros((1, 1000), np.float32)
    zero = np.array([0])
    out = attend(new.numpy(), table, table, stored_bits(key_values).numpy(), zero, zero, zero)
    expected = value.half().clamp(-65504, 65504)  # not infinite
    assert torch.equal(key_values[0, 0, 1, 0], expected)
    assert torch.equal(torch.from_numpy(out)[0], expected.float())


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(1, 20),
    st.integers(1, 70),
    st.integers(1, 150),
    st.integers(0, 2**16),
)
def test_products_equal_pytorchs(dtype: torch.dtype, rows: int, inputs: int, outputs: int, seed: int) -> None:
    shapes = (rows, inputs), (inputs, outputs), (outputs,)
    x, weight, bias = (draw(seed + i, *shape) for i, shape in enumerate(shapes))
    out = np.full((rows + 1, outputs), 7.0, str(dtype).removeprefix("torch."))
    _linear(x.to(dtype).numpy(), weight_tiles(weight.to(dtype).numpy()), bias.to(dtype).numpy(), out[:rows])
    wanted = torch.addmm(bias, x, weight)
    assert (torch.from_numpy(out[:rows]) - wanted).abs().max() <= ROUNDING[dtype] * (1 + inputs) * 8
    assert (out[rows] == 7).all(), "nothing is written after the last row"


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
def test_the_layer_norm_equals_pytorchs(dtype: torch.dtype, rounding: float) -> None:
    x, weights = (draw(i, *shape).to(dtype) for i, shape in enumerate([(5, 9), (2, 9)]))
    out = np.empty_like(x.numpy())
    _norm(x.numpy(), weights.numpy(), out)
    assert (torch.from_numpy(out) - F.layer_norm(x, (9,), *weights, LAYER_NORM_EPS)).abs().max() <= rounding


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_gelu_equals_pytorchs(dtype: torch.dtype, rounding: float) -> None:
    x = torch.linspace(-12, 12, 10_001, dtype=dtype)[None]
    found = x.clone()
    _gelu(found.numpy())
    assert found.dtype == dtype
    assert ((found - F.gelu(x.double())).abs() <= rounding * (1 + x.abs())).all()


def best_of(scores: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Sort each row, equal scores in their order, without NaN and -inf."""
    rows = [sorted((-score, at) for at, score in enumerate(row) if score > -math.inf)[:k] for row in scores.tolist()]
    return [[-score for score, _ in row] for row in rows], [[at for _, at in row] for row in rows]


SCORES = st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1.0, 2.0, -math.inf, math.nan])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 300), st.integers(1, 70), st.data())
def test_top_k_equals_the_head_of_the_sorted_row(count: int, k: int, data: st.DataObject) -> None:
    few = data.draw(st.lists(SCORES, min_size=1, max_size=20))
    places = data.draw(st.lists(st.sampled_from(range(len(few))), min_size=2 * count, max_size=2 * count))
    scores = torch.tensor([few[place] for place in places], dtype=torch.float32).view(2, count)
    k = min(k, count, COLUMNS)
    values, indices = top_k(scores, k)
    expected = best_of(scores, k)
    for row in range(2):
        finite = len(expected[0][row])
        assert values[row, :finite].tolist() == expected[0][row]
        assert indices[row, :finite].tolist() == expected[1][row]
        assert (values[row, finite:] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 10, COLUMNS, COLUMNS + 1, 1000])
def test_top_k_of_many_scores_equals_pytorchs(dtype: torch.dtype, k: int) -> None:
    scores = draw(k, 7, 3417).to(dtype)
    for given_scores in (scores, scores.T.contiguous().T):
        values, indices = top_k(given_scores, k)
        best = scores.topk(k)
        assert torch.equal(values, best.values)
        assert torch.equal(indices, best.indices)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 2 * RANKED_AT_ONCE + 3),
    st.sampled_from([1, 15, 16, 17, 63, 64, 100, 1000]),
    st.integers(1, 40),
    st.integers(1, COLUMNS),
    st.integers(0, 2**16),
)
def test_rank_equals_the_top_k_of_all_scores(
    dtype: torch.dtype, rows: int, count: int, width: int, k: int, seed: int
) -> None:
    random, k = np.random.default_rng(seed), min(k, count)
    # small whole numbers: products are exact, and many scores are equal
    hidden, embedding = (random.integers(-2, 3, (n, width)).astype(str(dtype)[6:]) for n in (rows, count))
    bias = np.where(random.random(count) < 0.1, -np.inf, 0).astype(hidden.dtype)
    left_out = [random.integers(0, count, random.integers(0, 9)) for _ in range(rows)]
    ends = np.cumsum([len(row) for row in left_out])
    values, indices = rank(hidden, weight_tiles(embedding.T), bias, np.concatenate(left_out), ends, k)
    scores = hidden @ embedding.T + bias
    for row, items in enumerate(left_out):
        scores[row, items] = -np.inf
    wanted, places = best_of(torch.from_numpy(scores), k)
    for row in range(rows):
        finite = len(wanted[row])
        assert values[row, :finite].tolist() == wanted[row]
        assert indices[row, :finite].tolist() == places[row]
        assert (values[row, finite:] == -math.inf).all()


def test_kernels_work_where_no_folder_is_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    kernels._top_k_kernel.cache_clear()
    values, _ = top_k(draw(0, 1, 100).float(), 3)
    kernels._top_k_kernel.cache_clear()
    assert torch.equal(values, draw(0, 1, 100).float().topk(3).values)
