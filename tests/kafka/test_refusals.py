"""What Kafka refuses: dead letters that are too large, static names that another daemon has, commits for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import NewTopic
from aiokafka.client import AIOKafkaClient, CoordinationType

from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import admin, feed, feeding, produce_clicks, produce_to, read_topic, wait_caught_up
from support.kafka_cluster import kafka_cluster
from support.oracle import assert_delivered
from support.servers import apache_kafka_home
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]


@pytest.fixture(autouse=True)
def on_apache_kafka() -> None:
    apache_kafka_home()


async def create_dead_letter_topic(settings: Settings, **options: str) -> None:
    configs = {name.replace("_", "."): value for name, value in options.items()}
    async with admin(settings) as client:
        await client.create_topics([NewTopic(settings.kafka.dead_letters, 1, 1, topic_configs=configs)])


@pytest.mark.parametrize("limit", [100_000, 2_000, 700])
async def test_a_dead_letter_that_its_topic_does_not_take_is_cut_at_last_to_its_headers(
    limit: int, start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    await create_dead_letter_topic(settings, max_message_bytes=str(limit))
    bad = b"{" + b"x" * 800_000
    small = [Record(b"k%d" % n, b"no click %d" % n) for n in range(50)]  # they would share a batch
    await feed(settings, [Record(None, bad), Record(b"ann", click("ann", "i1")), *small])
    start_daemon()
    await wait_caught_up(settings)
    letters = await read_topic(settings, settings.kafka.dead_letters)
    cut = [letter for letter in letters if b"streamrec.cut_from_bytes" in {n.encode() for n, _ in letter.headers}]
    assert [dict(letter.headers)["streamrec.cut_from_bytes"] for letter in cut if letter.key is not None] == [b"800001"]
    assert bad.startswith(cut[0].value or b"") and len(cut[0].value or b"") < limit
    assert {letter.value for letter in letters} >= {record.value for record in small}


async def test_a_topic_that_takes_no_dead_letter_ends_the_daemon_in_one_line(
    start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    await create_dead_letter_topic(settings, max_message_bytes="100")
    await feed(settings, [Record(b"k", b"no click")])
    daemon = start_daemon()
    assert await daemon.wait_exit() == 1
    assert f"topic {settings.kafka.dead_letters} refuses even a dead letter without its value" in daemon.output
    assert "Traceback" not in daemon.output


async def test_a_compacted_topic_takes_dead_letters_of_records_without_a_key(
    start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(kafka_partitions=1)
    await create_dead_letter_topic(settings, cleanup_policy="compact")
    await feed(settings, [Record(None, b"no click"), Record(b"ann", click("ann", "i1"))])
    start_daemon()
    await wait_caught_up(settings)
    (letter,) = await read_topic(settings, settings.kafka.dead_letters)
    assert (letter.key, letter.value) == (f"{settings.kafka.topic}/0/0".encode(), b"no click")


async def test_a_dead_letter_topic_that_was_deleted_is_created_again(
    start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    daemon = start_daemon()
    await daemon.wait_ready()
    async with admin(settings) as client:
        await client.delete_topics([settings.kafka.dead_letters])
    await feed_only(settings, [Record(b"k", b"no click")])
    await wait_caught_up(settings, timeout_s=120)
    assert [letter.value for letter in await read_topic(settings, settings.kafka.dead_letters)] == [b"no click"]


async def feed_only(settings: Settings, records: list[Record]) -> None:
    """Produce records, and create no topic."""
    for record in records:
        await produce_to(settings, 0, record.value or b"", record.key)


async def test_a_static_name_that_another_daemon_takes_ends_the_first_by_the_settings_name(
    start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(kafka_group_instance_id="one")
    first = start_daemon(kafka_group_instance_id="one")
    await first.wait_ready()
    second = start_daemon(kafka_group_instance_id="one")
    assert await first.wait_exit() == 1
    assert "STREAMREC_KAFKA_GROUP_INSTANCE_ID" in first.output.splitlines()[-1]
    assert "Traceback" not in first.output and "UnknownError" not in first.output
    await produce_clicks(settings, [("ann", "i1")])
    await second.wait_handled(1)


async def test_a_session_time_out_that_the_brokers_do_not_allow_is_one_line(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(kafka_session_timeout_s=100_000)
    assert await daemon.wait_exit() == 1
    assert "STREAMREC_KAFKA_SESSION_TIMEOUT_S" in daemon.output and "Traceback" not in daemon.output


@pytest.mark.long
async def test_a_daemon_lives_and_is_not_ready_while_kafka_takes_no_commits(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, tmp_path: Path
) -> None:
    """The only replica of the commits is on a broker that is down; the clicks have others."""
    options = {"offsets_topic_replication_factor": "1", "offsets_topic_num_partitions": "1"}
    with kafka_cluster(apache_kafka_home(), tmp_path, **options) as nodes:
        where: dict[str, Any] = {
            "model_dir": model_dir,
            "kafka_bootstrap_servers": ",".join(f"127.0.0.1:{node.port}" for node in nodes),
            "kafka_replication_factor": 3,
            "serving_liveness_timeout_s": 7,
        }
        settings = make_settings(**where)
        daemon = start_daemon(**where)
        async with feeding(settings, seed=5, per_s=50, request_timeout_ms=120_000):
            await daemon.wait_handled(100)
            coordinator = nodes[await coordinator_of(settings) - 1]
            coordinator.kill()
            await eventually(lambda: daemon.has_logged("the batch waits and is retried"), timeout_s=60)
            loop = asyncio.get_running_loop()
            until_s = loop.time() + 20  # past the liveness time-out, and past each time-out of a commit
            while loop.time() < until_s:
                assert (await daemon.get("/livez"))[0] == 200
                assert (await daemon.get("/readyz"))[0] == 503
                await asyncio.sleep(0.1)
            coordinator.start()
            await daemon.wait_more(50)
            await eventually(lambda: is_ready(daemon), timeout_s=60)
        await wait_caught_up(settings)
        await assert_delivered(settings)
        assert "Traceback" not in daemon.output


async def is_ready(daemon: Daemon) -> bool:
    return (await daemon.get("/readyz"))[0] == 200


async def coordinator_of(settings: Settings) -> int:
    client = AIOKafkaClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await client.bootstrap()
    try:
        return int(await client.coordinator_lookup(CoordinationType.GROUP, settings.kafka.group))
    finally:
        await client.close()
