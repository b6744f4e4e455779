"""Losses, compared with sums written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sasrec.training.losses import (
    CHUNK_SCORES,
    bce,
    cross_entropy,
    full_mse,
    gbce,
    inclusion,
    info_nce,
    mse,
    sampled_softmax,
)

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
def test_bce_of_copies_of_one_negative_equals_bce_of_that_negative(seed: int, copies: int) -> None:
    hidden, embedding, targets = case(seed)
    one = targets[:, None] % NUM_ITEMS + 1
    single = bce(hidden, embedding, targets, one)
    assert bce(hidden, embedding, targets, one.repeat(1, copies)).item() == pytest.approx(single.item(), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_info_nce_against_all_other_items_is_cross_entropy(seed: int) -> None:
    hidden, embedding, targets = case(seed)
    negatives = torch.tensor([others(target) for target in targets.tolist()])
    outcomes = torch.rand(len(targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for weights in (None, outcomes):
        ours = info_nce(hidden, embedding, targets, negatives, weights)
        full = cross_entropy(hidden, embedding, targets, weights)
        assert ours.item() == pytest.approx(full.item(), abs=1e-12)


def test_info_nce_of_one_negative_is_minus_the_log_probability_that_the_target_ranks_above_it() -> None:
    hidden, embedding, targets = case(1)
    negatives = targets[:, None] % NUM_ITEMS + 1
    ahead = ((embedding[targets] - embedding[negatives[:, 0]]) * hidden).sum(1).tolist()
    expected = -sum(map(log_sigmoid, ahead)) / len(ahead)
    assert info_nce(hidden, embedding, targets, negatives).item() == pytest.approx(expected, abs=1e-12)


CATALOGUE = torch.arange(1, NUM_ITEMS + 1)
CERTAIN = torch.zeros(NUM_ITEMS, dtype=torch.float64)


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_sampled_softmax_over_the_whole_catalogue_is_cross_entropy(seed: int) -> None:
    hidden, embedding, targets = case(seed)
    sampled = sampled_softmax(hidden, embedding, targets, CATALOGUE, CERTAIN, targets[:, None])
    full = cross_entropy(hidden, embedding, targets)
    assert sampled.item() == pytest.approx(full.item(), abs=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(sampled, (hidden, embedding)), torch.autograd.grad(full, (hidden, embedding)), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-12


def test_sampled_softmax_equals_the_sum_written_out() -> None:
    hidden, embedding, _ = case(3)
    targets, candidates, chances = torch.tensor([2, 7, 2, 7, 4, 4]), [2, 4, 7, 9], [0.5, 0.9, 0.3, 0.2]
    certain = [[2, 7], [7, 7], [2, 2], [9, 7], [4, 4], [4, 2]]
    total = 0.0
    for state, target, sure in zip(hidden.tolist(), targets.tolist(), certain, strict=True):
        scores = [sum(h * e for h, e in zip(state, row, strict=True)) for row in embedding.tolist()]
        total += math.log(
            sum(math.exp(scores[j]) / (1 if j in sure else p) for j, p in zip(candidates, chances, strict=True))
        )
        total -= scores[target]
    log_inclusion = torch.tensor(chances, dtype=torch.float64).log()
    loss = sampled_softmax(hidden, embedding, targets, torch.tensor(candidates), log_inclusion, torch.tensor(certain))
    assert loss.item() == pytest.approx(total / len(targets), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), shape=st.sampled_from([1, 2, 7]))
def test_left_out_items_are_not_ranked_but_the_target_always_is(seed: int, shape: int) -> None:
    hidden, embedding, targets = case(seed)
    rng = torch.Generator().manual_seed(seed)
    left_out = torch.randint(1, NUM_ITEMS + 1, (len(targets), shape), generator=rng)
    hidden_scores = hidden @ embedding.T
    mask = torch.zeros_like(hidden_scores, dtype=torch.bool).scatter(1, left_out, True)
    mask = mask.scatter(1, targets[:, None], False)
    mask[:, 0] = True
    expected = torch.nn.functional.cross_entropy(hidden_scores.masked_fill(mask, -torch.inf), targets)
    for found in (
        cross_entropy(hidden, embedding, targets, None, left_out),
        sampled_softmax(hidden, embedding, targets, CATALOGUE, CERTAIN, targets[:, None], None, left_out),
    ):
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
        ours = torch.autograd.grad(found, (hidden, embedding))
        for one, other in zip(ours, torch.autograd.grad(expected, (hidden, embedding), retain_graph=True), strict=True):
            assert (one - other).abs().max() < 1e-12


def test_leaving_out_an_item_that_is_no_candidate_changes_nothing() -> None:
    hidden, embedding, _ = case(3)
    targets, candidates = torch.tensor([2, 7, 2, 7, 4, 4]), torch.tensor([2, 4, 7])
    log_inclusion = torch.zeros(3, dtype=torch.float64)
    some, none = (
        sampled_softmax(hidden, embedding, targets, candidates, log_inclusion, targets[:, None], None, left_out)
        for left_out in (torch.full((6, 3), 9), None)
    )
    assert some.item() == none.item()


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_inclusion_is_the_share_of_samples_that_contain_an_item(drawn: int) -> None:
    share = torch.tensor([0, 0.5, 0.3, 0.2, 0, 0])
    rng = torch.Generator().manual_seed(1)
    times, positions = 20_000, 3
    targets = torch.multinomial(share, times * positions, replacement=True, generator=rng).view(times, positions)
    negatives = torch.randint(1, 6, (times, drawn), generator=rng)
    sample = torch.cat((targets, negatives), 1)
    items = torch.arange(1, 6)
    measured = (sample[:, :, None] == items).any(1).double().mean(0)
    assert inclusion(items, share, positions, drawn).exp() == pytest.approx(measured, abs=0.015)


def test_the_denominator_is_estimated_without_bias() -> None:
    _, embedding, _ = case(5)
    share = torch.tensor([0, 0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.0])
    weights = (embedding[1:].detach() @ embedding[1].detach()).exp()  # of each item, for one state
    rng, sums = torch.Generator().manual_seed(2), []
    for _ in range(4_000):
        targets = torch.multinomial(share, 4, replacement=True, generator=rng)
        sample = torch.unique(torch.cat((targets, torch.randint(1, NUM_ITEMS + 1, (3,), generator=rng))))
        sums.append((weights[sample - 1] / inclusion(sample, share, 4, 3).exp()).sum().item())
    assert sum(sums) / len(sums) == pytest.approx(weights.sum().item(), rel=0.03)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_gradients_are_finite_even_for_very_confident_models(scale: float) -> None:
    for seed in range(3):
        hidden, embedding, targets = case(seed)
        wrong = targets[:, None] % NUM_ITEMS + 1
        for loss in (
            cross_entropy(hidden * scale, embedding, targets),
            bce(hidden * scale, embedding, targets, wrong),
            sampled_softmax(hidden * scale, embedding, targets, CATALOGUE, CERTAIN, targets[:, None]),
        ):
            assert loss.isfinite()
            for gradient in torch.autograd.grad(loss, (hidden, embedding)):
                assert gradient.isfinite().all()
                assert gradient.abs().max() > 0


def test_no_loss_changes_the_padding_row() -> None:
    hidden, embedding, targets = case(2)
    wrong = targets[:, None] % NUM_ITEMS + 1
    for loss in (
        cross_entropy(hidden, embedding, targets),
        bce(hidden, embedding, targets, wrong),
        sampled_softmax(hidden, embedding, targets, CATALOGUE, CERTAIN, targets[:, None]),
    ):
        (gradient,) = torch.autograd.grad(loss, embedding)
        assert (gradient[0] == 0).all()
        assert gradient[targets].abs().sum(-1).min() > 0


# --- outcomes, other losses, and the cross-entropy's own gradient


def labels(targets: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(len(targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positions", [1, 6, 100])
def test_the_gradient_of_cross_entropy_equals_that_of_the_whole_matrix(
    positions: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_SCORES, "cpu", 1)  # chunks of 16 rows
    hidden, embedding, targets = case(3, positions)
    outcomes = labels(targets) if weighted else None
    each = torch.nn.functional.cross_entropy(hidden @ embedding[1:].T, targets - 1, reduction="none")
    plain = (each if outcomes is None else each * outcomes).mean()
    expected = torch.autograd.grad(3 * plain, (hidden, embedding))
    loss = cross_entropy(hidden, embedding, targets, outcomes)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, (hidden, embedding)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert cross_entropy(hidden, embedding, targets, outcomes).item() == pytest.approx(plain.item(), abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_squared_error_of_all_items_and_its_gradient_equal_those_of_the_whole_matrix(
    weighted: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_SCORES, "cpu", 1)  # chunks of 16 rows
    hidden, embedding, targets = case(3, 50)
    outcomes = labels(targets) if weighted else None
    left_out = torch.stack((targets, targets % NUM_ITEMS + 1), 1) if masked else None
    scores = hidden @ embedding[1:].T
    counted = torch.ones_like(scores, dtype=torch.bool).scatter(1, targets[:, None] - 1, False)
    if left_out is not None:
        counted = counted.scatter(1, left_out - 1, False)
    wanted = scores.gather(1, targets[:, None] - 1)[:, 0] - (1 if outcomes is None else outcomes)
    plain = (wanted**2 + 7 * (scores * counted).square().mean(1)).mean()
    loss = full_mse(hidden, embedding, targets, 7, outcomes, left_out)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    expected = torch.autograd.grad(plain, (hidden, embedding))
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, embedding)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_autocast_rounds_the_products_and_nothing_else() -> None:
    hidden, embedding, targets = case(3, 200)
    hidden, embedding = hidden.detach().float().requires_grad_(), embedding.detach().float().requires_grad_()
    exact = cross_entropy(hidden, embedding, targets)
    exact_gradients = torch.autograd.grad(exact, (hidden, embedding))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cross_entropy(hidden, embedding, targets)
    gradients = torch.autograd.grad(rounded, (hidden, embedding))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=5e-3)
    assert rounded.item() != exact.item(), "otherwise it was not computed in bfloat16"
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_cross_entropy_of_large_scores_is_finite() -> None:
    hidden, embedding, targets = case(1)
    loss = cross_entropy(hidden * 1e4, embedding, targets)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("loss", [bce, mse])
@pytest.mark.parametrize("count", [0, 1, 10])
def test_negatives_weigh_as_much_as_the_positive_at_any_number(loss: Callable[..., Tensor], count: int) -> None:
    hidden, embedding, targets = case(2)
    wrong = torch.tensor([others(target)[0] for target in targets.tolist()])
    one = loss(hidden, embedding, targets, wrong[:, None])
    positive_part = loss(hidden, embedding, targets, wrong[:, None][:, :0])
    several = loss(hidden, embedding, targets, wrong[:, None].expand(-1, count))
    assert several.item() == pytest.approx((one if count else positive_part).item(), abs=1e-12)
    assert one.item() > positive_part.item()


def test_bce_with_soft_labels_equals_the_cross_entropy_of_two_outcomes() -> None:
    hidden, embedding, targets = case(4)
    outcomes = labels(targets)
    score = (hidden * embedding[targets]).sum(-1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(score, outcomes)
    none = torch.empty(len(targets), 0, dtype=torch.int64)
    assert bce(hidden, embedding, targets, none, outcomes).item() == pytest.approx(expected.item(), abs=1e-12)
    ones = torch.ones(len(targets), dtype=torch.float64)
    negatives = torch.tensor([others(target)[:2] for target in targets.tolist()])
    assert bce(hidden, embedding, targets, negatives, ones).item() == pytest.approx(
        bce(hidden, embedding, targets, negatives).item(), abs=1e-12
    )


def test_mse_equals_the_sum_written_out() -> None:
    hidden, embedding, targets = case(5)
    outcomes = 5 * labels(targets)
    negatives = torch.tensor([others(target)[:3] for target in targets.tolist()])
    total = 0.0
    for row, (target, wrong, outcome) in enumerate(zip(targets, negatives, outcomes, strict=True)):
        total += ((hidden[row] @ embedding[target] - outcome) ** 2).item()
        total += sum((hidden[row] @ embedding[item]).item() ** 2 for item in wrong) / 3
    assert mse(hidden, embedding, targets, negatives, outcomes).item() == pytest.approx(total / 6, abs=1e-12)


@pytest.mark.parametrize("few", [64, 1], ids=lambda few: f"more than {few} negatives are many")
@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
def test_gbce_equals_the_sum_written_out(monkeypatch: pytest.MonkeyPatch, calibration: float, few: int) -> None:
    monkeypatch.setattr("sasrec.training.losses.FEW_ITEMS", few)
    hidden, embedding, targets = case(6)
    negatives = torch.tensor([others(target)[:4] for target in targets.tolist()])
    rate = 4 / (NUM_ITEMS - 1)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    assert beta == pytest.approx({0.0: 1.0, 1.0: rate}.get(calibration, beta))
    total = 0.0
    for row, (target, wrong) in enumerate(zip(targets, negatives, strict=True)):
        total -= beta * log_sigmoid((hidden[row] @ embedding[target]).item())
        total -= sum(log_sigmoid(-(hidden[row] @ embedding[item]).item()) for item in wrong)
    expected = total / (len(targets) * 5)
    assert gbce(hidden, embedding, targets, negatives, calibration).item() == pytest.approx(expected, abs=1e-12)


def test_a_position_of_weight_0_has_no_gradient() -> None:
    hidden, embedding, targets = case(7)
    outcomes = torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=torch.float64)
    for loss, more in ((cross_entropy, ()), (sampled_softmax, (CATALOGUE, CERTAIN, targets[:, None]))):
        grad = torch.autograd.grad(loss(hidden, embedding, targets, *more, outcomes), hidden)[0]
        assert (grad[5] == 0).all()
        assert (grad[:5] != 0).any(1).all()
