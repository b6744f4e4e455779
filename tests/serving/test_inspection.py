"""What `streamrec recs` and `streamrec user` read back of what the daemon wrote."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from streamrec.errors import StreamrecError
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import Recommendation
from streamrec.serving.inspection import published, stored
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.redis_access import BASE_MS, batch, clicks, event, raw_redis, under

MakeSettings = Callable[..., Settings]
AWKWARD = [
    "*",
    "?",
    "[a]",
    "[",
    "]",
    "{",
    "}",
    "{}",
    "a}b",
    "}{",
    "\\",
    "^",
    "a b",
    "é",
    "日本",
    "a\nb",
    "a:b",
    "popular",
    "-1",
    "0",
    "x" * 256,
    "a*",
    "ab",
    "h[ae]llo",
    "\\*",
]


async def write(redis: RedisClient, settings: Settings, users: list[str]) -> None:
    redis = under(redis, settings)
    store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 10, Metrics())
    await store.append(batch(*(event(user, f"item of {user}", k, BASE_MS + k) for k, user in enumerate(users))))
    lists = [Recommendation(user, [f"for {user}"], [1.0], "m", BASE_MS, 1) for user in users]
    await Publisher(redis, settings.lists.ttl_s, Metrics()).publish(lists)


async def items_stored(redis: RedisClient, settings: Settings, users: list[str] | None) -> dict[str, list[str] | None]:
    return {user: value and value.items async for user, value in stored(redis, users)}


async def items_published(
    redis: RedisClient, settings: Settings, users: list[str] | None
) -> dict[str, list[str] | None]:
    return {user: value and value.items async for user, value in published(redis, users)}


@pytest.mark.parametrize("everybody", [True, False])
async def test_users_with_awkward_ids_are_found_by_name_and_by_scan(
    redis: RedisClient, make_settings: MakeSettings, everybody: bool
) -> None:
    settings = make_settings()
    await write(redis, settings, AWKWARD)
    asked = None if everybody else AWKWARD
    assert await items_stored(redis, settings, asked) == {user: [f"item of {user}"] for user in AWKWARD}
    assert await items_published(redis, settings, asked) == {user: [f"for {user}"] for user in AWKWARD}


async def test_users_come_in_the_requested_order_and_missing_ones_as_none(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    await write(redis, settings, ["ann", "bob"])
    found = await items_stored(redis, settings, ["nobody", "bob", "ann*", "ann"])
    assert list(found.items()) == [("nobody", None), ("bob", ["item of bob"]), ("ann*", None), ("ann", ["item of ann"])]
    assert await items_published(redis, settings, ["nobody"]) == {"nobody": None}


async def test_thousands_of_users_are_all_listed_once(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    users = [f"u{k}" for k in range(2_500)]
    await write(redis, settings, users)
    assert sorted([user async for user, _ in stored(redis, None)]) == sorted(users)
    assert sorted([user async for user, _ in published(redis, None)]) == sorted(users)


async def test_keys_that_belong_to_no_user_or_to_another_prefix_are_not_listed(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    prefix = settings.redis.key_prefix
    await write(redis, settings, ["ann"])
    for other in (f"{prefix}2", f"x{prefix}", f"{prefix}:seq", f"{prefix}:recs"):
        await write(redis, make_settings(redis_key_prefix=other), ["stranger"])
    async with raw_redis(settings) as raw:
        await raw.set(Keys(prefix).popular, "{}")
        await raw.sadd(Keys(prefix).blocklist, "x")  # type: ignore[misc]
    assert await items_stored(redis, settings, None) == {"ann": ["item of ann"]}
    assert await items_published(redis, settings, None) == {"ann": ["for ann"]}


async def test_no_user_is_listed_if_nothing_is_stored(redis: RedisClient, make_settings: MakeSettings) -> None:
    assert await items_stored(redis, make_settings(), None) == {}
    assert await items_stored(redis, make_settings(), []) == {}


async def test_a_stored_sequence_comes_back_whole(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    await SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 3, Metrics()).append(
        clicks("ann", list("abcde"))
    )
    ((user, found),) = [pair async for pair in stored(redis, ["ann"])]
    assert found is not None
    assert (user, found.items, found.n, found.last_event_ts_ms) == ("ann", ["c", "d", "e"], 5, BASE_MS + 4)


@pytest.mark.parametrize("value", ["", "nothing", "{}", '{"items": 5}', "[]"])
async def test_a_value_that_cannot_be_read_names_its_user(
    redis: RedisClient, make_settings: MakeSettings, value: str
) -> None:
    settings = make_settings()
    keys = Keys(settings.redis.key_prefix)
    async with raw_redis(settings) as raw:
        await raw.set(keys.recommendation("ann"), value)
        await raw.set(keys.sequence("ann"), value)
    with pytest.raises(StreamrecError, match="the published list of user 'ann' cannot be read"):
        await items_published(redis, settings, None)
    with pytest.raises(StreamrecError, match="the stored sequence of user 'ann' cannot be read"):
        await items_stored(redis, settings, ["ann"])


class RedisWhoseKeysExpireAfterTheScan(RedisClient):
    """Lists a key that has expired before its value is read."""

    async def scan(self, prefix: str) -> AsyncIterator[str]:
        yield f"{prefix}expired}}"
        async for key in super().scan(prefix):
            yield key


async def test_a_user_who_expires_during_the_listing_is_left_out(make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with RedisWhoseKeysExpireAfterTheScan(settings.redis) as redis:
        await write(redis, settings, ["ann"])
        assert await items_stored(redis, settings, None) == {"ann": ["item of ann"]}
        assert await items_published(redis, settings, None) == {"ann": ["for ann"]}
