"""Compiled kernels against PyTorch's own operations."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.caching import CompileResultCacheImpl
from torch import Tensor

from sasrec import kernels
from sasrec.kernels import COLUMNS, attend, top_k

ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-6}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attended(query: Tensor, held: Tensor, length: int) -> Tensor:
    """(H, Dh) to the first so many keys and values of a slot (H, 2, max_len, Dh)."""
    keys, values = held[:, 0, :length].double(), held[:, 1, :length].double()
    return F.scaled_dot_product_attention(query.double()[:, None], keys, values)[:, 0]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16]),
    st.integers(1, 3), st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.booleans(),
    st.integers(0, 2**16), st.sampled_from([0.01, 1.0, 30.0]),
)  # fmt: skip
def test_attention_is_pytorchs_over_what_is_held(
    stored: torch.dtype, heads: int, units: int, new: list[int], newest_alone: bool, seed: int, scale: float
) -> None:
    precision = torch.float32 if stored == torch.float16 else stored
    random = np.random.default_rng(seed)
    max_len = 24
    held = draw(seed, 8, heads, 2, max_len, units).to(stored)
    slots = random.permutation(8)[: len(new)]
    past = random.integers(0, max_len - 7, len(new))
    of = np.repeat(slots, new)
    places = np.concatenate([np.arange(p, p + n) for p, n in zip(past, new, strict=True)])
    # as the model gives them, parts of one tensor
    query, key, value = (scale * draw(seed + 1, len(of), 3 * heads, units)).to(precision).split(heads, dim=1)
    asking = np.cumsum(new) - 1 if newest_alone else np.arange(len(of))

    expected = held.clone()
    for token in range(len(of)):
        expected[of[token], :, 0, places[token]] = key[token].to(stored)
        expected[of[token], :, 1, places[token]] = value[token].to(stored)
    out = attend(query, key, value, held, of, places, asking)

    assert torch.equal(held, expected)
    wanted = torch.stack([attended(query[t], expected[of[t]], int(places[t]) + 1) for t in asking])
    assert out.dtype == precision
    # what is rounded off a product counts as much more as the products are large, and then times the values
    products = query.abs().max() * expected.abs().max().double() * units
    assert (out - wanted).abs().max() <= ROUNDING[stored] * (1 + products) * expected.abs().max()


@pytest.mark.parametrize("largest", [65504.0, 6.2e-5, 6e-8, 0.0])
def test_float16_is_read_exactly(largest: float) -> None:
    held = torch.zeros(1, 1, 2, 1, 8, dtype=torch.float16)
    value = torch.linspace(-1, 1, 8)[None, None] * largest
    out = attend(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), value, held, np.array([0]), np.array([0]), np.array([0]))
    assert torch.equal(out, value.half().float())


def best_of(scores: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Sorted, equal ones in their order; what is not a number, or -inf, left out."""
    rows = [sorted((-score, at) for at, score in enumerate(row) if score > -math.inf)[:k] for row in scores.tolist()]
    return [[-score for score, _ in row] for row in rows], [[at for _, at in row] for row in rows]


SCORES = st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1.0, 2.0, -math.inf, math.nan])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 300), st.integers(1, 70), st.data())
def test_top_k_is_the_head_of_a_sorted_row(count: int, k: int, data: st.DataObject) -> None:
    few = data.draw(st.lists(SCORES, min_size=1, max_size=20))
    places = data.draw(st.lists(st.sampled_from(range(len(few))), min_size=2 * count, max_size=2 * count))
    scores = torch.tensor([few[place] for place in places], dtype=torch.float32).view(2, count)
    k = min(k, count, COLUMNS)
    values, indices = top_k(scores, k)
    expected = best_of(scores, k)
    for row in range(2):
        kept = len(expected[0][row])
        assert values[row, :kept].tolist() == expected[0][row]
        assert indices[row, :kept].tolist() == expected[1][row]
        assert (values[row, kept:] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 10, COLUMNS, COLUMNS + 1, 1000])
def test_top_k_of_many_is_what_pytorch_finds(dtype: torch.dtype, k: int) -> None:
    scores = draw(k, 7, 3417).to(dtype)
    for given_scores in (scores, scores.T.contiguous().T):
        values, indices = top_k(given_scores, k)
        best = scores.topk(k)
        assert torch.equal(values, best.values)
        assert torch.equal(indices, best.indices)


def test_kernels_work_where_no_folder_can_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    kernels._top_k_kernel.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, _ = top_k(draw(0, 1, 100).float(), 3)
    kernels._top_k_kernel.cache_clear()
    assert torch.equal(values, draw(0, 1, 100).float().topk(3).values)
