"""`streamrec rebuild`: lost data of Redis is restored while daemons run, and after any process was killed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from hypothesis import given
from hypothesis import strategies as st

import streamrec.rebuild.rebuild
from sasrec import Event, load_model
from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.errors import KafkaUnavailable, StreamrecError
from streamrec.kafka.reader import OffsetRange
from streamrec.kafka.topics import ensure_topics
from streamrec.metrics import Metrics
from streamrec.rebuild.past_clicks import PastClicks
from streamrec.rebuild.rebuild import Rebuilder, Report, rebuild
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import ClickEvent
from streamrec.serving.inspection import published, stored
from streamrec.serving.lists import SharedLists
from streamrec.serving.model import ServedModel
from streamrec.serving.predictor import Predictor
from streamrec.settings import Settings

from support.archives import CENTURY_S, archived
from support.daemon_process import Daemon
from support.kafka_client import delete_before, feed, feeding, raw_producer, wait_caught_up
from support.oracle import assert_delivered
from support.preloaded import Command
from support.redis_access import BASE_MS, batch, event, raw_redis, under
from support.redis_cluster import node
from support.relay import Relay, replicate, switch, two_servers
from support.sequences import against_redis, fresh, store_of
from support.servers import own_redis_server
from support.waiting import eventually
from support.workload import ORDERS, ROLES, Record, click, workload

MakeSettings = Callable[..., Settings]
# the clicks of these tests are years old
AGELESS = {"sequences_ttl_s": CENTURY_S, "lists_ttl_s": CENTURY_S}


@pytest.fixture
async def topic(make_settings: MakeSettings) -> None:
    await ensure_topics(make_settings().kafka, (make_settings().kafka.topic,))


@pytest.fixture
def ageless(make_settings: MakeSettings, model_dir: Path, tmp_path: Path) -> MakeSettings:
    """Settings with an archive of the test's own, under which nothing is too old."""
    return lambda **changes: make_settings(
        **({"model_dir": model_dir, "archive_dir": tmp_path / "archive"} | AGELESS | changes)
    )


async def archived_and_expired(settings: Settings, clicks: list[ClickEvent]) -> None:
    """Archive clicks that retention has removed from the topic since."""
    assert settings.archive.dir is not None
    archive = archived(settings.archive.dir, clicks, settings.kafka.topic_epoch)
    async with raw_producer(settings) as producer:
        for partition, end in archive.next_offsets().items():
            for _ in range(end):
                await producer.send(settings.kafka.topic, b"expired", partition=partition)
    for partition, end in archive.next_offsets().items():
        await delete_before(settings, end, partition)


async def archive_topic(settings: Settings) -> None:
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir, settings.kafka.topic_epoch)
    await Archiver(settings.kafka, settings.events, archive, settings.archive.flush_s).run(asyncio.Event(), burst=True)


async def values(settings: Settings, kinds: tuple[str, ...] = ("seq", "recs")) -> dict[bytes, bytes]:
    """Return the stored values of all users."""
    async with raw_redis(settings) as raw:
        keys = [key for kind in kinds for key in await raw.keys(f"{settings.redis.key_prefix}:{kind}:{{*")]
        return {key: await raw.get(key) for key in sorted(keys)}


async def forget(settings: Settings, *patterns: str) -> None:
    async with raw_redis(settings) as raw:
        for pattern in patterns or ("*",):
            for key in await raw.keys(f"{settings.redis.key_prefix}:{pattern}"):
                await raw.delete(key)


class RebuildProcess:
    """A `streamrec rebuild` process."""

    def __init__(self, settings: Settings, *arguments: str) -> None:
        self.command = Command(settings, "rebuild", *arguments)
        self.process = self.command.process

    async def ends(self, status: int = 0) -> tuple[str, str]:
        found, out, err = await asyncio.to_thread(self.command.ends, 100)
        assert found == status, err
        assert "Traceback" not in err
        return out, err


@contextlib.contextmanager
def rebuilding(settings: Settings, *arguments: str) -> Iterator[RebuildProcess]:
    running = RebuildProcess(settings, *arguments)
    try:
        yield running
    finally:
        running.command.kill()


async def test_a_flushed_redis_is_rebuilt_while_a_daemon_runs_and_clicks_flow(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings, tmp_path: Path
) -> None:
    with own_redis_server() as own:
        where = {"redis_url": own.redis_url}
        settings = ageless(**where)
        daemon = start_daemon(**AGELESS, **where)
        async with feeding(settings, seed=11, per_s=200):
            await daemon.wait_handled(600)
            await archive_topic(settings)
            await daemon.wait_handled(1_000)  # the archive is behind the topic
            async with raw_redis(settings) as raw:
                await raw.flushall()
            await daemon.wait_handled(1_200)  # and the daemon continues with the users that remain
            with rebuilding(settings) as first:
                out, err = await first.ends()
        assert "users rebuilt" in out and " 0 left alone because only Redis has" in out, (
            out
        )  # counts that the daemon had not flushed yet are not lost
        assert "archive read" in err and "topic read" in err
        await wait_caught_up(settings)
        users = await assert_delivered(settings)
        assert sum(user.n for user in users.values()) > 1_000
        before = await values(settings)
        with rebuilding(settings) as second:
            out, _ = await second.ends()
        assert out.startswith(f"0 users rebuilt, {len(users)} unchanged, 0 left alone"), out
        assert ", 0 lists published;" in out
        assert await values(settings) == before


@pytest.mark.parametrize("changes", [{}, {"sequences_session_gap_s": 25}, {"sequences_max_len": 3}], ids=str)
async def test_restored_values_equal_the_lost_ones_byte_for_byte(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings, changes: dict[str, Any]
) -> None:
    settings = ageless(**changes, **ORDERS)
    await feed(settings, islice(workload(12, order_share=0.3), 400))
    await archive_topic(settings)
    await feed(settings, islice(workload(13, order_share=0.3), 200))
    assert await start_daemon("--burst", **AGELESS, **changes, **ORDERS).wait_exit() == 0
    before, lists = await values(settings, ("seq",)), await values(settings, ("recs",))
    await forget(settings)
    report = await rebuild(settings)
    assert report == Report(rebuilt=len(before), lists=len(before), popularity=True)
    assert await values(settings, ("seq",)) == before
    assert (await values(settings, ("recs",))).keys() == lists.keys()
    await assert_delivered(settings)
    assert await format_of(settings) == b"1"


async def test_exclusions_are_restored_and_in_the_lists(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings
) -> None:
    settings = ageless(**ORDERS, **ROLES)
    await feed(settings, [Record(b"never", click("never", "i3", 1, event_type="dislike"))])
    await feed(settings, islice(workload(12, order_share=0.3, typed=True), 400))
    await archive_topic(settings)
    await feed(settings, islice(workload(13, order_share=0.3, typed=True), 200))
    assert await start_daemon("--burst", **AGELESS, **ORDERS, **ROLES).wait_exit() == 0
    before, exclusions = await values(settings), await stored_exclusions(settings)
    await forget(settings)
    report = await rebuild(settings)
    assert report.exclusions == len(exclusions) > 10
    assert await stored_exclusions(settings) == exclusions
    assert (await values(settings)).keys() == before.keys()
    await assert_delivered(settings)
    assert (await rebuild(settings)).lists == 0
    assert await stored_exclusions(settings) == exclusions


async def stored_exclusions(settings: Settings) -> dict[bytes, list[tuple[bytes, float]]]:
    async with raw_redis(settings) as raw:
        keys = await raw.keys(f"{settings.redis.key_prefix}:excl:{{*")
        found = {key: await raw.zrange(key, 0, -1, withscores=True) for key in keys}
    return {key: [pair for pair in pairs if not pair[0].startswith(b"\0")] for key, pairs in found.items()}


async def format_of(settings: Settings) -> bytes | None:
    async with raw_redis(settings) as raw:
        found: bytes | None = await raw.get(Keys(settings.redis.key_prefix).format)
        return found


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_a_rebuild_that_was_stopped_half_way_can_be_run_again(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings, ended_by: signal.Signals
) -> None:
    settings = ageless()
    await feed(settings, islice(workload(14), 600))
    assert await start_daemon("--burst", **AGELESS).wait_exit() == 0
    await archive_topic(settings)
    before = await values(settings, ("seq",))
    await forget(settings)
    with rebuilding(settings, "--rate", "20") as stopped:

        async def some() -> bool:
            return len(await values(settings, ("seq",))) >= 10

        await eventually(some)
        stopped.process.send_signal(ended_by)
        status = await asyncio.to_thread(stopped.process.wait, 30)
        assert status == (130 if ended_by == signal.SIGINT else -ended_by)
    half = await values(settings, ("seq",))
    assert 0 < len(half) < len(before)
    assert half.items() <= before.items()
    report = await rebuild(settings)
    assert report.rebuilt == len(before) - len(half)
    assert await values(settings, ("seq",)) == before
    await assert_delivered(settings)


async def test_imported_clicks_come_before_those_of_the_topic(ageless: MakeSettings) -> None:
    settings = ageless()
    await feed(settings, [Record(b"ann", click("ann", f"i{n}", BASE_MS + n)) for n in range(3)])
    await archive_topic(settings)
    assert settings.archive.dir is not None
    EventArchive(settings.archive.dir).import_events([Event("ann", f"i{n}", n) for n in range(10, 13)])
    assert (await rebuild(settings)).rebuilt == 1
    async with RedisClient(settings.redis) as redis:
        ((_, ann),) = [found async for found in stored(redis, None)]
        ((_, his_list),) = [found async for found in published(redis, None)]
    assert ann is not None and his_list is not None
    assert (ann.items, ann.n) == (["i10", "i11", "i12", "i0", "i1", "i2"], 6)
    assert (his_list.n, set(his_list.items) & set(ann.items)) == (6, set())


async def test_a_dry_run_reports_and_writes_nothing(ageless: MakeSettings) -> None:
    settings = ageless()
    await feed(settings, [Record(b"ann", click("ann", "i1", BASE_MS)), Record(b"bob", click("bob", "i2", BASE_MS))])
    await archive_topic(settings)
    with rebuilding(settings, "--dry-run") as dry:
        out, _ = await dry.ends()
    assert out.startswith("would be: 2 users rebuilt, 0 unchanged") and "2 lists published; " in out
    async with raw_redis(settings) as raw:
        assert await raw.keys(f"{settings.redis.key_prefix}*") == []


async def test_a_daemon_behind_the_rebuild_treats_its_clicks_as_replays_and_publishes(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings
) -> None:
    settings = ageless()
    await feed(settings, islice(workload(15), 300))
    await archive_topic(settings)
    await rebuild(settings)
    before = await values(settings, ("seq",))
    daemon = start_daemon(**AGELESS)
    await wait_caught_up(settings)
    await assert_delivered(settings)
    assert await values(settings, ("seq",)) == before
    assert "beside a rebuild" in daemon.output


async def test_popularity_is_restored_once(start_daemon: Callable[..., Daemon], ageless: MakeSettings) -> None:
    # the daemon counts only clicks whose items it stores: max_len must exceed the clicks of a user in a batch
    slow = {"lists_popular_half_life_s": CENTURY_S, "sequences_max_len": 500, **AGELESS}
    settings = ageless(**slow)
    await feed(settings, islice(workload(16), 500))
    assert await start_daemon("--burst", **slow).wait_exit() == 0
    await archive_topic(settings)
    key = Keys(settings.redis.key_prefix).popularity

    async def scores() -> dict[bytes, float]:
        async with raw_redis(settings) as raw:
            return {item: score for item, score in await raw.zrange(key, 0, -1, withscores=True) if item[0]}

    before = await scores()
    assert not (await rebuild(settings)).popularity
    assert await scores() == before
    await forget(settings, "popularity")
    assert (await rebuild(settings)).popularity
    assert await scores() == pytest.approx(before, rel=0.1)  # the years between the clicks
    async with raw_redis(settings) as raw:
        assert b'"model":"popular"' in await raw.get(Keys(settings.redis.key_prefix).popular)
        await raw.zremrangebyrank(key, 0, -2)
    assert (await rebuild(settings)).popularity


@pytest.mark.usefixtures("topic")
async def test_a_restored_sequence_has_its_old_ttl_and_expired_ones_are_not_restored(
    make_settings: MakeSettings, model_dir: Path, tmp_path: Path
) -> None:
    settings = make_settings(model_dir=model_dir, archive_dir=tmp_path / "archive")
    now_ms, day_ms = int(time.time() * 1000), 86_400_000
    ages = {"today": 0, "last week": 8, "last month": 30, "last year": 365, "back": 365}
    clicks = [
        event(user, item, 2 * n + k, now_ms - days * day_ms + k)
        for n, (user, days) in enumerate(ages.items())
        for k, item in enumerate(("i1", "i2"))
    ]
    await archived_and_expired(settings, clicks)
    async with RedisClient(settings.redis) as redis:  # a daemon has read the user's second click from an old file
        await store_of(redis, settings, 8).append(batch(clicks[-1]))
    report = await rebuild(settings)
    assert (report.rebuilt, report.too_old, report.lists) == (4, 1, 1)
    keys = Keys(settings.redis.key_prefix)
    async with raw_redis(settings) as raw:
        left_days = [await raw.ttl(keys.sequence(user)) / 86_400 for user in ages]
        assert left_days == pytest.approx([90, 82, 60, -2 / 86_400, 90], abs=0.01)
        assert [await raw.exists(keys.recommendation(user)) for user in ages] == [1, 0, 0, 0, 0]


@pytest.mark.usefixtures("topic")
async def test_a_larger_max_len_is_filled_from_the_archive_even_from_a_pruned_one(
    redis: RedisClient, ageless: MakeSettings
) -> None:
    settings = ageless(sequences_max_len=6)
    clicks = [event(user, f"i{n}", 2 * n + k, BASE_MS + n) for n in range(10) for k, user in enumerate(("ann", "bob"))]
    await store_of(redis, settings, 2).append(batch(*clicks))
    assert settings.archive.dir is not None
    of_ann = [e for e in clicks if e.user_id == "ann"]
    of_bob = [e for e in clicks if e.user_id == "bob"][5:]
    await archived_and_expired(settings, sorted([*of_ann, *of_bob], key=lambda e: e.offset))
    report = await rebuild(settings)
    assert (report.rebuilt, report.lists) == (2, 2)
    (ann, bob) = await store_of(redis, settings).read(["ann", "bob"])
    assert (ann.items, ann.n, ann.session_n) == ([f"i{n}" for n in range(4, 10)], 10, 10)
    assert (bob.items, bob.n, bob.session_n) == ([f"i{n}" for n in range(5, 10)], 10, 10)
    before = await values(settings)
    assert (await rebuild(settings)) == Report(unchanged=2)
    assert await values(settings) == before


@pytest.mark.usefixtures("topic")
async def test_a_list_that_is_older_than_its_sequence_is_published(redis: RedisClient, ageless: MakeSettings) -> None:
    settings = ageless()
    assert settings.archive.dir is not None
    await archived_and_expired(
        settings, [event(user, "i1", n, BASE_MS) for n, user in enumerate(("ann", "bob", "cid"))]
    )
    await rebuild(settings)
    keys = Keys(settings.redis.key_prefix)
    async with raw_redis(settings) as raw:
        await raw.delete(keys.recommendation("ann"))
        await raw.set(keys.recommendation("bob"), (await raw.get(keys.recommendation("bob"))).replace(b":1}", b":0}"))
    assert (await rebuild(settings)) == Report(unchanged=3, lists=2)
    async with raw_redis(settings) as raw:
        assert [(await raw.get(keys.recommendation(user)))[-6:] for user in ("ann", "bob")] == [b'"n":1}'] * 2


@pytest.mark.usefixtures("topic")
async def test_damaged_values_are_replaced_and_a_value_of_a_newer_version_is_left_alone(
    redis: RedisClient, ageless: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ageless()
    assert settings.archive.dir is not None
    await archived_and_expired(
        settings, [event(user, "i1", n, BASE_MS) for n, user in enumerate(("ann", "bob", "cid"))]
    )
    keys = Keys(settings.redis.key_prefix)
    async with raw_redis(settings) as raw:
        await raw.set(keys.sequence("ann"), "junk")
        await raw.lpush(keys.sequence("bob"), "another type")
        assert (await rebuild(settings)).rebuilt == 3
        assert [s.items for s in await store_of(redis, settings).read(["ann", "bob"])] == [["i1"], ["i1"]]
        await raw.set(keys.sequence("cid"), b"2 1 1 1 0 0 0:1\0newer")
        await raw.delete(keys.sequence("ann"))
        report = await rebuild(settings)
        assert (report.rebuilt, report.unchanged, report.refused) == (1, 1, {"cid"})
        assert "sequence of user 'cid' cannot be read: format 2 was written by a newer streamrec" in caplog.text
        assert await raw.get(keys.sequence("cid")) == b"2 1 1 1 0 0 0:1\0newer"
        await raw.set(keys.sequence("cid"), b"1 1 1 1 0 7 0:1\0i1\0")
        with pytest.raises(
            StreamrecError, match=r"'cid' has topic epoch 7, but kafka_topic_epoch is 0: set STREAMREC_K"
        ):
            await rebuild(settings)


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize("how", ["switched", "full"])
async def test_a_failover_in_mid_run_delays_a_rebuild_and_does_not_end_it(ageless: MakeSettings, how: str) -> None:
    with two_servers() as (former, new):
        await replicate(new, former)
        async with Relay(former) as relay:
            settings = ageless(redis_url=f"redis://127.0.0.1:{relay.port}/0")
            assert settings.archive.dir is not None
            await archived_and_expired(settings, [event(f"u{n}", "i1", n, BASE_MS) for n in range(100)])
            running = asyncio.create_task(rebuild(settings, rate_per_s=40))

            async def has_begun() -> bool:
                async with node(former) as client:
                    return bool(await client.keys(f"{settings.redis.key_prefix}:seq:*")) or running.done()

            await eventually(has_begun)
            if how == "switched":
                await switch(relay, former, new)
            else:
                async with node(former) as client:
                    await client.config_set("maxmemory", 1)
                    await asyncio.sleep(1.5)  # longer than the pause between two parts
                    assert not running.done()
                    await client.config_set("maxmemory", 0)
            report = await running
            assert report.rebuilt + report.unchanged == report.lists == 100  # an answer may have been lost
            assert len(await values(settings)) == 200


@pytest.mark.usefixtures("topic")
async def test_clicks_that_only_redis_has_are_not_lost(
    redis: RedisClient, ageless: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bob the archive missed a click; the one of ann has an offset that topic and archive have yet to reach."""
    monkeypatch.setattr(streamrec.rebuild.rebuild, "RETRY_TIMEOUT_S", 1.0)
    settings = ageless()
    assert settings.archive.dir is not None
    clicks = [event("bob", "i1", 0), event("ann", "i2", 1), event("bob", "i3", 2), event("cid", "i4", 3)]
    await archived_and_expired(settings, [clicks[0], clicks[1], clicks[3]])
    await store_of(redis, settings).append(batch(clicks[2], event("ann", "i5", 4)))
    before = await values(settings)
    assert (await rebuild(settings)) == Report(rebuilt=1, ahead=2, lists=1, popularity=True)
    assert before.items() <= (await values(settings)).items()


async def test_clicks_that_the_topic_has_deleted_are_reported(
    ageless: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ageless(kafka_partitions=1)
    await feed(settings, [Record(b"ann", click("ann", f"i{n}", BASE_MS + n)) for n in range(8)])
    assert settings.archive.dir is not None
    archived(settings.archive.dir, [event("ann", f"i{n}", n, BASE_MS + n) for n in range(3)])
    await delete_before(settings, 5)
    with caplog.at_level("WARNING"):
        assert (await rebuild(settings)).rebuilt == 1
    (line,) = [record for record in caplog.records if "clicks are lost" in record.getMessage()]
    assert (line.__dict__["first"], line.__dict__["last"]) == (3, 4)
    async with RedisClient(settings.redis) as redis:
        (ann,) = await store_of(redis, settings).read(["ann"])
    assert ann.items == ["i0", "i1", "i2", "i5", "i6", "i7"]


async def test_a_topic_created_again_is_rebuilt_with_the_clicks_before_it(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings
) -> None:
    settings = ageless()
    await feed(settings, [Record(b"ann", click("ann", f"i{n}", BASE_MS + n)) for n in range(4)])
    await archive_topic(settings)
    assert await start_daemon("--burst", **AGELESS).wait_exit() == 0
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    await admin.delete_topics([settings.kafka.topic])
    await admin.close()
    raised = ageless(kafka_topic_epoch=1)
    await feed(raised, [Record(b"ann", click("ann", f"i{n}", BASE_MS + n)) for n in range(4, 6)])
    assert await start_daemon("--burst", kafka_topic_epoch=1, **AGELESS).wait_exit() == 0
    await archive_topic(raised)
    before = await values(raised, ("seq",))
    assert b"i0\0i1\0i2\0i3\0i4\0i5\0" in next(iter(before.values()))
    await forget(raised)
    assert (await rebuild(raised)).rebuilt == 1
    assert await values(raised, ("seq",)) == before


async def test_users_moved_by_new_partitions_keep_their_order_where_the_topic_was_drained_before(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings
) -> None:
    settings = ageless(kafka_partitions=2, sequences_max_len=100)

    async def clicks_are_applied(numbers: range) -> None:
        users = {n: f"u{n % 30}" for n in numbers}
        await feed(settings, [Record(u.encode(), click(u, f"i{n}", BASE_MS + n)) for n, u in users.items()])
        assert await start_daemon("--burst", sequences_max_len=100, **AGELESS).wait_exit() == 0

    await clicks_are_applied(range(200))
    await archive_topic(settings)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    await admin.create_partitions({settings.kafka.topic: NewPartitions(5)})
    await admin.close()
    await clicks_are_applied(range(200, 400))
    await archive_topic(settings)
    await clicks_are_applied(range(400, 500))
    before = await values(settings, ("seq",))
    moved = [value for value in before.values() if b"," in value.split(b"\0")[0]]
    assert len(moved) > 5
    assert all(items == sorted(items, key=lambda item: int(item[1:])) for items in map(items_in, before.values()))
    await forget(settings)
    assert (await rebuild(settings)).rebuilt == 30
    assert await values(settings, ("seq",)) == before


def items_in(value: bytes) -> list[bytes]:
    return value.split(b"\0")[1:-1]


async def test_another_prefix_is_filled_before_the_daemons_move_there(
    start_daemon: Callable[..., Daemon], ageless: MakeSettings
) -> None:
    settings = ageless()
    prefix = f"{settings.redis.key_prefix}-new"
    moved = ageless(redis_key_prefix=prefix)
    await feed(settings, islice(workload(19), 200))
    assert await start_daemon("--burst", **AGELESS).wait_exit() == 0
    await archive_topic(settings)
    before = await values(settings, ("seq",))
    await rebuild(moved)
    assert list((await values(moved, ("seq",))).values()) == list(before.values())
    await feed(settings, islice(workload(20), 100))
    assert await start_daemon("--burst", redis_key_prefix=prefix, **AGELESS).wait_exit() == 0
    await assert_delivered(moved)
    assert await values(settings, ("seq",)) == before


async def test_without_kafka_or_an_archive_it_ends_in_one_line(ageless: MakeSettings, tmp_path: Path) -> None:
    archived(tmp_path / "archive", [event("ann", "i1", 0)])
    with pytest.raises(KafkaUnavailable, match="cannot be reached"):
        await rebuild(ageless(kafka_bootstrap_servers="127.0.0.1:1"))
    with pytest.raises(KafkaUnavailable, match=f"Kafka has no topic {ageless().kafka.topic}; is STREAMREC_KAFKA_TOPIC"):
        await rebuild(ageless())
    with rebuilding(ageless(archive_dir=tmp_path / "none")) as failing:
        _, err = await failing.ends(status=1)
    assert err.splitlines()[-1].startswith(f"streamrec: the archive {tmp_path}/none is empty; fill it with")
    with rebuilding(ageless(archive_dir=None)) as failing:
        _, err = await failing.ends(status=1)
    assert err.splitlines()[-1] == "streamrec: no archive: set STREAMREC_ARCHIVE_DIR or --archive-dir"


class TopicAtHand:
    """Replaces a TopicReader: returns the events that a test puts in, each once."""

    def __init__(self, next_offsets: dict[int, int]) -> None:
        self.next_offsets = next_offsets
        self.waiting: list[ClickEvent] = []

    async def find_partitions(self) -> None: ...

    async def drained(self) -> bool:
        return True

    async def poll(self, timeout_ms: int | None = None) -> dict[int, OffsetRange]:
        events, self.waiting = self.waiting, []
        if events:
            self.next_offsets[0] = events[-1].offset + 1
        return {0: OffsetRange(events[0].offset, events[-1].offset + 1, events)} if events else {}


@pytest.fixture
def scorer(redis: RedisClient, ageless: MakeSettings, model_dir: Path) -> Any:
    saved, settings = load_model(model_dir), ageless(inference_cache_bytes=0)
    lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, 8, saved.vocab)
    predictor = Predictor(
        ServedModel.of(saved, settings.inference, settings.sequences.max_len).engine,
        lists,
        settings.lists,
        settings.serving.rescore_users,
        Metrics(),
    )
    return lists, predictor


@against_redis
@given(st.integers(1, 14), st.data(), st.integers(1, 6), st.sampled_from([0, 0.010]))
async def test_no_click_is_lost_or_doubled_with_any_stored_and_archived_clicks(
    redis: RedisClient,
    ageless: MakeSettings,
    scorer: Any,
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    data: st.DataObject,
    max_len: int,
    gap_s: float,
) -> None:
    """Redis was lost before click ``lost``; a daemon has applied those up to ``applied``, and continues in the end."""
    settings = fresh(ageless, sequences_session_gap_s=gap_s)
    redis = under(redis, settings)
    clicks = [event("ann", f"i{n}", n, BASE_MS + data.draw(st.integers(0, 9)) + 6 * n) for n in range(count)]
    lost = data.draw(st.integers(0, count), "lost")
    applied = data.draw(st.integers(lost, count), "applied")
    in_archive = data.draw(st.integers(1, count), "in_archive")
    read = data.draw(st.integers(max(in_archive, lost), count), "read")  # a rebuild begins after the loss
    store = store_of(redis, settings, data.draw(st.integers(1, 6), "max_len of the daemon before"))
    if applied > lost:
        await store.append(batch(*clicks[lost:applied]))
    before = await redis.get_many([redis.keys.sequence("ann")])
    archive = archived(tmp_path_factory.mktemp("archive"), clicks[:in_archive])
    past, topic = PastClicks(archive, settings.sequences, max_len), TopicAtHand({0: in_archive})
    lists, predictor = scorer
    rebuilder = Rebuilder(settings, redis, past, topic, lists, predictor)  # type: ignore[arg-type]
    topic.waiting = clicks[in_archive:read]
    await rebuilder._read_topic()
    again = await rebuilder._rebuild(["ann"])
    after = await redis.get_many([redis.keys.sequence("ann")])
    assert again == (["ann"] if applied > max(lost, read) else [])
    if again:
        assert after == before, "clicks that the archive lacks remain"
        topic.waiting = clicks[read:]
        await rebuilder._read_topic()
        assert await rebuilder._rebuild(again) == []
    (found,) = await store_of(redis, settings, max_len).read(["ann"])
    assert found.n == (max(read, applied) if not again else count)
    twice = await values(settings)
    assert await rebuilder._rebuild(["ann"]) == []
    assert await values(settings) == twice
    # the daemon comes to what it had not applied, and again to some that it had
    store = store_of(redis, settings, max_len)
    await store.append(batch(*clicks[max(0, applied - 2) :]))
    (found,) = await store.read(["ann"])
    expected = fresh(ageless, sequences_session_gap_s=gap_s)
    (whole,) = await store_of(redis, expected, max_len).append(batch(*clicks))
    assert (found.items[-max_len:], found.n, found.session_n) == (whole.items, whole.n, whole.session_n)


@pytest.mark.usefixtures("topic")
async def test_a_click_without_a_usable_time_neither_cuts_nor_drops_a_user(
    make_settings: MakeSettings, model_dir: Path, tmp_path: Path
) -> None:
    settings = make_settings(model_dir=model_dir, archive_dir=tmp_path / "archive")
    now_ms = int(time.time() * 1000)
    times = {"ann": (now_ms, 0, now_ms + 1), "bob": (0, now_ms, now_ms), "cid": (now_ms, now_ms, 0), "dan": (0, 0, 0)}
    clicks = [
        event(user, f"i{n}", 3 * place + n, ts_ms)
        for place, (user, own) in enumerate(times.items())
        for n, ts_ms in enumerate(own)
    ]
    await archived_and_expired(settings, clicks)
    report = await rebuild(settings)
    assert (report.rebuilt, report.too_old, report.lists) == (4, 0, 4)
    async with RedisClient(settings.redis) as redis:
        found = {user: value async for user, value in stored(redis, None)}
        assert {user async for user, _ in published(redis, None)} == {*times}
    for user, own in times.items():
        value = found[user]
        assert value is not None
        assert (value.items, value.n, value.last_event_ts_ms) == (["i0", "i1", "i2"], 3, max(own))
    assert (await rebuild(settings)).unchanged == 4
