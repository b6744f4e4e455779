"""The model, compared with an independent oracle: left-padded, explicit masks, complex rotation, plain softmax."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sasrec.model import Dropout, SASRec, SASRecConfig, attention, rotate, rotation_table

NUM_ITEMS = 30
POSITIONS = ["learned", "rope"]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Build models, including their tables of rotations, in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(seed: int = 0, **shape: Any) -> SASRec:
    """Weights large enough that attention is far from uniform and every part matters."""
    defaults: dict[str, Any] = {"num_items": NUM_ITEMS, "max_len": 7, "hidden_units": 8, "dropout_rate": 0.5}
    model = SASRec(SASRecConfig(**(defaults | shape))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.5, generator=generator)
    return model


def random_row(length: int, seed: int) -> list[int]:
    return torch.randint(1, NUM_ITEMS + 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(rows: list[list[int]], width: int | None = None) -> Tensor:
    width = width or max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


# --- the oracle


def oracle_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-8).sqrt() * norm.weight + norm.bias


def oracle_rotation(x: Tensor) -> Tensor:
    """Multiply pair j of token t in x (T, Dh), as a complex number, by e^(i t 10000^(-2j / Dh))."""
    time, width = x.shape
    half = width // 2
    rotated = torch.empty(time, half, dtype=torch.complex128)
    for t in range(time):
        for j in range(half):
            angle = t * 10_000 ** (-2 * j / width)
            rotated[t, j] = torch.complex(x[t, j], x[t, j + half]) * complex(math.cos(angle), math.sin(angle))
    return torch.cat((rotated.real, rotated.imag), -1)


def oracle_attention(x: Tensor, block: nn.Module, allowed: Tensor, rope: bool) -> Tensor:
    """Map (T, D) to (T, D), one head after the other."""
    attention: Any = block.attention
    width = x.shape[1] // attention.num_heads
    query, key, value = (x @ attention.qkv.weight.T + attention.qkv.bias).split(x.shape[1], dim=1)
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = query[:, part], key[:, part], value[:, part]
        if rope:
            q, k = oracle_rotation(q), oracle_rotation(k)
        weights = (q @ k.T / math.sqrt(width)).exp() * allowed  # a query at padding attends to nothing: 0 / 0
        heads.append(weights / weights.sum(1, keepdim=True).clamp(min=1e-300) @ v)
    return torch.cat(heads, 1) @ attention.out.weight.T + attention.out.bias


@torch.no_grad()
def oracle(model: SASRec, row: list[int]) -> Tensor:
    """Return hidden states (len(row), D): zeros on the left up to max_len, positions 0 to max_len - 1, two masks."""
    max_len, rope = model.config.max_len, model.config.position == "rope"
    tokens = torch.tensor([0] * (max_len - len(row)) + row)
    positions = torch.arange(max_len)
    x = model.item_embedding.weight[tokens]
    if model.config.scale_embeddings:
        x = x * math.sqrt(x.shape[1])
    if not rope:
        x = x + model.position_embedding.weight[positions]
    causal = positions[None, :] <= positions[:, None]
    allowed = (causal & (tokens != 0)[None, :]).double()
    for block in model.blocks:
        x = x + oracle_attention(oracle_norm(x, block.attention_norm), block, allowed, rope)
        inner = oracle_norm(x, block.feed_forward_norm) @ block.feed_forward[0].weight.T + block.feed_forward[0].bias
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))  # GELU
        x = x + inner @ block.feed_forward[3].weight.T + block.feed_forward[3].bias
    return oracle_norm(x, model.final_norm)[max_len - len(row) :]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("scale_embeddings", [True, False])
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 1), (2, 2), (3, 1), (3, 4)])
def test_the_model_equals_the_left_padded_oracle_at_every_length(
    position: str, num_blocks: int, num_heads: int, scale_embeddings: bool
) -> None:
    model = make_model(position=position, num_blocks=num_blocks, num_heads=num_heads, scale_embeddings=scale_embeddings)
    for length in range(1, model.config.max_len + 1):
        row = random_row(length, seed=length)
        assert model(padded([row]))[0].sub(oracle(model, row)).abs().max() < 1e-12, f"length {length}"


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), position=st.sampled_from(POSITIONS))
def test_a_row_alone_equals_the_row_in_any_batch_with_any_padding(lengths: list[int], position: str) -> None:
    model = make_model(position=position, num_heads=2)
    rows = [random_row(length, seed) for seed, length in enumerate(lengths)]
    for width in {max(lengths), 7}:
        together = model(padded(rows, width))
        for n, row in enumerate(rows):
            assert together[n, : len(row)].sub(model(padded([row]))[0]).abs().max() < 1e-12


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    position=st.sampled_from(POSITIONS),
    num_blocks=st.integers(1, 3),
)
def test_one_position_per_row_equals_it_among_all_positions(lengths: list[int], position: str, num_blocks: int) -> None:
    model = make_model(position=position, num_heads=2, num_blocks=num_blocks)
    rows = padded([random_row(length, seed) for seed, length in enumerate(lengths)], 7)
    newest = torch.tensor(lengths) - 1
    every = model(rows)[torch.arange(len(rows)), newest]
    assert model(rows, newest).sub(every).abs().max() < 1e-12


@pytest.mark.parametrize("position", POSITIONS)
def test_the_padding_row_of_the_embedding_has_no_effect(position: str) -> None:
    model = make_model(position=position)
    rows = [random_row(4, 1), random_row(6, 2)]
    before = model(padded(rows, 7))
    with torch.no_grad():
        model.item_embedding.weight[0] = 1e3
    after = model(padded(rows, 7))
    for n, row in enumerate(rows):
        assert torch.equal(before[n, : len(row)], after[n, : len(row)])


@pytest.mark.parametrize("position", POSITIONS)
def test_changing_a_token_changes_its_own_and_later_states_and_none_before(position: str) -> None:
    model = make_model(position=position)
    row = random_row(7, seed=3)
    states = model(padded([row]))[0]
    for at in range(7):
        changed = row.copy()
        changed[at] = row[at] % NUM_ITEMS + 1
        difference = model(padded([changed]))[0].sub(states).abs().amax(-1)
        assert (difference[:at] == 0).all()
        assert (difference[at:] > 1e-6).all()


def test_a_learned_position_counts_from_the_newest_token_so_a_growing_window_changes_every_state() -> None:
    learned, rope = make_model(position="learned"), make_model(position="rope")
    row = random_row(5, seed=4)
    for model, moves in ((learned, True), (rope, False)):
        old, new = model(padded([row[:4]]))[0], model(padded([row]))[0, :4]
        assert bool((old - new).abs().amax(-1).min() > 1e-6) is moves
        assert torch.allclose(old, new) is not moves


def test_rotary_scores_depend_only_on_the_distance() -> None:
    cos, sin = rotation_table(20, 6)
    query, key = torch.randn(2, 1, 1, 1, 6, generator=torch.Generator().manual_seed(5))
    scores = {
        (i, j): float((rotate(query, cos[i], sin[i]) * rotate(key, cos[j], sin[j])).sum())
        for i in range(20)
        for j in range(20)
    }
    for (i, j), score in scores.items():
        if i and j:
            assert score == pytest.approx(scores[i - 1, j - 1], abs=1e-12)
    assert abs(scores[5, 0] - scores[4, 0]) > 1e-3


def test_converting_a_float32_model_keeps_its_rotations_to_float32_precision() -> None:
    torch.set_default_dtype(torch.float32)
    converted = SASRec(SASRecConfig(num_items=3, max_len=200, hidden_units=64)).double()
    torch.set_default_dtype(torch.float64)
    exact, _ = rotation_table(200, 64)
    assert converted.rotary_cos.dtype == torch.float64
    assert torch.as_tensor(converted.rotary_cos).sub(exact).abs().max() < 1e-7


def test_logits_are_the_dot_products_with_the_item_embedding() -> None:
    model = make_model()
    hidden = model(padded([random_row(3, 1), random_row(5, 2)]))
    logits = model.logits(hidden)
    assert logits.shape == (2, 5, NUM_ITEMS + 1)
    for item in (1, 17, NUM_ITEMS):
        assert torch.allclose(logits[1, 2, item], (hidden[1, 2] * model.item_embedding.weight[item]).sum())


@pytest.mark.parametrize("position", POSITIONS)
def test_dropout_acts_in_training_only(position: str) -> None:
    model = make_model(position=position)
    items = padded([random_row(5, 1)])
    assert torch.equal(model(items), model(items))
    model.train()
    assert not torch.equal(model(items), model(items))


@pytest.mark.parametrize("position", POSITIONS)
def test_every_weight_except_the_padding_row_is_trained(position: str) -> None:
    model = make_model(position=position, num_blocks=2)
    rows = [list(range(1, 8)), random_row(4, 2)]
    (model(padded(rows))[0].pow(3).sum() + model(padded(rows))[1, :4].pow(3).sum()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name
    assert model.item_embedding.weight.grad is not None
    assert (model.item_embedding.weight.grad[0] == 0).all()


def test_a_row_longer_than_max_len_is_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens in a row but max_len=7"):
        make_model()(torch.ones(1, 8, dtype=torch.int64))


class DroppingCache:
    """The cache that DESIGN.md warns of: it stores the newest ``size`` rows and drops the oldest row on each click."""

    def __init__(self, model: SASRec, size: int) -> None:
        self._model, self._size, self._clicks = model, size, 0
        self._rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.blocks]

    def click(self, item: int) -> Tensor:
        """Return the hidden state of the new token, (D,)."""
        model = self._model
        cos, sin = (table[self._clicks] for table in model.rotation)
        x = model.item_embedding(torch.tensor(item)) * model.item_scale
        for rows, block in zip(self._rows, model.blocks, strict=True):
            query, key, value = block.attention.qkv(block.attention_norm(x)).view(3, 1, -1)  # type: ignore[operator, union-attr]
            rows.append((rotate(key, cos, sin), value))
            del rows[: -self._size]
            keys, values = (torch.stack(stored)[None] for stored in zip(*rows, strict=True))  # (1, L, 1, D)
            seen = torch.ones(1, 1, len(rows), dtype=torch.bool)
            attended = attention(rotate(query, cos, sin)[None, None], keys, values, seen).flatten()
            x = x + block.attention.out(attended)  # type: ignore[operator, union-attr]
            x = x + block.feed_forward(block.feed_forward_norm(x))  # type: ignore[operator]
        self._clicks += 1
        hidden: Tensor = model.final_norm(x)
        return hidden


@torch.no_grad()
@pytest.mark.parametrize(("num_blocks", "agrees"), [(1, True), (2, False), (3, False)])
def test_with_two_blocks_dropping_old_cache_rows_does_not_equal_the_shorter_window(
    num_blocks: int, agrees: bool
) -> None:
    # This is why windows are anchored: layer 2's cached rows have attended to the item whose row was dropped.
    model = make_model(max_len=20, num_blocks=num_blocks)
    row, size = random_row(20, seed=6), 6
    cache = DroppingCache(model, size)
    for n in range(1, 21):
        cached = cache.click(row[n - 1])
        difference = (cached - model(padded([row[max(0, n - size) : n]]))[0, -1]).abs().max()
        if n <= size or agrees:
            assert difference < 1e-10
        else:
            assert difference > 1e-3, f"after {n} tokens"


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_item_dropout_hides_whole_items_only_in_training_and_moves_no_positions(position: str) -> None:
    model = make_model(position=position, dropout_rate=0.0, item_dropout_rate=0.3)
    blind = copy.deepcopy(model)
    with torch.no_grad():
        blind.item_embedding.weight.zero_()
    rows = torch.randint(1, NUM_ITEMS + 1, (4_000, 1), generator=torch.Generator().manual_seed(6))
    seen, hidden = model.eval()(rows), blind.eval()(rows)
    assert torch.equal(model(rows), seen)
    torch.manual_seed(7)
    trained = model.train()(rows)
    is_seen = (trained - seen).abs().amax((1, 2)) < 1e-9
    assert torch.allclose(trained[~is_seen], hidden[~is_seen])
    assert (~is_seen).double().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 0}, "num_items=0: must be a whole number of at least 1"),
        ({"max_len": 0}, "max_len=0"),
        ({"max_len": 2.5}, "max_len=2.5"),
        ({"num_blocks": -1}, "num_blocks=-1"),
        ({"num_heads": True}, "num_heads=True"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0: must be at least 0 and below 1"),
        ({"dropout_rate": float("nan")}, "dropout_rate=nan"),
        ({"item_dropout_rate": -0.1}, "item_dropout_rate=-0.1: must be at least 0 and below 1"),
        ({"position": "sinus"}, "position='sinus': must be 'learned' or 'rope'"),
        ({"num_heads": 3}, "hidden_units=64 is not a multiple of num_heads=3"),
        ({"hidden_units": 6, "num_heads": 2}, "must be even, not 3"),
    ],
)
def test_an_impossible_shape_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SASRecConfig(**({"num_items": 10} | change))


def test_learned_positions_do_not_need_an_even_head() -> None:
    model = make_model(position="learned", hidden_units=6, num_heads=2)
    row = random_row(4, 1)
    assert torch.allclose(model(padded([row]))[0], oracle(model, row))


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.999])
def test_dropout_drops_its_share_preserves_the_mean_and_acts_only_in_training(rate: float) -> None:
    torch.manual_seed(0)
    dropout, ones = Dropout(rate), torch.ones(1_003, 999)
    assert torch.equal(dropout.eval()(ones), ones)
    dropped = dropout.train()(ones)
    assert (dropped == 0).float().mean().item() == pytest.approx(rate, abs=0.004)
    assert set(dropped.unique().tolist()) == {0.0, 256 / dropout.survivors}
    assert dropped.mean().item() == pytest.approx(1, abs=0.1 if rate > 0.9 else 0.01)
    assert not torch.equal(dropped, dropout(ones))
    columns = dropped.count_nonzero(0) / len(dropped)  # all places are dropped equally often
    assert (columns - (1 - rate)).abs().max() < 0.1


def test_the_gradient_of_dropout_is_its_mask() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    dropout = Dropout(0.5).train()
    torch.manual_seed(1)
    dropped = dropout(x)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (dropped != 0).float() * 2)
