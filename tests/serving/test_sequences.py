"""SequenceStore and append.lua against an oracle in plain Python: every event is applied once, replays included."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.errors import RedisUnavailable, StreamrecError
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import ClickEvent, UserSequence
from streamrec.serving.sequences import SequenceStore, StoredSequence, parse_sequence
from streamrec.settings import Settings

from support.redis_access import BASE_MS, batch, clicks, commands_about, event, raw_redis, record, stored
from support.sequences import against_redis, fresh, ids, store_of
from support.sessions import is_begin

MakeSettings = Callable[..., Settings]


@dataclass
class OracleUser:
    items: list[str] = field(default_factory=list)
    n: int = 0
    session_n: int = 0
    times_ms: list[int] = field(default_factory=list)  # of all applied clicks, since gaps may differ between steps
    epoch: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    skips: bool = False  # the clicks of the current record


@dataclass(frozen=True)
class Step:
    """A batch, and the settings under which it arrives."""

    events: list[ClickEvent]
    max_len: int = 5
    gap_ms: int = 0
    epoch: int = 0


class Oracle:
    """The contract of SequenceStore in plain Python."""

    def __init__(self) -> None:
        self.users: dict[str, OracleUser] = {}

    def append(self, step: Step) -> list[UserSequence]:
        records: dict[str, list[int]] = {}
        applied: dict[str, int] = {}
        for click in step.events:
            times = records.setdefault(click.user_id, [])
            times += [] if click.place else [click.record_ts_ms]
            user = self.users.setdefault(click.user_id, OracleUser(epoch=step.epoch))
            if step.epoch < user.epoch:  # refused
                del records[click.user_id]
                continue
            applied[click.user_id] = applied.get(click.user_id, 0) + self._apply(user, click, step)
        for name, count in applied.items():
            if count:
                self.users[name].items = self.users[name].items[-step.max_len :]
        return [
            UserSequence(
                name,
                stored(user.items),
                user.n,
                user.session_n,
                max(user.times_ms, default=0),
                applied[name],
                tuple(times),
            )
            for name, times in records.items()
            for user in (self.users[name],)
        ]

    def _apply(self, user: OracleUser, click: ClickEvent, step: Step) -> bool:
        if step.epoch > user.epoch:
            user.epoch, user.offsets = step.epoch, {}
        if not click.place:  # a record is applied whole or not at all
            user.skips = click.offset <= user.offsets.get(click.partition, -1)
        if user.skips:
            return False
        user.offsets[click.partition] = click.offset
        user.times_ms.append(click.timestamp_ms)
        if is_begin(user.times_ms, user.n, step.gap_ms):
            user.items, user.session_n = [], 0
        user.items = [*user.items, click.item_id]
        user.n, user.session_n = user.n + 1, user.session_n + 1
        return True


def steps(**fixed: Any) -> st.SearchStrategy[list[Step]]:
    """Batches of few users, partitions and offsets: prefixes, suffixes and duplicates of one another abound."""
    users = st.shared(st.lists(ids, min_size=1, max_size=4, unique=True), key="users").flatmap(st.sampled_from)
    records = st.builds(
        record,
        users,
        st.lists(ids, min_size=1, max_size=1) | st.lists(ids, min_size=1, max_size=9),
        st.integers(BASE_MS, BASE_MS + 40),
        st.integers(0, 11),
        st.integers(0, 12),
        st.integers(BASE_MS, BASE_MS + 40),
    )
    return st.lists(
        st.builds(
            Step,
            st.lists(records, min_size=1, max_size=12).map(
                lambda found: [click for clicks in found for click in clicks]
            ),
            max_len=fixed.get("max_len", st.integers(1, 7)),
            gap_ms=fixed.get("gap_ms", st.sampled_from([0, 0, 1, 5, 20])),
            epoch=fixed.get("epoch", st.sampled_from([0, 0, 0, 1, 2])),
        ),
        min_size=1,
        max_size=6,
    )


async def run_step(redis: RedisClient, settings: Settings, step: Step) -> list[UserSequence]:
    settings = settings.but(sequences_session_gap_s=step.gap_ms / 1000, kafka_topic_epoch=step.epoch)
    return await store_of(redis, settings, step.max_len).append(batch(*step.events), lambda *_: None)


@against_redis
@given(steps())
async def test_random_batches_replays_and_settings_match_the_oracle(
    redis: RedisClient, make_settings: MakeSettings, given_steps: list[Step]
) -> None:
    settings, oracle = fresh(make_settings), Oracle()
    for step in given_steps:
        assert await run_step(redis, settings, step) == oracle.append(step)
    async with raw_redis(settings) as raw:
        for user in oracle.users:
            key = Keys(settings.redis.key_prefix).sequence(user)
            value = await raw.get(key)
            assert 0 < await raw.ttl(key) <= settings.sequences.ttl_s
            # not read by parse_sequence, which repairs items
            assert [item.decode() for item in value.split(b"\0")[1:]] == [*oracle.users[user].items, ""]


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[ClickEvent], list[list[ClickEvent]]]:
    """A log of several partitions, and batches of it as a consumer that crashes now and then reads them."""
    users = draw(st.lists(ids, min_size=1, max_size=5, unique=True))
    log: dict[int, list[list[ClickEvent]]] = {0: [], 1: [], 2: []}  # records
    for number in range(draw(st.integers(1, 40))):
        user = draw(st.integers(0, len(users) - 1))
        part = log[user % 3]  # keyed by user
        items = draw(st.lists(ids, min_size=1, max_size=4))
        part.append(record(users[user], items, BASE_MS + number, user % 3, len(part), BASE_MS + number))
    read, committed = dict.fromkeys(log, 0), dict.fromkeys(log, 0)
    batches = []
    while any(read[p] < len(log[p]) for p in log):
        took = {p: draw(st.integers(0, 6)) for p in log}
        batches.append([e for p in log for r in log[p][read[p] : read[p] + took[p]] for e in r])
        read = {p: min(len(log[p]), read[p] + took[p]) for p in log}
        if draw(st.booleans()):
            committed = dict(read)
        elif draw(st.booleans()):
            read = dict(committed)  # a crash: everything since the last commit comes again
        if not any(took.values()):
            read = {p: len(log[p]) for p in log}
            batches.append([e for p in log for r in log[p] for e in r])
    return [e for p in log.values() for r in p for e in r], batches


@against_redis
@given(deliveries(), st.integers(1, 8))
async def test_at_least_once_delivery_becomes_each_event_exactly_once(
    redis: RedisClient,
    make_settings: MakeSettings,
    log_and_batches: tuple[list[ClickEvent], list[list[ClickEvent]]],
    max_len: int,
) -> None:
    log, batches = log_and_batches
    store, applied = store_of(redis, fresh(make_settings), max_len), 0
    final: dict[str, UserSequence] = {}
    for events in batches:
        sequences = await store.append(batch(*events))
        applied += sum(sequence.applied for sequence in sequences)
        final |= {sequence.user_id: sequence for sequence in sequences}
    assert applied == len(log)
    for user in {e.user_id for e in log}:
        own = [e for e in log if e.user_id == user]
        assert final[user].items == [e.item_id for e in own][-max_len:]
        assert (final[user].n, final[user].last_event_ts_ms) == (len(own), max(e.timestamp_ms for e in own))


async def test_an_empty_batch_sends_redis_nothing(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with commands_about(settings) as sent:
        assert await store_of(redis, settings).append(batch()) == []
    assert sent == []


async def test_a_batch_of_many_users_is_one_round_trip(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    store = store_of(redis, settings)
    await store.append(clicks("first", ["loads the script"]))
    many = batch(*(event(f"u{i % 100}", f"i{i}", i, partition=i % 4) for i in range(400)))
    async with commands_about(settings) as sent:
        assert len(await store.append(many)) == 100
    assert sent == ["EVALSHA"]


async def test_a_script_that_the_server_lost_is_loaded_again(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    store = store_of(redis, settings)
    await store.append(clicks("ann", ["a"]))
    async with raw_redis(settings) as raw:
        await raw.script_flush()
    assert (await store.append(clicks("ann", ["b"], first_offset=1)))[0].items == ["a", "b"]


async def test_the_largest_batch_is_appended_whole(redis: RedisClient, make_settings: MakeSettings) -> None:
    largest = 10_000  # the bound of max_batch
    store = store_of(redis, make_settings(), max_len=10_000)
    sequences = await store.append(clicks("ann", [f"item-{i}" for i in range(largest)]))
    assert sequences[0].items == [f"item-{i}" for i in range(largest)]
    many = await store.append(batch(*(event(f"u{i}", "i", i) for i in range(largest))))
    assert [sequence.user_id for sequence in many] == [f"u{i}" for i in range(largest)]


async def test_a_record_of_several_clicks_is_applied_whole_or_not_at_all(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    store = store_of(redis, make_settings(sequences_session_gap_s=10), max_len=4)
    order = record("ann", list("aabcbd"), BASE_MS, 0, 7, BASE_MS)  # longer than the sequence, with duplicates
    await store.append(batch(event("ann", "before", 6, BASE_MS - 1)))
    for again in ([order, order], [order], [order[:1], [event("ann", "late", 7)]]):  # in one batch, after a crash
        (found,) = await store.append(batch(*(click for clicks in again for click in clicks)))
        assert (found.items, found.n, found.session_n) == (list("bcbd"), 7, 7)
        assert found.record_ts_ms == (BASE_MS,) * len(again)
    other = record("ann", list("xy"), BASE_MS + 1, 1, 7, BASE_MS)  # another partition has offsets of its own
    (found,) = await store.append(batch(*other, *record("ann", list("pqrst"), BASE_MS + 10_002, 0, 8, BASE_MS)))
    assert (found.items, found.n, found.session_n, found.applied) == (list("qrst"), 14, 5, 7)


async def test_records_of_thousands_of_clicks_are_several_calls(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    store = store_of(redis, settings, max_len=10)
    orders = [record("ann", [f"{n}-{k}" for k in range(5_000)], BASE_MS, 0, n, BASE_MS) for n in range(4)]
    full = record("bob", ["b"] * 10_000, BASE_MS, 1, 0, BASE_MS)  # the largest record
    everything = batch(*orders[0], *orders[1][:4_000], *full, *(click for order in orders[2:] for click in order))
    for applied in (19_000, 0):
        async with commands_about(settings) as sent:
            ann, bob = await store.append(everything)
        assert (ann.n, ann.applied, bob.n, bob.applied) == (19_000, applied, 10_000, min(applied, 10_000))
        assert ann.items == [f"3-{k}" for k in range(4_990, 5_000)]
        assert ann.record_ts_ms == (BASE_MS,) * 4
        assert sent == ["EVALSHA"] * 3


async def test_concurrent_appends_of_the_same_events_apply_once(make_settings: MakeSettings) -> None:
    settings = make_settings()
    batches = [clicks("ann", [f"i{k}" for k in range(start, start + 7)], start) for start in range(0, 60, 3)]
    async with RedisClient(settings.redis) as one, RedisClient(settings.redis) as two:
        stores = [store_of(one, settings, 100), store_of(two, settings, 100)]
        answers = [await asyncio.gather(*(store.append(part) for store in stores)) for part in batches]
    final = answers[-1][0][0]
    assert final.items == [f"i{k}" for k in range(64)]
    assert sum(sequence.applied for pair in answers for found in pair for sequence in found) == final.n == 64


@pytest.mark.parametrize("start", [2**31 - 2, 2**32 - 2, 2**53 - 4])
async def test_offsets_beyond_32_bits_are_distinguished(
    redis: RedisClient, make_settings: MakeSettings, start: int
) -> None:
    store = store_of(redis, make_settings(), max_len=10)
    for _ in range(2):
        for offset in range(start, start + 4):  # the last is 2**53 - 1
            await store.append(clicks("ann", [str(offset)], offset))
    final = (await store.append(clicks("ann", ["again"], start + 3)))[0]
    assert (final.items, final.applied) == ([str(offset) for offset in range(start, start + 4)], 0)


async def test_partitions_are_guarded_apart(redis: RedisClient, make_settings: MakeSettings) -> None:
    store = store_of(redis, make_settings(), max_len=50)
    for partition in range(12):
        await store.append(clicks("ann", [f"p{partition}"], 5, partition))
    final = (await store.append(batch(*(event("ann", "replay", 5, partition=p) for p in range(12)))))[0]
    assert (final.items, final.applied) == ([f"p{partition}" for partition in range(12)], 0)


async def test_a_replayed_user_is_returned_and_so_published_again(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    store, again = store_of(redis, make_settings()), clicks("ann", ["a", "b"])
    first, second = (await store.append(again))[0], (await store.append(again))[0]
    assert (second.items, second.n, second.applied) == (first.items, 2, 0)


async def test_several_session_gaps_in_one_batch_leave_the_newest_session(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    store = store_of(redis, make_settings(sequences_session_gap_s=10))
    times = [0, 10_000, 20_001, 25_000, 90_000, 91_000, 101_000]
    (found,) = await store.append(batch(*(event("ann", str(t), k, BASE_MS + t) for k, t in enumerate(times))))
    assert (found.items, found.session_n, found.n, found.applied) == (["90000", "91000", "101000"], 3, 7, 7)


async def test_a_late_event_begins_no_session(redis: RedisClient, make_settings: MakeSettings) -> None:
    store = store_of(redis, make_settings(sequences_session_gap_s=10))
    (found,) = await store.append(batch(event("ann", "new", 0, BASE_MS), event("ann", "late", 1, BASE_MS - 60_000)))
    assert (found.items, found.session_n) == (["new", "late"], 2)


async def test_a_pause_counts_from_the_newest_click_not_from_the_last(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    store = store_of(redis, make_settings(sequences_session_gap_s=1800))
    times = {"first": BASE_MS, "an hour late": BASE_MS - 3_600_000, "a minute after": BASE_MS + 60_000}
    for offset, (item, at_ms) in enumerate(times.items()):
        (found,) = await store.append(batch(event("ann", item, offset, at_ms)))
    assert (found.items, found.session_n, found.last_event_ts_ms) == ([*times], 3, BASE_MS + 60_000)
    (found,) = await store.append(batch(event("ann", "late again", 3, 0)))
    assert (found.session_n, found.last_event_ts_ms) == (4, BASE_MS + 60_000)
    (found,) = await store.append(batch(event("ann", "a new session", 4, BASE_MS + 1_860_001)))
    assert (found.items, found.session_n) == (["a new session"], 1)


async def test_max_len_may_shrink_and_grow_between_restarts(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings()
    await store_of(redis, settings, 6).append(clicks("ann", list("abcdef")))
    (shrunk,) = await store_of(redis, settings, 3).append(clicks("ann", ["g"], 6))
    (grown,) = await store_of(redis, settings, 5).append(clicks("ann", ["h", "i", "j"], 7))
    assert (shrunk.items, shrunk.n) == (list("efg"), 7)
    assert (grown.items, grown.n) == (list("fghij"), 10)


async def test_a_raised_topic_epoch_accepts_offsets_that_begin_again(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    old, new = make_settings(), make_settings(kafka_topic_epoch=1)
    await store_of(redis, old).append(clicks("ann", ["a", "b"], 1_000))
    (stuck,) = await store_of(redis, old).append(clicks("ann", ["c"], 0))
    (raised,) = await store_of(redis, new).append(clicks("ann", ["c"], 0))
    with pytest.raises(StreamrecError, match="set STREAMREC_KAFKA_TOPIC_EPOCH as the other daemons do"):
        await store_of(redis, old).append(clicks("ann", ["d"], 2_000))
    assert (stuck.items, stuck.applied) == (["a", "b"], 0)
    assert (raised.items, raised.n, raised.applied) == (["a", "b", "c"], 3, 1)


async def test_every_write_renews_the_ttl(redis: RedisClient, make_settings: MakeSettings) -> None:
    settings = make_settings(sequences_ttl_s=1_000)
    store, key = store_of(redis, settings), Keys(settings.redis.key_prefix).sequence("ann")
    async with raw_redis(settings) as raw:
        for offset in range(3):
            await store.append(clicks("ann", ["a"], offset))
            assert 990 <= await raw.ttl(key) <= 1_000
            await raw.persist(key)


async def test_users_whose_ids_look_like_keys_do_not_collide(redis: RedisClient, make_settings: MakeSettings) -> None:
    store = store_of(redis, make_settings())
    users = ["a", "{a}", "a}", "{a", "a}:{a", """ a""", "a ", "A", "popular", "*"]
    await store.append(batch(*(event(user, f"of {user}", k) for k, user in enumerate(users))))
    again = await store.append(batch(*(event(user, "more", 100 + k) for k, user in enumerate(users))))
    assert [sequence.items for sequence in again] == [[f"of {user}", "more"] for user in users]


async def set_stored(settings: Settings, user: str, value: bytes | None) -> None:
    """Overwrite a user's stored value; None puts a list there."""
    key = Keys(settings.redis.key_prefix).sequence(user)
    async with raw_redis(settings) as raw:
        await raw.delete(key)
        if value is None:
            await raw.rpush(key, "not a string")  # type: ignore[misc]
        else:
            await raw.set(key, value)


async def get_stored(settings: Settings, user: str) -> bytes:
    async with raw_redis(settings) as raw:
        value = await raw.get(Keys(settings.redis.key_prefix).sequence(user))
        assert isinstance(value, bytes)
        return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"\0",
        b"garbage",
        b"1",
        b"1 2 3",
        b"\xff\xfe",
        b"1 1 1 1 0 0 0:1",
        b"1 -1 1 1 0 0 0:1\0a\0",
        b"1 1 1 1 0 0 x\0a\0",
        b'{"items": []}',
        b"x" * 100_000,
        b"1 5 1 2 0 0 0:1\0a\0b\0",
        b"1 1 2 2 0 0 0:1\0a\0b\0",
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_damaged_value_is_begun_anew_with_a_warning(
    redis: RedisClient, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture, value: bytes | None
) -> None:
    settings = make_settings()
    store = store_of(redis, settings)
    await store.append(batch(event("ann", "a", 0), event("bob", "b", 1), event("eve", "e", 2)))
    await set_stored(settings, "bob", value)
    with caplog.at_level(logging.WARNING):
        found = await store.append(batch(event("ann", "a2", 3), event("bob", "b2", 4), event("eve", "e2", 5)))
    assert [sequence.items for sequence in found] == [["a", "a2"], ["b2"], ["e", "e2"]]
    assert [sequence.n for sequence in found] == [2, 1, 2]
    warned = [r for r in caplog.records if "a damaged sequence was discarded" in r.getMessage()]
    assert [r.__dict__["user_id"] for r in warned] == ["bob"]


async def test_a_header_that_claims_too_many_items_loses_only_those(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    store = store_of(redis, settings, max_len=5)
    await set_stored(settings, "bob", b"1 900 900 9 0 0 0:1\0a\0")
    for offset, expected in ((2, ["b2"]), (3, ["b2", "b3"])):
        found = await store.append(batch(event("ann", f"a{offset}", offset), event("bob", f"b{offset}", offset)))
        assert found[1].items == expected
        assert found[1].n == 899 + offset


@against_redis
@given(st.integers(0, 40), st.integers(0, 40), st.binary(max_size=4))
async def test_a_damaged_value_affects_no_other_user(
    redis: RedisClient, make_settings: MakeSettings, start: int, end: int, junk: bytes
) -> None:
    settings = fresh(make_settings)
    store = store_of(redis, settings, max_len=3)
    await store.append(batch(*(event(user, item, 7) for user, item in [("ann", "a"), ("bob", "b")])))
    await store.append(batch(event("bob", "é", 8)))
    value = await get_stored(settings, "bob")
    await set_stored(settings, "bob", value[:start] + junk + value[end:])
    try:
        found = await store.append(batch(*(event(user, f"{user}2", 9) for user in ("ann", "bob"))))
    except StreamrecError as error:
        assert "newer" in str(error)  # the damage looks like a later format
        return
    by_user = {sequence.user_id: sequence for sequence in found}
    assert by_user["ann"].items == ["a", "ann2"]
    bob = by_user["bob"]
    assert len(bob.items) <= bob.session_n <= bob.n  # what the engine relies on
    assert len(bob.items) <= 3


async def test_a_format_of_a_newer_version_is_refused_and_left_alone(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    store = store_of(redis, settings)
    newer = b"2 1 1 1 0 0 0:1\0what a newer version writes"
    await set_stored(settings, "bob", newer)
    with pytest.raises(StreamrecError, match=r"format 2 .*bob.* newer streamrec") as caught:
        await store.append(clicks("bob", ["b"], 5))
    assert not isinstance(caught.value, RedisUnavailable)  # waiting would not help
    assert await get_stored(settings, "bob") == newer


async def test_outcomes_are_counted(redis: RedisClient, make_settings: MakeSettings) -> None:
    metrics = Metrics()
    store = SequenceStore(redis, make_settings().sequences, make_settings().kafka.topic_epoch, 5, metrics)
    await store.append(clicks("ann", ["a", "b", "c"]))
    await store.append(clicks("ann", ["b", "c", "d"], 1))
    value = metrics.registry.get_sample_value
    assert value("streamrec_events_total", {"outcome": "applied"}) == 4
    assert value("streamrec_events_total", {"outcome": "replayed"}) == 2
    assert value("streamrec_guard_rejections_total") == 2


async def test_mass_rejection_and_its_end_are_logged_once(
    redis: RedisClient, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    store, old = store_of(redis, make_settings()), clicks("ann", list("abcd"))
    await store.append(old)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            await store.append(old)
        await store.append(clicks("ann", ["e"], 4))
        await store.append(clicks("ann", ["f"], 5))
    lines = [(r.levelname, r.getMessage().split(" ")[0]) for r in caplog.records]
    assert lines == [("WARNING", "most"), ("INFO", "events")]
    assert "STREAMREC_KAFKA_TOPIC_EPOCH" in caplog.text


class RedisThatLosesTheAnswer(RedisClient):
    """Runs the script, then fails as if the connection broke before the answer came."""

    async def run(self, script: str, keys: list[str], args: Any) -> Any:
        await super().run(script, keys, args)
        raise RedisUnavailable("connection reset")


async def test_a_retry_after_a_lost_reply_applies_no_event_twice(make_settings: MakeSettings) -> None:
    settings, events = make_settings(), clicks("ann", ["a", "b"])
    async with RedisThatLosesTheAnswer(settings.redis) as faulty, RedisClient(settings.redis) as healthy:
        with pytest.raises(RedisUnavailable):
            await store_of(faulty, settings).append(events)
        (found,) = await store_of(healthy, settings).append(events)
    assert (found.items, found.n, found.applied) == (["a", "b"], 2, 0)


@pytest.mark.parametrize("value", [b"", b"1 2", b"2 1 1 1 0 0 \0", b"1 x 1 1 0 0 \0a\0", b"nothing at all"], ids=repr)
def test_an_error_about_a_damaged_sequence_names_the_user(value: bytes) -> None:
    with pytest.raises(StreamrecError, match="the stored sequence of user 'ann' cannot be read"):
        parse_sequence("ann", value)


@against_redis
@given(st.integers(0, 40), st.integers(0, 40), st.binary(max_size=4))
async def test_all_readers_agree_on_what_is_damaged(
    redis: RedisClient, make_settings: MakeSettings, start: int, end: int, junk: bytes
) -> None:
    settings = fresh(make_settings)
    value = b"1 9 5 2 1700000000000 0 0:7,3:8\0first\0second\0"
    value = value[:start] + junk + value[end:]
    await set_stored(settings, "ann", value)
    try:
        decoded = StoredSequence.decode("ann", value)
    except StreamrecError as error:
        with pytest.raises(StreamrecError, match=re.escape(str(error))):
            parse_sequence("ann", value)
        with pytest.raises(StreamrecError, match="newer streamrec"):
            await store_of(redis, settings).append(clicks("ann", ["a"], 10**9))
        return
    if decoded is not None and decoded.topic_epoch > 0:
        with pytest.raises(StreamrecError, match="later than this daemon's 0: set STREAMREC_KAFKA_TOPIC_EPOCH"):
            await store_of(redis, settings).append(clicks("ann", ["a"], 10**9))
        return
    (appended,) = await store_of(redis, settings, max_len=50).append(clicks("ann", ["a"], 10**9))
    if decoded is None:
        with pytest.raises(StreamrecError, match="the stored sequence of user 'ann' cannot be read: it is damaged"):
            parse_sequence("ann", value)
        assert (appended.items, appended.n) == (["a"], 1)
    else:
        assert parse_sequence("ann", value) == decoded.for_user("ann")
        assert appended.n in (decoded.n, decoded.n + 1)  # the value may have a later offset
