"""Publisher and publish.lua: what applications read, and which list wins."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import Recommendation, parse_published
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.redis_access import BASE_MS, clicks, commands_about, raw_redis, under

MakeSettings = Callable[..., Settings]
numbers = itertools.count()


def recommendation(user: str, n: int, items: list[str] | None = None, model: str = "m1") -> Recommendation:
    items = [f"after-{n}"] if items is None else items
    return Recommendation(user, items, [1.5] * len(items), model, BASE_MS + n, n, (BASE_MS,))


def publisher_of(redis: RedisClient, settings: Settings, metrics: Metrics | None = None) -> Publisher:
    return Publisher(under(redis, settings), settings.lists.ttl_s, metrics or Metrics())


async def append(redis: RedisClient, settings: Settings, user: str, count: int, first_offset: int = 0) -> None:
    store = SequenceStore(under(redis, settings), settings.sequences, settings.kafka.topic_epoch, 50, Metrics())
    await store.append(clicks(user, [f"i{k}" for k in range(count)], first_offset))


async def stored(redis: RedisClient, settings: Settings, user: str) -> dict[str, Any]:
    (value,) = await redis.get_many([Keys(settings.redis.key_prefix).recommendation(user)])
    assert value is not None
    found: dict[str, Any] = json.loads(value)
    return found


async def test_the_published_json_is_the_contract(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings(lists_ttl_s=1_000)
    before_ms = int(time.time() * 1000)
    await publisher_of(redis, settings).publish(
        [Recommendation("ann", ["i1", 'ü "quoted" {}'], [2.5, -1.25], "v7", BASE_MS, 3, (BASE_MS,))]
    )
    found = await stored(redis, settings, "ann")
    assert list(found) == ["items", "scores", "model", "event_ts_ms", "published_ts_ms", "n"]
    published_ts_ms = found.pop("published_ts_ms")
    assert before_ms <= published_ts_ms <= time.time() * 1000
    assert found == {
        "items": ["i1", 'ü "quoted" {}'],
        "scores": [2.5, -1.25],
        "model": "v7",
        "event_ts_ms": BASE_MS,
        "n": 3,
    }
    async with raw_redis(settings) as raw:
        assert 990 <= await raw.ttl(f"{settings.redis.key_prefix}:recs:{{ann}}") <= 1_000


async def test_a_list_may_be_empty(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    await publisher_of(redis, settings).publish([recommendation("ann", 1, items=[])])
    assert (await stored(redis, settings, "ann"))["items"] == []


async def test_a_batch_of_many_users_is_one_round_trip(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    publisher = publisher_of(redis, settings)
    await publisher.publish([recommendation("first", 1)])  # loads the script
    async with commands_about(settings) as sent:
        await publisher.publish([recommendation(f"u{k}", 1) for k in range(100)])
        await publisher.publish([])
    assert sent == ["EVALSHA"]


async def test_a_list_from_fewer_events_never_overwrites_one_from_more(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings, metrics = make_settings(), Metrics()
    publisher = publisher_of(redis, settings, metrics)
    await append(redis, settings, "ann", 3)
    await publisher.publish([recommendation("ann", 3)])
    await publisher.publish([recommendation("ann", 2), recommendation("bob", 1)])
    assert (await stored(redis, settings, "ann"))["n"] == 3
    assert (await stored(redis, settings, "bob"))["n"] == 1  # the other user's list does not matter
    value = metrics.registry.get_sample_value
    assert value("streamrec_recommendations_total", {"outcome": "published"}) == 2
    assert value("streamrec_recommendations_total", {"outcome": "superseded"}) == 1


async def test_a_list_from_an_equal_n_overwrites(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    publisher = publisher_of(redis, settings)
    await append(redis, settings, "ann", 3)
    await publisher.publish([recommendation("ann", 3, model="old")])
    await publisher.publish([recommendation("ann", 3, model="new")])
    assert (await stored(redis, settings, "ann"))["model"] == "new"


@pytest.mark.parametrize("n", [9, 10, 99, 100, 2**31, 2**53 - 2])
async def test_counts_are_compared_as_numbers(redis: RedisClient, make_settings: MakeSettings, n: int) -> None:
    settings = make_settings()
    publisher = publisher_of(redis, settings)
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).sequence("ann"), f"1 {n + 1} 1 1 0 0 0:1\0a\0")
    for count in (n, n + 1, n):
        await publisher.publish([recommendation("ann", count)])
    assert (await stored(redis, settings, "ann"))["n"] == n + 1


async def test_a_user_who_begins_again_after_the_sequence_expired_is_published(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    publisher = publisher_of(redis, settings)
    await append(redis, settings, "ann", 40)
    await publisher.publish([recommendation("ann", 40)])
    async with raw_redis(settings) as raw:
        await raw.delete(Keys(settings.redis.key_prefix).sequence("ann"))
    for n in (1, 2):
        await append(redis, settings, "ann", 1, first_offset=39 + n)
        await publisher.publish([recommendation("ann", n)])
        assert (await stored(redis, settings, "ann"))["n"] == n
    await publisher.publish([recommendation("ann", 1)])
    assert (await stored(redis, settings, "ann"))["n"] == 2  # compare-and-set applies again


@pytest.mark.parametrize(
    "value", [None, b"", b"garbage", b"{}", b'{"n":99', b'{"n":99,"items":[]}', b'{"n":1e99}', b"\xff" * 100], ids=repr
)
async def test_a_value_that_is_not_a_list_is_overwritten(
    redis: RedisClient, make_settings: MakeSettings, value: bytes | None
) -> None:
    settings = make_settings()
    await append(redis, settings, "ann", 99)
    key = Keys(settings.redis.key_prefix).recommendation("ann")
    async with raw_redis(settings) as raw:
        if value is None:
            await raw.sadd(key, "another type")  # type: ignore[misc]
        else:
            await raw.set(key, value)
    await publisher_of(redis, settings).publish([recommendation("ann", 1)])
    assert (await stored(redis, settings, "ann"))["n"] == 1


@pytest.mark.parametrize("items", [['"n":99}'], ['{"n":99}', "x"], ["%d+", "\\"]], ids=repr)
async def test_items_that_look_like_a_count_are_no_count(
    redis: RedisClient, make_settings: MakeSettings, items: list[str]
) -> None:
    settings = make_settings()
    publisher = publisher_of(redis, settings)
    await append(redis, settings, "ann", 2)
    await publisher.publish([recommendation("ann", 1, items, model='"n":99}')])
    await publisher.publish([recommendation("ann", 2)])
    assert (await stored(redis, settings, "ann"))["n"] == 2


users = st.sampled_from(["ann", "b ob", "{e}ve"])
publications = st.lists(
    st.dictionaries(users, st.integers(1, 30), min_size=1).map(
        lambda ns: [recommendation(u, n) for u, n in ns.items()]
    ),
    min_size=1,
    max_size=12,
)


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(publications)
async def test_any_order_of_publishing_ends_with_the_list_of_the_most_events(
    redis: RedisClient, make_settings: MakeSettings, batches: list[list[Recommendation]]
) -> None:
    settings = make_settings(redis_key_prefix=f"{make_settings().redis.key_prefix}-{next(numbers)}")
    publisher = publisher_of(redis, settings)
    most = {r.user_id: max(s.n for b in batches for s in b if s.user_id == r.user_id) for b in batches for r in b}
    for user in most:
        await append(redis, settings, user, 30)
    for batch in batches:
        await publisher.publish(batch)
    assert {user: (await stored(redis, settings, user))["n"] for user in most} == most


async def test_latency_is_measured_from_each_record(redis: RedisClient, make_settings: MakeSettings) -> None:
    metrics = Metrics()
    now_ms = int(time.time() * 1000)
    times = (now_ms - 2_000, now_ms - 1_000, now_ms + 5_000)  # the last by a producer whose clock is ahead
    ann = Recommendation("ann", ["i"], [1.0], "m", BASE_MS, 3, times)
    await publisher_of(redis, make_settings(), metrics).publish([ann])
    value = metrics.registry.get_sample_value
    assert value("streamrec_click_to_published_seconds_count") == 3
    total = value("streamrec_click_to_published_seconds_sum")
    assert total is not None
    assert 3.0 <= total < 5.0


async def test_published_lists_can_be_read_by_the_package(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    await publisher_of(redis, settings).publish([recommendation("ann", 4)])
    (value,) = await redis.get_many([Keys(settings.redis.key_prefix).recommendation("ann")])
    assert value is not None
    assert parse_published("ann", value).items == ["after-4"]
