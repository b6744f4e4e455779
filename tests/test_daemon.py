"""`streamrec serve` from outside: bad records, shutdown, start errors, endpoints, filters."""

import contextlib
import gzip
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import PublishedList
from streamrec.serving.inspection import published
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import feed, produce_clicks, raw_producer, read_topic, wait_caught_up
from support.oracle import assert_delivered
from support.preloaded import program, run_command
from support.servers import own_redis_server
from support.waiting import eventually
from support.workload import NO_EVENTS, Record, click

JUNK_BYTES = 10_000_000

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]


async def list_of(redis: RedisClient, settings: Settings, user: str) -> PublishedList | None:
    found = dict([pair async for pair in published(redis, [user])])
    return found[user]


async def test_bad_records_become_dead_letters_with_origin_and_reason_and_the_others_are_served(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    settings = make_settings(model_dir=model_dir)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    large = {"max.message.bytes": str(2 * JUNK_BYTES)}
    await admin.create_topics([NewTopic(settings.kafka.topic, 1, 1, topic_configs=large)])
    await admin.close()
    records = []
    for value in [*NO_EVENTS.values(), b"\x00junk" * (JUNK_BYTES // 5)]:
        records.append(Record(b"ann", value, bad=True))
        records.append(Record(b"ann", click("ann", f"i{len(records) % 50}", len(records))))
    await feed(settings, records)
    assert await start_daemon("--burst").wait_exit() == 0
    await assert_delivered(settings)
    letters = await read_topic(settings, settings.kafka.dead_letters)
    assert len(letters) == len(NO_EVENTS) + 1
    cut = [dict(letter.headers) for letter in letters if "streamrec.cut_from_bytes" in dict(letter.headers)]
    assert [headers["streamrec.cut_from_bytes"] for headers in cut] == [str(JUNK_BYTES).encode()]


async def test_sigterm_commits_what_was_applied_so_that_nothing_is_delivered_again(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    settings = make_settings(model_dir=model_dir)
    clicks = [Record(f"u{n % 30}".encode(), click(f"u{n % 30}", f"i{n % 50}", n)) for n in range(1_500)]
    first = start_daemon(kafka_max_batch=8)
    await first.wait_ready()
    await feed(settings, clicks)
    await first.wait_handled(100)
    first.signal(signal.SIGTERM)
    assert await first.wait_exit() == 0
    assert "stopped" in first.output
    second = start_daemon()
    await second.wait_ready(timeout_s=15)  # the first daemon has left the group, so the second need not wait
    second.signal(signal.SIGINT)
    assert await second.wait_exit() == 0
    third = start_daemon()
    await eventually(lambda: all_applied(first, second, third, settings, len(clicks)))
    assert await third.metric("streamrec_guard_rejections_total") == 0
    await assert_delivered(settings)


async def all_applied(first: Daemon, second: Daemon, third: Daemon, settings: Settings, events: int) -> bool:
    if "http=" not in third.output:
        return False
    last_words = [line for daemon in (first, second) for line in daemon.lines("INFO") if "stopped" in line]
    handled = [int(line.rsplit("events=", 1)[1]) for line in last_words]
    return sum(handled) + await third.metric(EVENTS, outcome="applied") == events


@contextlib.asynccontextmanager
async def waiting_for_redis(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, shutdown_timeout_s: float
) -> AsyncIterator[Daemon]:
    """Run a daemon whose batch waits for Redis; after the block the next daemon delivers the batch."""
    with own_redis_server() as own:
        where = {"redis_url": own.redis_url, "serving_shutdown_timeout_s": shutdown_timeout_s}
        settings = make_settings(model_dir=model_dir, **where)
        daemon = start_daemon(**where)
        await daemon.wait_ready()
        own.redis.stop()
        await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
        await eventually(lambda: daemon.has_logged("the batch waits"))
        daemon.signal(signal.SIGTERM)
        yield daemon
        own.redis.start()
        assert await start_daemon("--burst", **where).wait_exit() == 0
        await assert_delivered(settings)


async def test_a_second_signal_ends_a_daemon_with_a_waiting_batch_at_once(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    async with waiting_for_redis(start_daemon, make_settings, model_dir, shutdown_timeout_s=60) as daemon:
        await eventually(lambda: daemon.has_logged("stopping"))
        daemon.signal(signal.SIGTERM)
        assert await daemon.wait_exit(5) != 0


async def test_a_batch_that_cannot_be_finished_in_time_is_not_committed(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    async with waiting_for_redis(start_daemon, make_settings, model_dir, shutdown_timeout_s=1) as daemon:
        assert await daemon.wait_exit(15) == 1
        assert "not committed and will be redelivered" in daemon.output


def broken_model(tmp_path: Path, model_dir: Path) -> Path:
    path = tmp_path / "broken"
    path.mkdir()
    for file in model_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "model.safetensors").write_bytes(b"damaged")
    return path


@pytest.mark.parametrize(
    ("change", "words", "options"),
    [
        ({"kafka_bootstrap_servers": "127.0.0.1:1"}, "Kafka at 127.0.0.1:1 cannot be reached", ["--burst"]),
        (
            {"redis_url": "redis://ann:hunter2@127.0.0.1:1/0"},
            "Redis at redis://ann:********@127.0.0.1:1/0",
            ["--burst"],
        ),
        ({"model_dir": "/no/such/model"}, "no model directory at /no/such/model", []),
        ({"model_dir": "broken"}, "model.safetensors is damaged", []),
    ],
    ids=["Kafka", "Redis", "model missing", "model damaged"],
)
def test_a_daemon_that_cannot_start_reports_why_in_one_line(
    change: dict[str, str],
    words: str,
    options: list[str],
    make_settings: MakeSettings,
    model_dir: Path,
    tmp_path: Path,
) -> None:
    if change.get("model_dir") == "broken":
        change = {"model_dir": str(broken_model(tmp_path, model_dir))}
    changes: dict[str, Any] = {"model_dir": model_dir, "log_level": "WARNING"} | change
    ended = run_command(make_settings(**changes), "serve", *options)
    assert ended.returncode == 1
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "hunter2" not in ended.stderr + ended.stdout


async def test_the_endpoints_show_the_counts(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
) -> None:
    settings = make_settings(model_dir=model_dir)
    # two users fit into the cache: 2 x 2 blocks x 8 tokens x 16 units x 4 bytes each
    daemon = start_daemon(inference_cache_bytes=2 * 2 * 2 * 8 * 16 * 4, events_roles="click=click")
    await daemon.wait_ready()
    assert await daemon.metric("streamrec_rebalances_total") == 1
    assert await daemon.metric("streamrec_model_info") == 1
    clicks = [Record(f"u{n % 4}".encode(), click(f"u{n % 4}", f"i{n}" if n % 5 else "x", n)) for n in range(40)]
    shapes = [
        {"item_id": "i1"},
        {"item_id": ["i1", "i2"]},
        {"items": [{"id": "i1"}]},
        {"item_id": "i1", "timestamp": "2026-01-31T12:00:00Z"},
        {"user_id": None},
    ]
    impressions = [json.dumps({"user_id": "u1", "event_type": "impression"} | shape).encode() for shape in shapes * 20]
    other = [*(Record(b"u1", value) for value in impressions), Record(b"u1", b"junk", bad=True)]
    for record in clicks:
        await feed(settings, [record])
    await feed(settings, other)
    await daemon.wait_handled(40)

    async def settled() -> bool:
        done = await daemon.metric("streamrec_dead_letters_total") == 1
        return done and await daemon.metric("streamrec_lag_records") == 0

    await eventually(settled)
    outcomes = {name: await daemon.metric(EVENTS, outcome=name) for name in ("applied", "ignored", "dead_letter")}
    assert outcomes == {"applied": 40, "ignored": 100, "dead_letter": 1}
    assert await daemon.metric("streamrec_click_to_published_seconds_count") == 40
    assert await daemon.metric("streamrec_unknown_items_total") == 8
    assert await daemon.metric("streamrec_cache_evictions_total") > 0
    assert await daemon.metric("streamrec_cached_users") == 2
    for histogram in ("streamrec_batch_events", "streamrec_inference_seconds", "streamrec_redis_seconds"):
        assert await daemon.metric(f"{histogram}_count") > 0
    assert (await daemon.get("/livez"))[0] == 200


async def test_field_names_of_the_producers_and_compressed_records_are_understood(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, redis: RedisClient
) -> None:
    names = {"events_user_id": "uid", "events_item_id": "sku", "events_timestamp": "ts"}
    settings = make_settings(model_dir=model_dir, **names)
    await feed(settings, [])
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        async with raw_producer(settings, compression_type=codec) as producer:
            value = json.dumps({"uid": codec, "sku": "i1", "ts": 1_700_000_000_005, "more": "x" * 2_000}).encode()
            assert len(gzip.compress(value)) < len(value)
            await producer.send_and_wait(settings.kafka.topic, value, key=codec.encode())
    assert await start_daemon("--burst", **names).wait_exit() == 0
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        found = await list_of(redis, settings, codec)
        assert found and (found.n, found.event_ts_ms) == (1, 1_700_000_000_005), codec


async def test_blocked_items_disappear_from_lists_published_after_they_were_blocked(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, redis: RedisClient
) -> None:
    settings = make_settings(model_dir=model_dir)
    daemon = start_daemon(lists_refresh_s=0.1, lists_filter_seen=False)
    await daemon.wait_ready()
    await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
    await daemon.wait_handled(1)
    before = await eventually(lambda: list_of(redis, settings, "ann"))
    keys = Keys(settings.redis.key_prefix)
    most_popular = "i0"
    await redis._call("SADD", keys.blocklist, before.items[0], most_popular)

    async def popular_without_it() -> bool:  # then the blocklist was read
        value = (await redis.get_many([keys.popular]))[0]
        return value is not None and most_popular not in json.loads(value)["items"]

    await eventually(popular_without_it)
    await feed(settings, [Record(b"ann", click("ann", "i1", 2))])
    await daemon.wait_handled(2)

    async def list_without_it() -> bool:
        found = await list_of(redis, settings, "ann")
        return found is not None and found.n == 2 and before.items[0] not in found.items and len(found.items) == 20

    await eventually(list_without_it)


async def test_a_user_without_a_known_item_gets_the_popular_list(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, redis: RedisClient
) -> None:
    settings = make_settings(model_dir=model_dir)
    await feed(settings, [Record(b"ann", click("ann", "never seen", 1))])
    assert await start_daemon("--burst").wait_exit() == 0
    found = await list_of(redis, settings, "ann")
    assert found is not None
    assert found.model == "popular"
    assert found.items[:3] == ["i0", "i1", "i2"], "the most clicked ones of the training data"


async def test_titles_that_cannot_be_read_end_no_daemon(
    start_daemon: StartDaemon, make_settings: MakeSettings, tmp_path: Path
) -> None:
    titles = {"a folder": tmp_path, "nothing there": tmp_path / "none.csv", "no titles": tmp_path / "bad.parquet"}
    titles["no titles"].write_bytes(b"PAR1\xff\x00")
    settings = make_settings()
    daemons = [start_daemon(http_titles=path) for path in titles.values()]
    await produce_clicks(settings, [(f"u{n}", f"i{n}") for n in range(20)])
    for daemon, path in zip(daemons, titles.values(), strict=True):
        await daemon.wait_ready()
        (warning,) = daemon.lines("WARNING", "ERROR")
        assert f"the page shows item ids without titles: titles in {path}: cannot be read: " in warning
        assert (await daemon.get("/metrics"))[0] == 200
    await wait_caught_up(settings)


async def test_a_loop_beside_the_clicks_that_fails_goes_on_and_is_shown(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, redis: RedisClient, tmp_path: Path
) -> None:
    settings, broken = make_settings(model_dir=model_dir), tmp_path / "broken"
    broken.touch()
    daemon = start_daemon(command=("support.broken_history", str(broken), program(), "serve"))
    await daemon.wait_ready()

    async def fails() -> bool:
        return await daemon.metric("streamrec_loop_failing", loop="history") == 1

    await eventually(fails)
    assert await daemon.get("/readyz") == (200, "ok; the loop history fails, and the log says why\n")
    assert await daemon.metric("streamrec_loop_failures_total", loop="history") >= 1
    await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
    await daemon.wait_handled(1)
    assert await eventually(lambda: list_of(redis, settings, "ann"))
    broken.unlink()
    await eventually(lambda: daemon.has_logged("the loop history works again"))
    assert await daemon.get("/readyz") == (200, "ok\n")
    assert daemon.output.count("the loop history fails and is tried again: ZeroDivisionError") == 1
