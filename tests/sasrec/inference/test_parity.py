"""A cached click has the hidden state of the re-encoded anchored window. All of incremental inference rests on this.

Three independent ways to one hidden state are compared: an Engine that decodes from its cache, an Engine without a
cache, and the bare model on the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray
from torch import Tensor

from sasrec.data.vocab import ItemVocab
from sasrec.inference.engine import PACKED_TOKENS, Engine
from sasrec.inference.kernels import Floats, Indices, KeyValues
from sasrec.inference.kv_cache import CacheStats, KVCache
from sasrec.inference.packed import PACKED_THREADS, PackedForward
from sasrec.model import SASRec, SASRecConfig

NUM_ITEMS = 40
EXACT, FLOAT32 = 1e-10, 1e-4


def make_model(max_len: int, dtype: torch.dtype = torch.float64, **shape: Any) -> SASRec:
    """Weights large enough that attention is far from uniform and every token of the window matters."""
    shape = {"num_blocks": 2, "num_heads": 1, "hidden_units": 8} | shape
    model = SASRec(SASRecConfig(num_items=NUM_ITEMS, max_len=max_len, **shape)).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.5, generator=generator)
    return model


def make_engine(model: SASRec, slots: int, **options: Any) -> Engine:
    """Make an engine; with slots=0 it re-encodes."""
    one = KVCache.bytes_per_slot(model.config, model.item_embedding.weight)
    engine = Engine(model, ItemVocab(map(str, range(NUM_ITEMS))), cache_bytes=slots * one, **options)
    assert engine.slots == slots
    return engine


def window_of(history: list[int], max_len: int, slack: int) -> list[int]:
    """Find the window by replaying the clicks one by one, without the formula."""
    start = 0
    for n in range(1, len(history) + 1):
        if n - start > max_len:
            start += slack
    return [token for token in history[start:] if token]


@torch.no_grad()
def plain(model: SASRec, window: list[int]) -> Tensor:
    return model(torch.tensor([window]))[0, -1]


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the number of tokens in each forward pass."""
    tokens: list[int] = []
    encode = PackedForward.encode

    def counted(forward: PackedForward, items: NDArray[np.int64], *rest: Any) -> Floats:
        tokens.append(len(items))
        return encode(forward, items, *rest)

    monkeypatch.setattr(PackedForward, "encode", counted)
    return tokens


# --- one user, click by click


WINDOWS = [(1, 1), (2, 1), (5, 1), (5, 5), (7, 4), (8, 3), (16, 4), (16, 8)]


@pytest.mark.parametrize(("max_len", "slack"), WINDOWS)
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_three_hundred_clicks_from_the_cache_equal_re_encoding_and_the_plain_model(
    max_len: int, slack: int, num_blocks: int, num_heads: int
) -> None:
    model = make_model(max_len, num_blocks=num_blocks, num_heads=num_heads)
    cached, fresh = make_engine(model, slots=1, slack=slack), make_engine(model, slots=0, slack=slack)
    history: list[int] = []
    windows, states = [], []
    rng = Random(2)
    for _ in range(320):
        history.append(rng.choice([token for token in range(1, NUM_ITEMS + 1) if token not in history[-1:]]))
        windows.append(cached.window(history).tolist())
        assert windows[-1] == window_of(history, max_len, slack)
        states.append(cached.encode([windows[-1]], ["user"])[0])
    assert largest_difference(torch.stack(states), fresh.encode(windows)) < EXACT
    for state, window in zip(states, windows, strict=True):
        assert largest_difference(state, plain(model, window)) < EXACT
    jumps = sum(len(new) <= len(old) for old, new in pairwise(windows))
    assert jumps >= (320 - max_len) // slack
    assert cached.take_stats() == CacheStats(hits=319 - jumps, misses=1 + jumps), "encoded whole at jumps only"


def test_between_jumps_a_click_costs_one_token_and_at_a_jump_one_window(forwards: list[int]) -> None:
    engine = make_engine(make_model(8), slots=1, slack=3)
    history = [n % NUM_ITEMS + 1 for n in range(50)]
    for n in range(1, 51):
        engine.encode([engine.window(history[:n]).tolist()], ["user"])
    # anchors jump at 9, 12, 15, ... events, onto windows of 8 - 3 + 1 tokens
    assert forwards == [6 if n >= 9 and n % 3 == 0 else 1 for n in range(1, 51)]


def test_a_batch_goes_through_the_model_at_once_and_pads_no_user_to_another(forwards: list[int]) -> None:
    model = make_model(8)
    engine = make_engine(model, slots=4)
    engine.encode([[1, 2, 3], [4, 5, 6, 7, 8]], ["one", "three"])
    # one token, three tokens, a window of two that is new and one of seven
    windows = [[1, 2, 3, 4], [4, 5, 6, 7, 8, 9, 1, 2], [9, 8], [7, 6, 5, 4, 3, 2, 1]]
    states = engine.encode(windows, ["one", "three", "short", "long"])
    assert forwards == [3 + 5, 1 + 3 + 2 + 7]
    assert largest_difference(states, torch.stack([plain(model, window) for window in windows])) < EXACT


def test_the_answer_depends_on_every_token_of_the_window() -> None:
    # otherwise the parity above would prove little
    model = make_model(8)
    window = [3, 1, 4, 1, 5, 9, 2, 6]
    for at in range(8):
        changed = [*window[:at], 33, *window[at + 1 :]]
        assert largest_difference(plain(model, window), plain(model, changed)) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, FLOAT32)])
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 2), (3, 1)])
def test_every_window_length_reached_from_every_shorter_prefix(
    num_blocks: int, num_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    max_len = 9
    model = make_model(max_len, dtype, num_blocks=num_blocks, num_heads=num_heads)
    window = Random(3).choices(range(1, NUM_ITEMS + 1), k=max_len)
    expected = [plain(model, window[:length]) for length in range(1, max_len + 1)]
    for length in range(1, max_len + 1):
        for past in range(length + 1):  # 0: nothing cached; length: nothing new
            engine = make_engine(model, slots=1)
            if past:
                engine.encode([window[:past]], ["user"])
            state = engine.encode([window[:length]], ["user"])[0]
            assert largest_difference(state, expected[length - 1]) < tolerance, f"{length} tokens after {past}"
            assert engine.take_stats().hits == (past > 0)


@pytest.mark.parametrize(("max_len", "slack"), [(5, 1), (16, 4), (50, 12)])
def test_three_hundred_clicks_in_float32(max_len: int, slack: int) -> None:
    model = make_model(max_len, torch.float32, hidden_units=32, num_heads=2)
    engine = make_engine(model, slots=1, slack=slack)
    history = Random(4).choices(range(1, NUM_ITEMS + 1), k=300)
    for n in range(1, 301):
        window = engine.window(history[:n]).tolist()
        assert largest_difference(engine.encode([window], ["user"])[0], plain(model, window)) < FLOAT32
    assert engine.take_stats().hits == {1: 4, 4: 228, 12: 278}[slack]


def test_a_window_shorter_than_the_models_own() -> None:
    model = make_model(20)
    engine = make_engine(model, slots=1, max_len=6, slack=2)
    history = Random(5).choices(range(1, NUM_ITEMS + 1), k=60)
    for n in range(1, 61):
        window = window_of(history[:n], 6, 2)
        assert engine.window(history[:n]).tolist() == window
        assert largest_difference(engine.encode([window], ["user"])[0], plain(model, window)) < EXACT
    with pytest.raises(ValueError, match="a window of 7 tokens; 1 to max_len=6"):
        engine.encode([[1] * 7], ["user"])


def test_learned_positions_are_served_by_re_encoding() -> None:
    model = make_model(6, position="learned")
    engine = Engine(model, ItemVocab(map(str, range(NUM_ITEMS))), cache_bytes=2**20, slack=2)
    history = Random(6).choices(range(1, NUM_ITEMS + 1), k=40)
    for n in range(1, 41):
        window = engine.window(history[:n]).tolist()
        assert largest_difference(engine.encode([window], ["user"])[0], plain(model, window)) < EXACT
    assert (engine.slots, engine.cached_users) == (0, 0)


# --- many users


class Clicks:
    """Random traffic: interleaved users, several events at once, unknown items, repeated ones, lost sequences."""

    def __init__(self, seed: int, users: int, most_events: int) -> None:
        self.rng = Random(seed)
        self.histories: dict[int, list[int]] = {user: [] for user in range(users)}
        self._most_events = most_events

    def batch(self) -> list[int]:
        """Return some users, each with new events; sometimes none: a replay."""
        users = self.rng.sample(sorted(self.histories), self.rng.randint(1, len(self.histories)))
        for user in users:
            if self.rng.random() < 0.05:
                self.histories[user] = []
            count = self.rng.choice([0, 1, 1, 1, self.rng.randint(2, self._most_events)])
            self.histories[user] += [self.rng.choice([0, 1, 1, self.rng.randint(1, NUM_ITEMS)]) for _ in range(count)]
        return users


def assert_batch_is_right(engine: Engine, traffic: dict[int, list[int]], users: list[int], tolerance: float) -> None:
    windows = {user: window_of(traffic[user], engine.max_len, engine.slack) for user in users}
    users = [user for user in users if windows[user]]
    assert [engine.window(traffic[user]).tolist() for user in users] == [windows[user] for user in users]
    states = engine.encode([windows[user] for user in users], users)
    assert states.shape == (len(users), engine.model.config.hidden_units)
    for state, user in zip(states, users, strict=True):
        assert largest_difference(state, plain(engine.model, windows[user])) < tolerance


@pytest.mark.parametrize("slots", [1, 3, 7, 8, 20], ids=lambda slots: f"{slots} slots for 8 users")
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 1), (2, 2)])
def test_random_batches_of_interleaved_users_with_any_number_of_slots(
    slots: int, num_blocks: int, num_heads: int
) -> None:
    model = make_model(7, num_blocks=num_blocks, num_heads=num_heads)
    engine = make_engine(model, slots, slack=3)
    clicks = Clicks(seed=slots, users=8, most_events=25)
    for _ in range(60):
        assert_batch_is_right(engine, clicks.histories, clicks.batch(), EXACT)
        assert engine.cached_users <= slots
    assert max(map(len, clicks.histories.values())) > 5 * 7, "many windows long"
    stats = engine.take_stats()
    assert (stats.evictions > 0) is (slots < 8)
    assert stats.hits > 0


def test_random_batches_in_float32() -> None:
    engine = make_engine(make_model(12, torch.float32, hidden_units=32, num_heads=2), slots=5, slack=4)
    clicks = Clicks(seed=0, users=8, most_events=30)
    for _ in range(60):
        assert_batch_is_right(engine, clicks.histories, clicks.batch(), FLOAT32)


@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_a_batch_that_takes_several_forward_passes(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr("sasrec.inference.engine.PACKED_TOKENS", tokens)
    engine = make_engine(make_model(7), slots=8, slack=3)
    clicks = Clicks(seed=tokens, users=8, most_events=9)
    for _ in range(60):
        assert_batch_is_right(engine, clicks.histories, clicks.batch(), EXACT)
    assert engine.take_stats().hits > 100


def test_a_batch_larger_than_the_cache_is_returned_in_order() -> None:
    model = make_model(5)
    engine = make_engine(model, slots=3)
    windows = [[n, n + 1] for n in range(1, 12)]
    states = engine.encode(windows, list(range(11)))
    assert largest_difference(states, torch.stack([plain(model, window) for window in windows])) < EXACT
    assert engine.cached_users == 3


SHAPES = st.tuples(st.sampled_from(["learned", "rope"]), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.lists(st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=9), min_size=1, max_size=6), st.data())
def test_windows_encoded_at_once_equal_the_model_for_every_shape_packed_or_padded(
    shape: tuple[str, int, int, int], windows: list[list[int]], data: st.DataObject
) -> None:
    position, heads, units, blocks = shape
    units *= 1 + (
        position == "rope"
    )  # rope rotates pairs of units; with learned positions a head may have an odd number
    scaled = data.draw(st.booleans())
    options: dict[str, Any] = {"position": position, "num_heads": heads, "num_blocks": blocks}
    model = make_model(9, hidden_units=heads * units, scale_embeddings=scaled, **options)
    engine = make_engine(model, slots=0)
    expected = torch.stack([plain(model, window) for window in windows])
    for threads in (0, PACKED_THREADS):  # with more, many tokens at once go through PyTorch's modules
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sasrec.inference.packed.PACKED_THREADS", threads)
            patch.setattr("sasrec.inference.engine.PACKED_TOKENS", threads and PACKED_TOKENS)
            patch.setattr(torch, "get_num_threads", lambda: PACKED_THREADS)
            assert largest_difference(engine.encode(windows), expected) < EXACT


def test_more_rows_than_fit_into_one_forward_pass_are_returned_in_order_without_a_cache() -> None:
    model = make_model(4)
    windows = [[n % NUM_ITEMS + 1] * (n % 4 + 1) for n in range(600)]
    states = make_engine(model, slots=0).encode(windows)
    assert largest_difference(states, torch.stack([plain(model, window) for window in windows])) < EXACT


def test_the_least_recently_used_user_is_evicted() -> None:
    engine = make_engine(make_model(5), slots=2)
    engine.encode([[1], [2]], ["a", "b"])
    engine.encode([[1, 2]], ["a"])
    engine.encode([[3]], ["c"])  # takes the slot of b
    assert engine.take_stats() == CacheStats(hits=1, misses=3, evictions=1)
    engine.encode([[1, 2, 3]], ["a"])
    assert engine.take_stats() == CacheStats(hits=1), "a is cached"
    engine.encode([[2, 3]], ["b"])
    assert engine.take_stats() == CacheStats(misses=1, evictions=1), "b is not cached"


def test_users_of_one_batch_do_not_evict_each_other() -> None:
    engine = make_engine(make_model(5), slots=2)
    engine.encode([[1], [2]], ["old", "other"])
    engine.encode([[3], [1, 2]], ["new", "old"])  # new comes first; old is the least recently used
    assert engine.take_stats() == CacheStats(hits=1, misses=3, evictions=1)


def test_a_user_whose_sequence_was_lost_and_restarted_is_re_encoded() -> None:
    model = make_model(6)
    engine = make_engine(model, slots=2)
    for window in ([5, 6, 7, 8], [5], [5, 6, 9], [5, 6, 9], [9, 9, 9], [9, 9, 9, 9], [5, 6, 7, 8]):
        assert largest_difference(engine.encode([window], ["user"])[0], plain(model, window)) < EXACT
    assert engine.take_stats().hits == 3, "[5] + [6, 9], a replay, and 9 again; never another sequence's prefix"


def test_slots_of_forgotten_users_are_released() -> None:
    engine = make_engine(make_model(5), slots=3)
    engine.encode([[1], [2], [3]], ["a", "b", "c"])
    engine.forget(["b", "unknown user"])
    assert engine.cached_users == 2
    engine.encode([[4]], ["d"])
    assert engine.take_stats() == CacheStats(misses=4)
    engine.encode([[2, 5]], ["b"])
    assert engine.take_stats() == CacheStats(misses=1, evictions=1)
    engine.forget()
    assert engine.cached_users == 0
    engine.encode([[1, 2], [2], [3]], ["a", "b", "c"])
    assert engine.take_stats() == CacheStats(misses=3)


def test_two_engines_of_one_model_share_nothing() -> None:
    model = make_model(5)
    one, other = make_engine(model, slots=2), make_engine(model, slots=2)
    one.encode([[1, 2]], ["user"])
    assert other.cached_users == 0
    state = other.encode([[1, 2, 3]], ["user"])[0]
    assert other.take_stats() == CacheStats(misses=1)
    assert largest_difference(state, plain(model, [1, 2, 3])) < EXACT


def test_a_user_who_occurs_twice_in_a_batch_is_refused_and_nothing_changes() -> None:
    engine = make_engine(make_model(5), slots=2)
    with pytest.raises(ValueError, match="a user occurs twice"):
        engine.encode([[1], [1, 2]], ["user", "user"])
    assert engine.cached_users == 0


@pytest.mark.parametrize("window", [[], [1] * 6])
def test_an_empty_or_too_long_window_is_refused(window: list[int]) -> None:
    for slots in (0, 2):
        with pytest.raises(ValueError, match=f"a window of {len(window)} tokens; 1 to max_len=5"):
            make_engine(make_model(5), slots).encode([[1], window], ["a", "b"])


def test_no_windows_give_no_states() -> None:
    for slots in (0, 2):
        assert make_engine(make_model(5), slots).encode([], []).shape == (0, 8)


# --- faults


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Let torch.empty fill memory with NaN, by PyTorch's own switch."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("slots", [2, 6])
def test_uninitialised_memory_reaches_no_answer(slots: int) -> None:
    # users with different numbers of new tokens in one forward pass
    engine = make_engine(make_model(7), slots, slack=3)
    clicks = Clicks(seed=1, users=6, most_events=9)
    for _ in range(40):
        assert_batch_is_right(engine, clicks.histories, clicks.batch(), EXACT)


class PowerCut(Exception):
    """An error that nothing in the package expects."""


class FailingForward:
    """A forward pass that fails on demand, after writing garbage into the keys and values from a block on."""

    def __init__(self, forward: PackedForward, block: int) -> None:
        self.forward, self.block = forward, block
        self.calls_until_failure = -1

    def encode(self, items: Indices, key_values: KeyValues, slots: Indices, past: Indices, new: Indices) -> Floats:
        hidden = self.forward.encode(items, key_values, slots, past, new)
        self.calls_until_failure -= 1
        if self.calls_until_failure == 0:
            for slot, place, count in zip(slots, past, new, strict=True):
                key_values[self.block :, slot, :, :, place : place + count] = np.nan
            raise PowerCut
        return hidden


def sabotage(engine: Engine, block: int) -> FailingForward:
    assert engine._packed is not None
    failing = FailingForward(engine._packed, block)
    engine._packed = failing  # type: ignore[assignment]
    return failing


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("slots", [3, 8])
def test_after_an_exception_in_a_forward_pass_the_engines_answers_are_right(slots: int, block: int) -> None:
    model = make_model(7, num_blocks=3)
    engine = make_engine(model, slots, slack=3)
    failing = sabotage(engine, block)
    clicks = Clicks(seed=block, users=8, most_events=12)
    failures = 0
    for step in range(90):
        users = clicks.batch()
        if step % 3 == 2:
            failing.calls_until_failure = 1 + step % 2  # the batch's first forward pass, or the second, if any
            try:
                windows = {user: window_of(clicks.histories[user], 7, 3) for user in users}
                known = [user for user in users if windows[user]]
                engine.encode([windows[user] for user in known], known)
            except PowerCut:
                failures += 1
            failing.calls_until_failure = -1
        if step % 2:  # at once, or only after more clicks
            assert_batch_is_right(engine, clicks.histories, users, EXACT)
    assert failures >= 10


def test_after_a_failure_neither_the_old_state_nor_half_written_rows_are_used() -> None:
    model = make_model(6)
    engine = make_engine(model, slots=2)
    failing = sabotage(engine, block=1)
    engine.encode([[1, 2]], ["user"])
    failing.calls_until_failure = 1
    with pytest.raises(PowerCut):
        engine.encode([[1, 2, 3]], ["user"])
    for window in ([1, 2], [1, 2, 3], [1, 2, 3, 4]):
        assert largest_difference(engine.encode([window], ["user"])[0], plain(model, window)) < EXACT


# --- anything at all, against the oracle


TOKENS = st.lists(st.integers(0, 4), max_size=12)  # few items, so that prefixes recur; 0 is outside the vocabulary
USERS = st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True)


class EngineMachine(RuleBasedStateMachine):
    """Any order of clicks, replays, losses, evictions and failures; every answer is checked by re-encoding."""

    @initialize(slots=st.integers(1, 5), window=st.sampled_from([(1, 1), (4, 2), (5, 2), (6, 6)]))
    def start(self, slots: int, window: tuple[int, int]) -> None:
        model = make_model(window[0], num_heads=2)
        self.engine = make_engine(model, slots, slack=window[1])
        self.failing = sabotage(self.engine, block=1)
        self.histories: dict[int, list[int]] = {user: [] for user in range(5)}

    def check(self, users: list[int]) -> None:
        assert_batch_is_right(self.engine, self.histories, users, EXACT)

    @rule(clicks=st.dictionaries(st.integers(0, 4), TOKENS, min_size=1))
    def click(self, clicks: dict[int, list[int]]) -> None:
        for user, tokens in clicks.items():
            self.histories[user] += tokens
        self.check(list(clicks))

    @rule(users=USERS)
    def replay(self, users: list[int]) -> None:
        self.check(users)

    @rule(user=st.integers(0, 4), tokens=TOKENS)
    def lose_and_start_again(self, user: int, tokens: list[int]) -> None:
        self.histories[user] = tokens
        self.check([user])

    @rule(user=st.integers(0, 4), length=st.integers(0, 8))
    def go_back_in_time(self, user: int, length: int) -> None:
        self.histories[user] = self.histories[user][:length]
        self.check([user])

    @rule(users=st.none() | USERS)
    def forget(self, users: list[int] | None) -> None:
        self.engine.forget(users)

    @rule(users=USERS, token=st.integers(1, 4), after=st.integers(1, 3))
    def fail(self, users: list[int], token: int, after: int) -> None:
        self.failing.calls_until_failure = after
        for user in users:
            self.histories[user] = [*self.histories[user], token]
        with suppress(PowerCut):
            self.engine.encode([self.engine.window(self.histories[user]).tolist() for user in users], users)
        self.failing.calls_until_failure = -1

    @invariant()
    def no_more_users_than_slots(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.cached_users <= self.engine.slots


def test_any_order_of_clicks_losses_evictions_and_failures_gives_the_oracles_answers() -> None:
    run_state_machine_as_test(EngineMachine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


@settings(deadline=None, max_examples=60)
@given(
    history=st.lists(st.integers(0, NUM_ITEMS), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 25), min_size=1, max_size=12),
)
def test_events_in_any_portions_give_one_answer_in_the_end(history: list[int], cuts: list[int]) -> None:
    model = make_model(8)
    engine = make_engine(model, slots=1, slack=3)
    n = 0
    for cut in [*cuts, len(history)]:  # portions that end inside a window, at its end, and far across a jump
        n = min(len(history), n + cut)
        window = engine.window(history[:n]).tolist()
        assert window == window_of(history[:n], 8, 3)
        if window:
            assert largest_difference(engine.encode([window], ["user"])[0], plain(model, window)) < EXACT
