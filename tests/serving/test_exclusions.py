"""Exclusions: an event takes an item out of its user's lists for a while, at once, and extends no sequence."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import CLICK, EXCLUDE, ClickEvent, Exclusions, Recommendation, Role, UserSequence
from streamrec.serving.inspection import published
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import MAX_EXCLUDED
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import feed, wait_caught_up
from support.oracle import assert_delivered
from support.redis_access import BASE_MS, batch, clicks, event, raw_redis, record, under
from support.sequences import against_redis, fresh, ids, store_of
from support.workload import ROLES, Record, click

MakeSettings = Callable[..., Settings]
BOTH = Role(click=True, exclude=True)
CENTURY_S = 100 * 365 * 86_400


async def excluded(settings: Settings, user: str) -> dict[str, float]:
    """Return the stored exclusions of a user, by item."""
    async with raw_redis(settings) as raw:
        found = await raw.zrange(Keys(settings.redis.key_prefix).exclusions(user), 0, -1, withscores=True)
        return {item.decode(): score for item, score in found if not item.startswith(b"\0")}


@st.composite
def records(draw: st.DrawFn) -> list[list[ClickEvent]]:
    """Records of few users and offsets, with roles; some are delivered again."""
    users = draw(st.lists(ids, min_size=1, max_size=3, unique=True))
    found = []
    for offset in range(draw(st.integers(1, 15))):
        user, at_ms = draw(st.sampled_from(users)), BASE_MS + draw(st.integers(0, 50))
        items = draw(st.lists(st.sampled_from(["a", "b", "c"]) | ids, min_size=1, max_size=4))
        found.append(record(user, items, at_ms, 0, offset, at_ms, draw(st.sampled_from([CLICK, EXCLUDE, BOTH]))))
        found += draw(st.lists(st.sampled_from(found), max_size=2))
    return found


@against_redis
@given(records(), st.integers(1, 4))
async def test_clicks_and_exclusions_of_random_records_with_replays(
    redis: RedisClient, make_settings: MakeSettings, given_records: list[list[ClickEvent]], size: int
) -> None:
    settings, plain = fresh(make_settings), fresh(make_settings)
    store, of_clicks = store_of(redis, settings, exclude_ttl_s=CENTURY_S), store_of(redis, plain)
    final: dict[str, UserSequence] = {}
    without: dict[str, UserSequence] = {}
    newest: dict[str, dict[str, int]] = {}
    for begin in range(0, len(given_records), size):
        events = [e for clicks in given_records[begin : begin + size] for e in clicks]
        for e in (e for e in events if e.role.exclude):
            items = newest.setdefault(e.user_id, {})
            items[e.item_id] = max(items.get(e.item_id, 0), e.timestamp_ms)
        final |= {s.user_id: s for s in await store.append(batch(*events))}
        only_clicks = batch(*(e for e in events if e.role.click))
        without |= {s.user_id: s for s in await of_clicks.append(only_clicks)}
    for user, sequence in final.items():
        known = without.get(user)
        wanted = (known.items, known.n, known.session_n, known.last_event_ts_ms) if known else ([], 0, 0, 0)
        assert (sequence.items, sequence.n, sequence.session_n, sequence.last_event_ts_ms) == wanted
        assert set(sequence.excluded.items) == set(newest.get(user, {}))
        assert await excluded(settings, user) == newest.get(user, {})
    users = sorted(final)
    read = {s.user_id: s for s in await store.read(users)}
    assert {u: (s.stored, s.n, s.excluded) for u, s in read.items()} == {
        u: (s.stored, s.n, s.excluded) for u, s in final.items()
    }


async def test_an_exclusion_ends_a_while_after_the_time_of_its_event(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings, now_ms = make_settings(), int(time.time() * 1000)
    store = store_of(redis, settings, exclude_ttl_s=3600)
    await store.append(clicks("ann", ["x"]))
    old = event("ann", "old", 1, now_ms - 3_601_000, role=EXCLUDE)
    (found,) = await store.append(batch(old, event("ann", "recent", 2, now_ms - 3_500_000, role=EXCLUDE)))
    assert found.excluded.items == ("recent",)
    (found,) = await store.append(batch(event("ann", "old", 3, now_ms, role=EXCLUDE), old))  # the newest time counts
    assert found.excluded.items == ("old", "recent")
    async with raw_redis(settings) as raw:
        assert 3590 <= await raw.ttl(Keys(settings.redis.key_prefix).exclusions("ann")) <= 3600


async def test_only_a_change_is_counted_and_the_newest_exclusions_are_stored(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    store = store_of(redis, make_settings(), exclude_ttl_s=CENTURY_S)
    many = [event("ann", f"i{n}", n, BASE_MS + n, role=EXCLUDE) for n in range(MAX_EXCLUDED + 50)]
    for _ in range(2):
        (found,) = await store.append(batch(*many))
        assert set(found.excluded.items) == {f"i{n}" for n in range(50, MAX_EXCLUDED + 50)}
    changes = found.excluded.changes
    (found,) = await store.append(batch(*many[50:], event("ann", "i60", 9, BASE_MS, role=EXCLUDE)))
    assert found.excluded.changes == changes
    (found,) = await store.append(batch(event("ann", "i60", 9, BASE_MS + 10**6, role=EXCLUDE)))
    assert found.excluded == Exclusions(found.excluded.items, changes + 1)


async def test_an_exclusion_alone_begins_no_sequence_and_renews_none(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings, metrics = make_settings(), Metrics()
    store, key = store_of(redis, settings, 5, CENTURY_S, metrics), Keys(settings.redis.key_prefix).sequence("ann")
    (found,) = await store.append(batch(event("ann", "a", 0, role=EXCLUDE)))
    assert (found.n, found.items, found.excluded.items) == (0, [], ("a",))
    async with raw_redis(settings) as raw:
        assert not await raw.exists(key)
        await store.append(clicks("ann", ["b"], 1))
        before = await raw.get(key)
        await raw.expire(key, 60)
        (found,) = await store.append(batch(event("ann", "c", 2, role=EXCLUDE)))
        await store.read(["ann"])
        assert (found.items, found.applied, set(found.excluded.items)) == (["b"], 0, {"a", "c"})
        assert await raw.ttl(key) <= 60
        assert await raw.get(key) == before
        await raw.set(key, "damaged")
        (found,) = await store.append(batch(event("ann", "d", 3, role=EXCLUDE)))
        assert (found.n, found.items) == (0, [])
        assert await raw.get(key) == b"damaged"
    counts = {name: metrics.events.labels(name)._value.get() for name in ("applied", "replayed", "excluded")}
    assert counts == {"applied": 1, "replayed": 0, "excluded": 3}


async def test_exclusions_of_another_type_refuse_their_user_and_no_other(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings, refused = make_settings(), dict[str, Exception]()
    store = store_of(redis, settings, exclude_ttl_s=CENTURY_S)
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).exclusions("bob"), "a text")
    events = [event(user, "a", 1, role=BOTH) for user in ("ann", "bob", "eve")]
    found = await store.append(batch(*events), refused.__setitem__)
    assert [(s.user_id, s.items, s.excluded.items) for s in found] == [("ann", ["a"], ("a",)), ("eve", ["a"], ("a",))]
    assert "WRONGTYPE" in str(refused.pop("bob"))
    assert not refused


async def test_a_list_from_before_an_exclusion_is_not_published_after_it(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings, metrics = make_settings(), Metrics()
    store = store_of(redis, settings, exclude_ttl_s=CENTURY_S)
    publisher = Publisher(under(redis, settings), 60, metrics, excludes=True)

    async def publish(sequence: UserSequence, item: str) -> list[str]:
        changes = sequence.excluded.changes
        await publisher.publish([Recommendation("ann", [item], [1.0], "m", 1, sequence.n, exclusions=changes)])
        (found,) = [value.items async for _, value in published(under(redis, settings), ["ann"]) if value]
        return found

    (early,) = await store.append(clicks("ann", ["a"]))
    (late,) = await store.append(batch(event("ann", "x", 1, role=EXCLUDE)))
    assert await publish(late, "without x") == ["without x"]
    assert await publish(early, "x") == ["without x"]
    assert await publish(late, "again") == ["again"]
    (later,) = await store.append(clicks("ann", ["b"], 2))
    assert await publish(later, "after b") == ["after b"]
    assert await publish(late, "again") == ["after b"]
    async with raw_redis(settings) as raw:  # the exclusions have expired
        await raw.delete(Keys(settings.redis.key_prefix).exclusions("ann"))
    assert await publish(later, "without exclusions") == ["without exclusions"]


async def test_an_exclusion_is_in_the_next_list_which_is_published_at_once_and_has_full_length(
    start_daemon: Callable[..., Daemon], make_settings: MakeSettings, model_dir: Path, redis: RedisClient
) -> None:
    where: dict[str, Any] = {**ROLES, "lists_top_k": 5}
    settings = make_settings(model_dir=model_dir, **where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    await feed(settings, [Record(b"ann", click("ann", "i1", 1, event_type="view"))])
    await daemon.wait_handled(1)

    async def list_of(user: str) -> list[str]:
        await wait_caught_up(settings)
        (found,) = [value.items async for _, value in published(redis, [user]) if value]
        return found

    before = await list_of("ann")
    for number, item in enumerate(before[:3], 2):
        await feed(settings, [Record(b"ann", click("ann", item, number, event_type="dislike"))])
        after = await list_of("ann")
        assert item not in after
        assert len(after) == 5
    assert after[:2] == before[3:]
    await feed(settings, [Record(b"ann", click("ann", after[0], 9, event_type="purchase"))])
    assert after[0] not in await list_of("ann")
    # a user who has never clicked gets the popular list without the item
    await feed(settings, [Record(b"eve", click("eve", "i2", 1, event_type="dislike"))])
    assert "i2" not in await list_of("eve")
    assert len(await list_of("eve")) == 5
    assert await daemon.metric(EVENTS, outcome="excluded") == 4
    await assert_delivered(settings)
