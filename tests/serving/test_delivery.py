"""The proof of delivery: daemons crash, join and leave in mid-stream; the topic says what Redis must hold then."""

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from streamrec.local.servers import LocalServers
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.serving.inspection import published, stored
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import feed, feeding, wait_caught_up
from support.oracle import assert_delivered
from support.servers import SHORTEST_SESSION_S
from support.waiting import eventually
from support.workload import ORDERS, ROLES, Record, click

REJECTIONS = "streamrec_guard_rejections_total"
CRASHES = 4


@pytest.mark.parametrize("kind", [{}, ORDERS, ORDERS | ROLES], ids=["clicks", "orders", "roles"])
async def test_every_event_is_applied_once_by_a_daemon_that_is_killed_repeatedly(
    start_daemon: Callable[..., Daemon],
    make_settings: Callable[..., Settings],
    model_dir: Path,
    kind: dict[str, Any],
    seed: int = 1,
) -> None:
    # small batches and a small cache: more places in which to be killed
    small: dict[str, Any] = {
        "kafka_max_batch": 16,
        "inference_cache_bytes": 20_000,
        "kafka_session_timeout_s": SHORTEST_SESSION_S,
        **kind,
    }
    settings = make_settings(model_dir=model_dir, **small)
    rng = random.Random(seed)
    async with feeding(settings, seed, per_s=300, at_least=3_000):
        for _ in range(CRASHES):
            daemon = start_daemon(**small)
            await daemon.wait_handled()
            await asyncio.sleep(rng.uniform(0, 0.5))  # the random moment
            daemon.kill()
    assert await start_daemon("--burst", **small).wait_exit() == 0
    users = await assert_delivered(settings)
    assert sum(user.n for user in users.values()) > (1_800 if "events_roles" in kind else 2_800)
    assert any(user.excluded for user in users.values()) == ("events_roles" in kind)


async def test_daemons_join_leave_and_die_in_mid_stream(
    own: LocalServers, start_daemon: Callable[..., Daemon], make_settings: Callable[..., Settings], model_dir: Path
) -> None:
    where = {
        "kafka_bootstrap_servers": own.kafka_bootstrap_servers,
        "kafka_session_timeout_s": SHORTEST_SESSION_S,
        "kafka_max_batch": 16,
    }
    settings = make_settings(model_dir=model_dir, **where)
    async with feeding(settings, seed=2, per_s=300):
        first = start_daemon(**where)
        await first.wait_handled()
        second, third = start_daemon(**where), start_daemon(**where)
        await second.wait_handled()
        await third.wait_handled()
        first.signal(signal.SIGTERM)
        assert await first.wait_exit() == 0
        await third.wait_more(200)
        second.kill()
        # when its session has expired, the third gets its partitions
        await eventually(lambda: third.has_logged("partitions=[0, 1, 2, 3]"))
    await wait_caught_up(settings)
    await assert_delivered(settings)


async def test_sessions_end_at_the_same_gaps_in_every_daemon(
    start_daemon: Callable[..., Daemon], make_settings: Callable[..., Settings], model_dir: Path
) -> None:
    sessions = {"sequences_session_gap_s": 25, "kafka_max_batch": 32, **ORDERS}
    settings = make_settings(model_dir=model_dir, **sessions)
    async with feeding(settings, seed=3, per_s=300):
        staying = start_daemon(**sessions)
        leaving = start_daemon(**sessions)
        await leaving.wait_handled(100)
        await staying.wait_handled(100)
        leaving.signal(signal.SIGTERM)
        assert await leaving.wait_exit() == 0
    await wait_caught_up(settings)
    users = await assert_delivered(settings)
    assert any(user.session_n < user.n for user in users.values()), "some user began a new session"


async def test_after_a_crash_between_append_and_publish_every_user_gets_a_list(
    own: LocalServers, start_daemon: Callable[..., Daemon], make_settings: Callable[..., Settings], model_dir: Path
) -> None:
    where = {
        "kafka_bootstrap_servers": own.kafka_bootstrap_servers,
        "redis_url": own.redis_url,
        "kafka_session_timeout_s": SHORTEST_SESSION_S,
    }
    settings = make_settings(model_dir=model_dir, **where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    # Redis is down until the batch waits for it, then Kafka: the batch is applied and published, never committed
    daemon.signal(signal.SIGSTOP)
    await feed(settings, [Record(f"u{n % 20}".encode(), click(f"u{n % 20}", f"i{n % 50}", n)) for n in range(200)])
    own.redis.pause()
    daemon.signal(signal.SIGCONT)
    await eventually(lambda: daemon.has_logged("the batch waits"))
    own.kafka.stop()
    own.redis.resume()
    async with RedisClient(settings.redis) as redis:
        applied = await eventually(lambda: published_events(redis, settings))
        daemon.kill()
        for user in range(20):  # as if the crash had come before the publish
            await redis._call("DEL", Keys(settings.redis.key_prefix).recommendation(f"u{user}"))
    own.kafka.start()
    after = start_daemon(**where)
    await wait_caught_up(settings)
    await assert_delivered(settings)
    assert await after.metric(REJECTIONS) == applied
    assert await after.metric(EVENTS, outcome="applied") == 200 - applied


async def published_events(redis: RedisClient, settings: Settings) -> int:
    """Return the number of stored events once all users have lists; 0 before."""
    sequences = {user: value.n async for user, value in stored(redis, None) if value}
    lists = {user: value.n async for user, value in published(redis, None) if value}
    return sum(sequences.values()) if sequences == lists else 0


async def test_a_topic_created_again_after_its_marks_were_lost_is_reported_and_a_raised_epoch_accepts_it(
    start_daemon: Callable[..., Daemon], make_settings: Callable[..., Settings], model_dir: Path
) -> None:
    settings = make_settings(model_dir=model_dir)
    old = [Record(b"ann", click("ann", f"i{n}", n)) for n in range(30)]
    await feed(settings, old)
    assert await start_daemon("--burst").wait_exit() == 0
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    await admin.delete_topics([settings.kafka.topic])
    await admin.close()
    async with RedisClient(settings.redis) as redis:  # with them a daemon ends: tests/kafka/test_created_again.py
        for number in range(settings.kafka.partitions):
            await redis._call("DEL", redis.keys.topic_mark(number))
    new = [Record(b"ann", click("ann", f"x{n}", 1_000 + n)) for n in range(20)]
    await feed(settings, new)

    # the group has no offsets any more, or offsets beyond the end: either way it reads from the beginning
    daemon = start_daemon()
    await daemon.wait_handled(20)
    assert await daemon.metric(REJECTIONS) == 20
    warning = next(line for line in daemon.lines("WARNING") if "applied before" in line)
    assert "STREAMREC_KAFKA_TOPIC_EPOCH" in warning
    assert "rejected=20" in warning
    daemon.signal(signal.SIGTERM)
    assert await daemon.wait_exit() == 0

    again = {"kafka_topic_epoch": 1, "kafka_group": f"{settings.kafka.group}-again"}
    assert await start_daemon("--burst", **again).wait_exit() == 0
    async with RedisClient(settings.redis) as redis:
        found = [value async for _, value in stored(redis, ["ann"])]
    assert found[0] is not None
    assert (found[0].n, found[0].items) == (50, [f"x{n}" for n in range(12, 20)])
