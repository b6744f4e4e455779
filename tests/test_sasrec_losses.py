"""Losses against sums done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sasrec.losses import bce, cross_entropy, sampled_softmax

NUM_ITEMS = 9


def case(seed: int, positions: int = 6, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator, dtype=torch.float64)
    embedding = torch.randn(NUM_ITEMS + 1, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, NUM_ITEMS + 1, (positions,), generator=generator)
    return hidden.requires_grad_(), embedding.requires_grad_(), targets


def others(target: int) -> list[int]:
    return [item for item in range(1, NUM_ITEMS + 1) if item != target]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_cross_entropy_of_equal_scores_is_the_log_of_the_catalogue() -> None:
    loss = cross_entropy(torch.zeros(3, 2), torch.ones(NUM_ITEMS + 1, 2), torch.tensor([1, 5, 9]))
    assert loss.item() == pytest.approx(math.log(NUM_ITEMS))


def test_bce_of_zero_scores_is_two_logs_of_two() -> None:
    negatives = torch.tensor([[2, 3], [4, 6]])
    loss = bce(torch.zeros(2, 2), torch.ones(NUM_ITEMS + 1, 2), torch.tensor([1, 5]), negatives)
    assert loss.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("seed", range(5))
def test_cross_entropy_equals_the_sum_written_out(seed: int) -> None:
    hidden, embedding, targets = case(seed)
    total = 0.0
    for state, target in zip(hidden.tolist(), targets.tolist(), strict=True):
        scores = [sum(h * e for h, e in zip(state, row, strict=True)) for row in embedding.tolist()]
        total -= scores[target] - math.log(sum(math.exp(score) for score in scores[1:]))
    assert cross_entropy(hidden, embedding, targets).item() == pytest.approx(total / len(targets), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_bce_equals_the_sum_written_out(seed: int) -> None:
    hidden, embedding, targets = case(seed)
    negatives = torch.tensor([others(target)[seed : seed + 3] for target in targets.tolist()])
    total = 0.0
    for state, target, wrong in zip(hidden.tolist(), targets.tolist(), negatives.tolist(), strict=True):
        scores = [sum(h * e for h, e in zip(state, row, strict=True)) for row in embedding.tolist()]
        total -= log_sigmoid(scores[target]) + sum(log_sigmoid(-scores[item]) for item in wrong) / len(wrong)
    assert bce(hidden, embedding, targets, negatives).item() == pytest.approx(total / len(targets), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), copies=st.integers(1, 40))
def test_bce_of_copies_of_one_negative_is_bce_of_that_negative(seed: int, copies: int) -> None:
    hidden, embedding, targets = case(seed)
    one = targets[:, None] % NUM_ITEMS + 1
    single = bce(hidden, embedding, targets, one)
    assert bce(hidden, embedding, targets, one.repeat(1, copies)).item() == pytest.approx(single.item(), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), order=st.permutations(range(1, NUM_ITEMS + 1)))
def test_sampled_softmax_over_the_whole_catalogue_is_cross_entropy(seed: int, order: list[int]) -> None:
    # each row's own target is hidden from its negatives, so it counts once
    hidden, embedding, targets = case(seed)
    sampled = sampled_softmax(hidden, embedding, targets, torch.tensor(order))
    full = cross_entropy(hidden, embedding, targets)
    assert sampled.item() == pytest.approx(full.item(), abs=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(sampled, (hidden, embedding)), torch.autograd.grad(full, (hidden, embedding)), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-12


def test_sampled_softmax_equals_the_sum_written_out() -> None:
    hidden, embedding, targets = case(3)
    negatives = [2, 7, 7, 4]
    total = 0.0
    for state, target in zip(hidden.tolist(), targets.tolist(), strict=True):
        scores = [sum(h * e for h, e in zip(state, row, strict=True)) for row in embedding.tolist()]
        rivals = sum(math.exp(scores[item]) for item in negatives if item != target)
        total -= scores[target] - math.log(math.exp(scores[target]) + rivals)
    loss = sampled_softmax(hidden, embedding, targets, torch.tensor(negatives))
    assert loss.item() == pytest.approx(total / len(targets), abs=1e-12)


def test_a_negative_that_is_the_target_of_every_row_costs_nothing() -> None:
    hidden, embedding, _ = case(1)
    loss = sampled_softmax(hidden, embedding, torch.full((6,), 4), torch.tensor([4, 4]))
    assert loss.item() == 0.0
    gradients = torch.autograd.grad(loss, (hidden, embedding))
    assert all((gradient == 0).all() for gradient in gradients), "not NaN, although every negative is hidden"


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_gradients_stay_finite_however_sure_the_model_is(scale: float) -> None:
    for seed in range(3):
        hidden, embedding, targets = case(seed)
        wrong = targets[:, None] % NUM_ITEMS + 1
        for loss in (
            cross_entropy(hidden * scale, embedding, targets),
            bce(hidden * scale, embedding, targets, wrong),
            sampled_softmax(hidden * scale, embedding, targets, torch.tensor([1, 2, 3])),
        ):
            assert loss.isfinite()
            for gradient in torch.autograd.grad(loss, (hidden, embedding)):
                assert gradient.isfinite().all()
                assert gradient.abs().max() > 0


def test_no_loss_touches_the_padding_row() -> None:
    hidden, embedding, targets = case(2)
    wrong = targets[:, None] % NUM_ITEMS + 1
    for loss in (
        cross_entropy(hidden, embedding, targets),
        bce(hidden, embedding, targets, wrong),
        sampled_softmax(hidden, embedding, targets, torch.arange(1, NUM_ITEMS + 1)),
    ):
        (gradient,) = torch.autograd.grad(loss, embedding)
        assert (gradient[0] == 0).all()
        assert gradient[targets].abs().sum(-1).min() > 0
