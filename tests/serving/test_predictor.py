"""Predictor: the engine's own answers, the popular list where it has none, and an event loop that has its turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sasrec import Engine, Ranking, SavedModel, load_model
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import Recommendation, UserSequence
from streamrec.serving.lists import SharedLists
from streamrec.serving.predictor import MAX_CALL_S, MAX_USERS_PER_CALL, MIN_USERS_PER_CALL, Predictor
from streamrec.settings import Settings

from support.redis_access import BASE_MS, raw_redis, stored

MakeSettings = Callable[..., Settings]
SCORE_TOLERANCE = 2e-5  # half of the last published digit, and float32 noise between batch sizes


@pytest.fixture(scope="module")
def saved(model_dir: Path) -> SavedModel:
    return load_model(model_dir)


class Bench:
    """A predictor with its parts at hand."""

    def __init__(self, saved: SavedModel, redis: RedisClient, settings: Settings, slots: int = 64) -> None:
        config, weight = saved.model.config, saved.model.item_embedding.weight
        slot_bytes = 2 * config.num_blocks * config.max_len * config.hidden_units * weight.element_size()
        self.engine = Engine(saved.model, saved.vocab, version=saved.version, cache_bytes=slots * slot_bytes)
        self.reference = Engine(saved.model, saved.vocab, cache_bytes=0)
        self.metrics = Metrics()
        self.lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, config.max_len, saved.vocab)
        self.predictor = Predictor(
            self.engine, self.lists, settings.lists, settings.serving.rescore_users, self.metrics
        )

    def metric(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(name)
        assert value is not None, name
        return value


@pytest.fixture
def make_bench(saved: SavedModel, redis: RedisClient, make_settings: MakeSettings) -> Callable[..., Bench]:
    def make(slots: int = 64, **changes: Any) -> Bench:
        return Bench(saved, redis, make_settings(**changes), slots)

    return make


def sequence(user: str, items: list[str], n: int | None = None, session_n: int | None = None) -> UserSequence:
    count = len(items) if session_n is None else session_n
    return UserSequence(user, stored(items), count if n is None else n, count, BASE_MS + len(items), 1, (BASE_MS,))


def same(found: Recommendation, expected: Ranking | None) -> bool:
    assert expected is not None
    assert found.scores == pytest.approx(expected.scores, abs=SCORE_TOLERANCE)
    return found.items == expected.items


VARIED = [sequence(f"u{k}", [f"i{(7 * k + step) % 50}" for step in range(1 + k % 8)]) for k in range(24)]


async def test_no_sequences_need_no_model(make_bench: Callable[..., Bench]) -> None:
    assert await make_bench().predictor.predict([]) == []


async def test_a_batch_gives_the_lists_of_single_sequences_in_order(make_bench: Callable[..., Bench]) -> None:
    together = await make_bench().predictor.predict(VARIED)
    alone = make_bench()
    for sequence_, found in zip(VARIED, together, strict=True):
        (single,) = await alone.predictor.predict([sequence_])
        assert (found.user_id, found.items) == (sequence_.user_id, single.items)
        assert found.scores == pytest.approx(single.scores, abs=SCORE_TOLERANCE)


@pytest.mark.parametrize("filter_seen", [True, False])
async def test_lists_are_the_engines_own_answer_for_the_whole_sequence(
    make_bench: Callable[..., Bench], filter_seen: bool
) -> None:
    bench = make_bench(lists_top_k=7, lists_filter_seen=filter_seen)
    found = await bench.predictor.predict(VARIED)
    expected = bench.reference.recommend([s.items for s in VARIED], 7, filter_seen=filter_seen)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    seen = [set(r.items) & set(s.items) for r, s in zip(found, VARIED, strict=True)]
    assert not any(seen) if filter_seen else any(seen)


async def test_click_by_click_answers_equal_re_encoding_through_jumps_of_the_window(
    make_bench: Callable[..., Bench],
) -> None:
    bench, clicked = make_bench(), [f"i{(11 * k) % 50}" for k in range(40)]
    for n in range(1, len(clicked) + 1):
        kept = clicked[max(0, n - 8) : n]  # max_len is 8
        found = await bench.predictor.predict([sequence("ann", kept, session_n=n)])
        (expected,) = bench.reference.recommend([kept], 20, counts=[n])
        assert same(found[0], expected)
    assert bench.metric("streamrec_cache_hits_total") > 20


async def test_the_window_follows_the_session_and_the_list_the_user(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    # nine events in this session, eight of them stored, after many earlier sessions
    items = [f"i{k}" for k in range(8)]
    (found,) = await bench.predictor.predict([sequence("ann", items, n=500, session_n=9)])
    by_session, by_user = bench.reference.recommend([items, items], 20, counts=[9, 500])
    assert by_session != by_user  # the window of the one jumped, that of the other did not
    assert same(found, by_session)
    assert found.n == 500


async def test_a_list_carries_the_fields_of_its_sequence(make_bench: Callable[..., Bench], saved: SavedModel) -> None:
    given = UserSequence("ann", stored(["i1"]), 9, 9, 123, 2, (7, 8))
    (found,) = await make_bench().predictor.predict([given])
    assert (found.model, found.event_ts_ms, found.n, found.record_ts_ms) == (saved.version, 123, 9, (7, 8))


async def test_scores_have_five_decimals(make_bench: Callable[..., Bench]) -> None:
    for found in await make_bench().predictor.predict(VARIED):
        assert found.scores == [round(score, 5) for score in found.scores]
        assert found.scores == sorted(found.scores, reverse=True)


async def test_unknown_items_are_left_out_by_the_engine_and_counted(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    given = UserSequence("ann", stored(["old?", "i1", "new?", "i2", "newer?"]), 5, 5, BASE_MS, 3, ())
    (found,) = await bench.predictor.predict([given])
    (expected,) = bench.reference.recommend([given.items], 20)
    assert same(found, expected)
    assert bench.metric("streamrec_unknown_items_total") == 2  # of the three that are new


@pytest.mark.parametrize("filter_seen", [True, False])
async def test_a_user_without_a_known_item_gets_the_popular_list(
    make_bench: Callable[..., Bench], filter_seen: bool
) -> None:
    bench = make_bench(lists_top_k=3, lists_filter_seen=filter_seen)
    bench.lists.count([UserSequence("x", stored(["fresh"] * 100), 100, 100, BASE_MS, 100)])
    await bench.lists.refresh()
    known, unknown = await bench.predictor.predict([sequence("ann", ["i1"]), sequence("bob", ["fresh", "?"])])
    assert known.model == bench.engine.version
    assert unknown.model == "popular"
    assert unknown.items == (["i0", "i1", "i2"] if filter_seen else ["fresh", "i0", "i1"])
    assert (unknown.n, unknown.event_ts_ms, unknown.record_ts_ms) == (2, BASE_MS + 2, (BASE_MS,))


async def test_before_the_first_refresh_the_popular_list_comes_from_the_training_data(
    make_bench: Callable[..., Bench],
) -> None:
    (found,) = await make_bench(lists_top_k=2).predictor.predict([sequence("ann", ["?"])])
    assert (found.items, found.scores, found.model) == (["i0", "i1"], [50.0, 49.0], "popular")


async def test_blocked_items_are_never_recommended(
    make_bench: Callable[..., Bench], make_settings: MakeSettings
) -> None:
    bench = make_bench(lists_top_k=50, lists_filter_seen=False)
    blocked = {"i0", "i7", "not in the catalogue"}
    async with raw_redis(make_settings()) as raw:
        await raw.sadd(Keys(make_settings().redis.key_prefix).blocklist, *blocked)  # type: ignore[misc]
    await bench.lists.refresh()
    for found in await bench.predictor.predict([*VARIED, sequence("bob", ["?"])]):
        assert len(found.items) == 48
        assert not blocked & set(found.items)


async def test_a_user_who_has_seen_most_items_gets_a_short_list(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    (found,) = await bench.predictor.predict([sequence("ann", [f"i{k}" for k in range(48)])])
    assert set(found.items) == {"i48", "i49"}


async def test_cache_and_inference_are_counted(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(slots=2)
    await bench.predictor.predict([sequence("a", ["i1"]), sequence("b", ["i1"])])
    await bench.predictor.predict([sequence("b", ["i1", "i2"]), sequence("c", ["i3"]), sequence("d", ["?"])])
    assert bench.metric("streamrec_cache_hits_total") == 1
    assert bench.metric("streamrec_cache_misses_total") == 3
    assert bench.metric("streamrec_cache_evictions_total") == 1
    assert bench.metric("streamrec_cached_users") == 2
    assert bench.metric("streamrec_inference_seconds_count") == 2


async def test_the_model_version_is_a_metric(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    labels = {"version": bench.engine.version}
    assert bench.metrics.registry.get_sample_value("streamrec_model_info", labels) == 1


@pytest.mark.parametrize("slots", [0, 64])
async def test_warming_up_changes_neither_lists_nor_cache(make_bench: Callable[..., Bench], slots: int) -> None:
    bench = make_bench(slots=slots)
    bench.predictor.warm_up(bench.engine)
    assert bench.engine.cached_users == 0
    found = await bench.predictor.predict(VARIED)
    expected = bench.reference.recommend([s.items for s in VARIED], 20)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


class EngineThatCounts(Engine):
    """Records the number of users in each call, which takes some time for each of them."""

    def __init__(self, *args: Any, seconds_per_user: float = 0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.calls: list[int] = []
        self.seconds_per_user = seconds_per_user

    def recommend(self, sequences: Sequence[Any], *args: Any, **more: Any) -> list[Ranking | None]:
        self.calls.append(len(sequences))
        time.sleep(self.seconds_per_user * len(sequences))
        return super().recommend(sequences, *args, **more)


def predictor_of(engine: Engine, redis: RedisClient, settings: Settings) -> Predictor:
    lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, 8, engine.vocab)
    return Predictor(engine, lists, settings.lists, settings.serving.rescore_users, Metrics())


async def test_the_event_loop_runs_between_the_parts_of_a_batch(
    saved: SavedModel, redis: RedisClient, make_settings: MakeSettings
) -> None:
    engine = EngineThatCounts(saved.model, saved.vocab, version="old")
    predictor = predictor_of(engine, redis, make_settings())
    users = [sequence(f"user{number}", ["i1"]) for number in range(3 * MIN_USERS_PER_CALL + 1)]
    prediction = asyncio.create_task(predictor.predict(users))
    turns = []
    while not prediction.done():
        await asyncio.sleep(0)
        turns.append(len(engine.calls))
        if len(engine.calls) == 1:
            predictor.swap(Engine(saved.model, saved.vocab, version="new"))
    assert engine.calls == [MIN_USERS_PER_CALL, 2 * MIN_USERS_PER_CALL, 1]
    assert {1, 2, 3} <= set(turns)
    found = await prediction
    assert [r.user_id for r in found] == [s.user_id for s in users]
    assert {r.model for r in found} == {"old"}, "a batch in flight keeps the engine that it began with"
    assert [r.model for r in await predictor.predict(users[:1])] == ["new"]


async def test_a_call_has_many_users_of_a_fast_model_and_few_of_a_slow_one(
    saved: SavedModel, redis: RedisClient, make_settings: MakeSettings
) -> None:
    engine = EngineThatCounts(saved.model, saved.vocab, version="old")
    predictor = predictor_of(engine, redis, make_settings())
    users = [sequence(f"user{number}", ["i1"]) for number in range(5 * MAX_USERS_PER_CALL)]
    await predictor.predict(users)
    assert max(engine.calls) == MAX_USERS_PER_CALL
    engine.seconds_per_user = MAX_CALL_S / (2 * MIN_USERS_PER_CALL)  # 32 users would take too long
    await predictor.predict(users[: 8 * MIN_USERS_PER_CALL])  # one call, which is too long
    engine.calls.clear()
    await predictor.predict(users[: 2 * MAX_USERS_PER_CALL])
    assert engine.calls[-1] == MIN_USERS_PER_CALL


class EngineThatFails(Engine):
    """Its forward pass raises."""

    def recommend(self, *args: Any, **more: Any) -> list[Ranking | None]:
        raise RuntimeError("out of memory")


async def test_an_error_in_the_model_reaches_the_caller(
    saved: SavedModel, redis: RedisClient, make_settings: MakeSettings
) -> None:
    predictor = predictor_of(EngineThatFails(saved.model, saved.vocab), redis, make_settings())
    with pytest.raises(RuntimeError, match="out of memory"):
        await predictor.predict([sequence("ann", ["i1"])])
