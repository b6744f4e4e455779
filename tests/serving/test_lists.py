"""Popular list and blocklist: popularity.lua against an oracle, and what users without a known item get."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sasrec import ItemVocab, Ranking
from streamrec.errors import RedisUnavailable
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import NO_ITEMS, UserSequence
from streamrec.serving.lists import MAX_COUNTED_ITEMS, MAX_ITEMS_PER_CALL, SharedLists
from streamrec.settings import Settings

from support.redis_access import BASE_MS, RedisThatFailsScripts, commands_about, raw_redis, stored, under

MakeSettings = Callable[..., Settings]
DAY_MS = 86_400_000
NO_VOCAB = ItemVocab([])
numbers = itertools.count()
against_redis = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def sequence(items: list[str], last_event_ts_ms: int = BASE_MS, applied: int | None = None) -> UserSequence:
    new = len(items) if applied is None else applied
    return UserSequence("ann", stored(items), len(items), len(items), last_event_ts_ms, new)


def lists_of(redis: RedisClient, settings: Settings, vocab: ItemVocab = NO_VOCAB, max_len: int = 50) -> SharedLists:
    return SharedLists(redis, settings.lists, settings.sequences.ttl_s, max_len, vocab)


def fresh(make_settings: MakeSettings, **changes: Any) -> Settings:
    settings = make_settings(**changes)
    return settings.but(redis_key_prefix=f"{settings.redis.key_prefix}-{next(numbers)}")


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


async def published(redis: RedisClient, settings: Settings) -> dict[str, Any]:
    (value,) = await redis.get_many([Keys(settings.redis.key_prefix).popular])
    assert value is not None
    found: dict[str, Any] = json.loads(value, parse_constant=refuse_constant)
    return found


def scores(lists: SharedLists) -> dict[str, float]:
    top = lists.popular_for(NO_ITEMS, 1_000)
    assert top.scores == sorted(top.scores, reverse=True)
    return dict(zip(top.items, top.scores, strict=True))


class Oracle:
    """Every click weighs half as much after each half-life, as of the newest click."""

    def __init__(self, half_life_ms: float) -> None:
        self.half_life_ms = half_life_ms
        self.clicks: list[tuple[str, int]] = []

    def count(self, sequences: list[UserSequence]) -> None:
        for s in sequences:
            self.clicks += [(item, s.last_event_ts_ms) for item in s.items[-s.applied :] if s.applied]

    def scores(self) -> dict[str, float]:
        now_ms = max(ts for _, ts in self.clicks)
        found: dict[str, float] = {}
        for item, ts in self.clicks:
            found[item] = found.get(item, 0.0) + 0.5 ** ((now_ms - ts) / self.half_life_ms)
        return found


def assert_close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for item, score in expected.items():
        assert found[item] == pytest.approx(score, rel=1e-4, abs=1e-290)


@st.composite
def rounds(draw: st.DrawFn, half_lives: float) -> list[list[UserSequence]]:
    """Sequences between refreshes; their clicks spread over several half-lives of a day, and some come late."""
    latest = int(half_lives * DAY_MS)
    sequences = st.builds(
        lambda items, ts, applied: sequence(items, BASE_MS + ts, min(applied, len(items))),
        st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4),
        st.integers(0, latest),
        st.integers(0, 4),
    )
    return draw(st.lists(st.lists(sequences, max_size=4), min_size=1, max_size=6))


@against_redis
@given(st.sampled_from([0.01, 1.0, 50.0, 500.0]).flatmap(rounds))
async def test_decayed_counts_match_the_oracle_over_many_half_lives(
    redis: RedisClient, make_settings: MakeSettings, given_rounds: list[list[UserSequence]]
) -> None:
    settings, oracle = fresh(make_settings, lists_popular_half_life_s=86_400), Oracle(DAY_MS)
    lists = lists_of(under(redis, settings), settings)
    for sequences in given_rounds:
        lists.count(sequences)
        oracle.count(sequences)
        await lists.refresh()
        if oracle.clicks:
            assert_close(scores(lists), oracle.scores())


@against_redis
@given(rounds(20.0), st.lists(st.integers(0, 1), min_size=6, max_size=6))
async def test_two_daemons_count_into_one_list(
    redis: RedisClient, make_settings: MakeSettings, given_rounds: list[list[UserSequence]], daemons: list[int]
) -> None:
    settings, oracle = fresh(make_settings, lists_popular_half_life_s=86_400), Oracle(DAY_MS)
    both = [lists_of(under(redis, settings), settings), lists_of(under(redis, settings), settings)]
    for sequences, daemon in zip(given_rounds, daemons, strict=False):
        both[daemon].count(sequences)
        oracle.count(sequences)
        await both[daemon].refresh()
    await both[0].refresh()
    if oracle.clicks:
        expected, found = oracle.scores(), scores(both[0])
        top = max(expected.values())
        newest = max(found.values(), default=0.0)  # each daemon reads as of the newest click it has seen
        assert_close({i: s / newest for i, s in found.items()}, {i: s / top for i, s in expected.items()})


@against_redis
@given(
    st.sampled_from([0.001, 1.0, 604_800.0, 1e12]),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**13)), min_size=1, max_size=6),
)
async def test_the_published_list_never_holds_infinity_or_nan(
    redis: RedisClient, make_settings: MakeSettings, half_life_s: float, clicks: list[tuple[str, int]]
) -> None:
    settings = fresh(make_settings, lists_popular_half_life_s=half_life_s)
    lists = lists_of(under(redis, settings), settings, ItemVocab(["a", "x"], [10**9, 1]))
    for item, ts in clicks:
        lists.count([sequence([item] * 3, ts)])
        await lists.refresh()
        found = await published(redis, settings)
        assert all(math.isfinite(score) and score >= 0 for score in found["scores"])
        assert set(found["items"]) <= set("abcx")


async def test_years_of_daily_clicks_are_rescaled_without_loss(redis: RedisClient, make_settings: MakeSettings) -> None:
    lists = lists_of(redis, make_settings(lists_popular_half_life_s=86_400))
    for day in range(400):
        lists.count([sequence(["daily"] + ["weekly"] * (day % 7 == 0), BASE_MS + day * DAY_MS)])
        await lists.refresh()
    found = scores(lists)
    assert found["daily"] == pytest.approx(2.0, rel=1e-4)
    assert found["weekly"] == pytest.approx(1.0 / (1 - 2.0**-7), rel=1e-4)  # day 399 is a multiple of 7


async def test_before_any_click_the_training_data_is_the_popular_list(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings(lists_top_k=2)
    lists = lists_of(redis, settings, ItemVocab(["a", "b", "c"], [1, 5, 3]))
    await lists.refresh()
    found = await published(redis, settings)
    assert list(found) == ["items", "scores", "model", "event_ts_ms", "published_ts_ms", "n"]
    assert (found["items"], found["scores"], found["model"], found["n"]) == (["b", "c"], [5.0, 3.0], "popular", 0)


async def test_the_first_click_comes_on_top_of_the_training_data(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    lists = lists_of(redis, settings, ItemVocab(["a", "b"], [2, 5]))
    lists.count([sequence(["a", "new"])])
    await lists.refresh()
    await lists.refresh()
    assert scores(lists) == {"b": 5.0, "a": 3.0, "new": 1.0}
    assert (await published(redis, settings))["event_ts_ms"] == BASE_MS


async def test_the_training_data_is_counted_once_and_not_after_a_restart(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings, vocab = make_settings(), ItemVocab(["a"], [5])
    for _ in range(3):
        lists = lists_of(redis, settings, vocab)
        await lists.refresh()
        lists.count([sequence(["a"])])
        await lists.refresh()
    assert scores(lists) == {"a": 8.0}


async def test_replayed_events_are_not_counted(redis: RedisClient, make_settings: MakeSettings) -> None:
    lists = lists_of(redis, make_settings())
    lists.count([sequence(["a", "b", "c"], applied=1), sequence(["x", "y"], applied=0)])
    await lists.refresh()
    assert scores(lists) == {"c": 1.0}


async def test_the_most_popular_10_000_items_are_stored(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings(lists_top_k=1_000)
    lists = lists_of(redis, settings)
    for start in range(0, MAX_COUNTED_ITEMS + 500, 2_100):
        lists.count([sequence([f"i{k}"] * (2 if k % 2 else 1)) for k in range(start, start + 2_100)])
        await lists.refresh()
    async with raw_redis(settings) as raw:
        members = dict(await raw.zrange(Keys(settings.redis.key_prefix).popularity, 0, -1, withscores=True))
    members.pop(b"\0landmark")
    assert len(members) == MAX_COUNTED_ITEMS
    assert {f"i{k}".encode() for k in range(1, MAX_COUNTED_ITEMS + 500, 2)} <= members.keys()


async def test_a_catalogue_beyond_10_000_items_begins_with_its_most_popular(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings(lists_top_k=3)
    size = MAX_COUNTED_ITEMS + 2_000
    lists = lists_of(redis, settings, ItemVocab([f"i{k}" for k in range(size)], list(range(size))))
    lists.count([sequence(["i0"])])
    await lists.refresh()
    assert lists.popular_for(NO_ITEMS, 3).items == [f"i{size - 1}", f"i{size - 2}", f"i{size - 3}"]
    async with raw_redis(settings) as raw:
        assert await raw.zcard(Keys(settings.redis.key_prefix).popularity) == MAX_COUNTED_ITEMS + 1


async def test_every_key_has_a_ttl(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings(sequences_ttl_s=5_000, lists_ttl_s=900)
    lists, keys = lists_of(redis, settings), Keys(settings.redis.key_prefix)
    lists.count([sequence(["a"])])
    await lists.refresh()
    async with raw_redis(settings) as raw:
        assert 4_990 <= await raw.ttl(keys.popularity) <= 5_000
        assert 890 <= await raw.ttl(keys.popular) <= 900


async def test_the_blocklist_is_read_again_at_every_refresh(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    lists, key = lists_of(redis, settings, ItemVocab(["a", "b é", "c"], [3, 2, 1])), Keys(settings.redis.key_prefix)
    async with raw_redis(settings) as raw:
        await raw.sadd(key.blocklist, "a", "b é", "not in the catalogue")  # type: ignore[misc]
        await lists.refresh()
        assert lists.refusals.blocked == {"a", "b é", "not in the catalogue"}
        assert (await published(redis, settings))["items"] == ["c"]
        await raw.srem(key.blocklist, "a")  # type: ignore[misc]
        await lists.refresh()
        assert (await published(redis, settings))["items"] == ["a", "c"]


async def test_a_long_blocklist_leaves_enough_popular_items(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings(lists_top_k=5)
    lists = lists_of(redis, settings, max_len=10)
    async with raw_redis(settings) as raw:
        await raw.sadd(Keys(settings.redis.key_prefix).blocklist, *(f"i{k}" for k in range(100)))  # type: ignore[misc]
    lists.count([sequence([f"i{k}"] * (200 - k)) for k in range(200)])
    await lists.refresh()
    assert lists.popular_for(stored([f"i{k}" for k in range(100, 110)]), 5).items == [f"i{k}" for k in range(110, 115)]


async def test_seen_and_blocked_items_are_left_out_in_unchanged_order(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    lists = lists_of(redis, settings, ItemVocab(list("abcdef"), [6, 5, 4, 3, 2, 1]))
    async with raw_redis(settings) as raw:
        await raw.sadd(Keys(settings.redis.key_prefix).blocklist, "c")  # type: ignore[misc]
    await lists.refresh()
    assert lists.popular_for(stored(["a", "zzz"]), 3) == Ranking(["b", "d", "e"], [5.0, 3.0, 2.0])
    assert lists.popular_for(stored(list("abcdef")), 3) == Ranking([], [])
    assert lists.popular_for(NO_ITEMS, 0) == Ranking([], [])


async def test_a_refresh_is_at_most_four_round_trips(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    lists = lists_of(redis, settings, ItemVocab(["a"], [1]))
    await lists.refresh()
    async with commands_about(settings) as sent:
        for _ in range(2):
            lists.count([sequence(["a"])])
            await lists.refresh()
    assert sent == ["SMEMBERS", "EVALSHA", "EVALSHA", "SET", "SMEMBERS", "EVALSHA", "SET"]


async def test_the_counts_of_a_refresh_that_fails_are_flushed_later(make_settings: MakeSettings) -> None:
    settings, oracle = make_settings(lists_popular_half_life_s=86_400), Oracle(DAY_MS)
    early, late = [sequence(["a", "b"])], [sequence(["b", "c"], BASE_MS + 3 * DAY_MS)]
    async with RedisThatFailsScripts(settings.redis) as redis:
        lists = lists_of(redis, settings)
        lists.count(early)
        refresh = asyncio.create_task(lists.refresh())
        await redis.arrived.wait()
        lists.count(late)  # clicks continue while Redis hangs
        redis.fail.set()
        with pytest.raises(RedisUnavailable):
            await refresh
        with pytest.raises(RedisUnavailable):
            await lists.refresh()
        redis.broken = False
        await lists.refresh()
    oracle.count(early + late)
    assert_close(scores(lists), oracle.scores())


async def test_many_items_are_sent_in_parts_and_counted_once_if_a_part_fails(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings(lists_top_k=1_000)
    items = [f"i{k}" for k in range(3 * MAX_ITEMS_PER_CALL + 7)]
    async with RedisThatFailsScripts(settings.redis) as redis:
        redis.working = 2
        lists = lists_of(redis, settings)
        lists.count([sequence(items)])
        refresh = asyncio.create_task(lists.refresh())
        await redis.arrived.wait()
        assert lists.popular_for(NO_ITEMS, 1_000).items == []
        lists.count([sequence(items[-2:])])
        redis.fail.set()
        with pytest.raises(RedisUnavailable):
            await refresh
        redis.broken = False
        await lists.refresh()
    assert scores(lists) == dict.fromkeys(items, 1.0) | dict.fromkeys(items[-2:], 2.0)


async def test_a_failed_first_refresh_still_counts_the_training_data_later(make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with RedisThatFailsScripts(settings.redis) as redis:
        redis.fail.set()
        lists = lists_of(redis, settings, ItemVocab(["a"], [5]))
        lists.count([sequence(["a"])])
        with pytest.raises(RedisUnavailable):
            await lists.refresh()
        assert lists.popular_for(NO_ITEMS, 5).items == ["a"]
        redis.broken = False
        await lists.refresh()
    assert scores(lists) == {"a": 6.0}
