"""Minutes of faults on Apache Kafka: processes are killed and frozen in mid-stream, and Redis equals the topic then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from streamrec.kafka.topics import ensure_topics
from streamrec.local.apache_kafka import java_command
from streamrec.local.process import ServerProcess
from streamrec.local.servers import LocalServers
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import feeding, read_topic, wait_caught_up
from support.kafka_cluster import kafka_cluster
from support.oracle import assert_delivered
from support.servers import apache_kafka_home
from support.waiting import eventually
from support.workload import workload

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
PATIENT_MS = 200_000  # a producer that waits as long for a broker that is frozen
CONSOLE_PRODUCER = "org.apache.kafka.tools.ConsoleProducer", "kafka.tools.ConsoleProducer"  # since 4.0, before


@pytest.fixture
def where(own: LocalServers, model_dir: Path) -> dict[str, Any]:
    return {"model_dir": model_dir, "kafka_bootstrap_servers": own.kafka_bootstrap_servers, "kafka_max_batch": 64}


@contextlib.asynccontextmanager
async def stream(settings: Settings, seed: int, per_s: float, at_least: int = 0) -> AsyncIterator[None]:
    """Produce while the block runs; when it has ended, report how soon Redis equals the topic."""
    async with feeding(settings, seed, per_s, at_least, request_timeout_ms=PATIENT_MS):
        yield
    ended = time.monotonic()
    await wait_caught_up(settings, timeout_s=120)
    users = await assert_delivered(settings)
    events = sum(user.n for user in users.values())
    log.info("%d events, %d users: equal %.1f s after the last click", events, len(users), time.monotonic() - ended)


async def restart(server: ServerProcess) -> None:
    """Start a killed server beside the running stream."""
    server.launch()

    async def is_up() -> bool:
        return server.is_up()

    await eventually(is_up)


async def test_daemon_and_broker_are_killed_again_and_again(
    own: LocalServers, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings, rng = make_settings(**where), random.Random(31)
    async with stream(settings, seed=31, per_s=250, at_least=20_000):
        for crash in range(16):
            daemon = start_daemon(**where)
            await daemon.wait_handled(200)
            await asyncio.sleep(rng.uniform(0, 1))  # the random moment
            if crash % 4 == 3:
                own.kafka.kill()
                await restart(own.kafka)
                await daemon.wait_more(200)
            daemon.kill()
        start_daemon(**where)


async def test_a_daemon_is_frozen_for_35_s_while_another_takes_over(
    where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(**where)
    async with stream(settings, seed=32, per_s=200):
        frozen, other = start_daemon(**where), start_daemon(**where)
        await frozen.wait_handled(100)
        await other.wait_handled(100)
        frozen.signal(signal.SIGSTOP)
        await asyncio.sleep(35)  # longer than session and rebalance time-outs
        assert await other.has_logged("partitions=[0, 1, 2, 3]")
        frozen.signal(signal.SIGCONT)
        await frozen.wait_more(100)


async def test_the_broker_is_frozen_for_70_s(
    own: LocalServers, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(**where)
    async with stream(settings, seed=33, per_s=100):
        daemon = start_daemon(**where)
        await daemon.wait_handled(100)
        own.kafka.pause()
        await asyncio.sleep(70)  # longer than every time-out of the client
        assert await daemon.get("/livez") == (200, "ok\n")
        assert (await daemon.get("/readyz"))[0] == 503
        own.kafka.resume()
        await daemon.wait_ready()
        await daemon.wait_more(100)


async def test_partitions_are_added_in_mid_stream(
    where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(**where)
    # users move to other partitions, so their order is the topic's only if the daemon has read all before
    daemon = start_daemon(**where)
    async with feeding(settings, seed=34, per_s=200):
        await daemon.wait_handled(300)
    await wait_caught_up(settings)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    await admin.create_partitions({settings.kafka.topic: NewPartitions(8)})
    await admin.close()
    await eventually(lambda: daemon.has_logged("partitions=[0, 1, 2, 3, 4, 5, 6, 7]"))
    async with feeding(settings, seed=35, per_s=200, metadata_max_age_ms=1_000):
        await daemon.wait_more(300)
    await wait_caught_up(settings)
    records = await read_topic(settings, settings.kafka.topic)
    assert len({record.partition for record in records}) == 8
    bad = await daemon.metric(EVENTS, outcome="dead_letter")
    assert await daemon.metric(EVENTS, outcome="applied") + bad == len(records)


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_clicks_of_kafkas_console_producer_are_served(
    compression: str, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings, home = make_settings(**where), apache_kafka_home()
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    good = [record for record, _ in zip(workload(36, bad_share=0), range(500), strict=False)]
    text = b"".join(b"%s\t%s\n" % (record.key, record.value) for record in good)
    tool = CONSOLE_PRODUCER[any(home.glob("libs/kafka_2.13-3.*.jar"))]
    arguments = ["--bootstrap-server", settings.kafka.bootstrap_servers, "--topic", settings.kafka.topic]
    arguments += ["--compression-codec", compression, "--property", "parse.key=true"]
    command = [*java_command(home), "-cp", f"{home}/libs/*", tool, *arguments]
    done = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert await start_daemon("--burst", **where).wait_exit() == 0
    users = await assert_delivered(settings)
    assert sum(user.n for user in users.values()) == 500


async def test_brokers_of_a_cluster_are_killed_one_after_another(
    tmp_path: Path, model_dir: Path, start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    with kafka_cluster(apache_kafka_home(), tmp_path) as nodes:
        where = {
            "model_dir": model_dir,
            "kafka_bootstrap_servers": ",".join(f"127.0.0.1:{node.port}" for node in nodes),
            "kafka_replication_factor": len(nodes),
            "kafka_max_batch": 64,
        }
        settings = make_settings(**where)
        daemon = start_daemon(**where)
        async with stream(settings, seed=37, per_s=200):
            await daemon.wait_ready()
            for node in nodes:
                await in_sync(settings, len(nodes))
                await daemon.wait_more(300)
                node.kill()
                begin = time.monotonic()
                await daemon.wait_more(100)
                log.info("broker killed: clicks are applied again after %.1f s", time.monotonic() - begin)
                await restart(node)
        assert "Traceback" not in daemon.output


async def in_sync(settings: Settings, replicas: int) -> None:
    """Wait until each partition has this number of replicas in sync."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()

    async def complete() -> bool:
        topics = await admin.describe_topics([settings.kafka.topic, "__consumer_offsets"])
        return all(len(part["isr"]) == replicas for topic in topics for part in topic["partitions"])

    try:
        await eventually(complete)
    finally:
        await admin.close()
