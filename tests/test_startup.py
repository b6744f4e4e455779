"""`streamrec serve` and `streamrec retrain` that start before what they need: servers, a first champion."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streamrec.local.servers import LocalServers
from streamrec.settings import Settings

from support.daemon_process import Daemon, Retrain, models
from support.kafka_client import feed
from support.oracle import assert_delivered
from support.preloaded import run_command
from support.servers import Servers, apache_kafka_home, own_servers
from support.starting_broker import StartingBroker
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
CHAMPION = "the first champion of the registry"


@pytest.fixture
def not_started() -> Iterator[LocalServers]:
    """Servers of this test that do not run yet."""
    with own_servers() as known:
        known.kafka.stop()
        known.redis.stop()
        yield known


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        port: int = listening.getsockname()[1]
        yield port


async def waits_for(daemon: Daemon, name: str) -> None:
    """Wait until a daemon says that it waits: alive, not ready."""

    async def waits() -> bool:
        assert daemon.process.poll() is None, daemon.output
        if "http=" not in daemon.output:
            return False
        return await daemon.get("/readyz") == (503, f"waiting for {name}; the log says why\n")

    await eventually(waits)
    assert await daemon.get("/livez") == (200, "ok\n")
    assert f"waiting for {name}: " in daemon.output


async def test_a_daemon_that_starts_before_all_it_needs_waits_alive_and_then_serves(
    not_started: LocalServers, start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, tmp_path: Path
) -> None:
    where: dict[str, Any] = {
        "redis_url": not_started.redis_url,
        "kafka_bootstrap_servers": not_started.kafka_bootstrap_servers,
        "registry_dir": tmp_path / "registry",
        "model_dir": None,
        "serving_liveness_timeout_s": 0.5,
    }
    settings = make_settings(**where)
    daemon = start_daemon(**where)
    await waits_for(daemon, "Redis")
    assert (await daemon.get("/"))[0] == 503
    assert await daemon.get("/livez") == (200, "ok\n")
    not_started.redis.start()
    await waits_for(daemon, "Kafka")
    not_started.kafka.start()
    await waits_for(daemon, CHAMPION)
    assert models(settings, "publish", str(model_dir), "--promote").returncode == 0
    await daemon.wait_ready()
    assert (await daemon.get("/"))[0] == 200
    await feed(settings, [Record(b"ann", click("ann", f"i{n}", n)) for n in range(20)])
    await daemon.wait_handled(20)
    await assert_delivered(make_settings(**where | {"registry_dir": None, "model_dir": model_dir}))
    begun = [line.split("waiting for ")[1].split(":")[0] for line in daemon.lines("WARNING") if "waiting" in line]
    come = [line.split(maxsplit=2)[2].split(" is there")[0] for line in daemon.lines("INFO") if "is there;" in line]
    assert begun == come == ["Redis", "Kafka", CHAMPION], "one line at the beginning, one at the end"


async def test_a_broker_that_names_no_broker_yet_is_waited_for(
    servers: Servers, start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    port = int(servers.kafka_bootstrap_servers.rsplit(":", 1)[1])
    async with StartingBroker(port).listening() as front:
        daemon = start_daemon(kafka_bootstrap_servers=front.address)
        await waits_for(daemon, "Kafka")
        assert "is still starting: it names no broker" in daemon.output
        front.starting = False
        await daemon.wait_ready()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("missing", ["Redis", "Kafka", CHAMPION])
async def test_a_signal_ends_the_wait_at_once(
    start_daemon: StartDaemon, silent_port: int, tmp_path: Path, missing: str, number: signal.Signals
) -> None:
    """Also in the middle of a try: these servers never answer."""
    changes: dict[str, dict[str, Any]] = {
        "Redis": {"redis_url": f"redis://127.0.0.1:{silent_port}/0"},
        "Kafka": {"kafka_bootstrap_servers": f"127.0.0.1:{silent_port}"},
        CHAMPION: {"registry_dir": tmp_path / "registry", "model_dir": None},
    }
    daemon = start_daemon(**changes[missing])
    await waits_for(daemon, missing)
    started = time.monotonic()
    daemon.signal(number)
    assert await daemon.wait_exit() == 0
    assert time.monotonic() - started < 5
    assert "stopped" in daemon.lines("INFO")[-1]
    assert "Traceback" not in daemon.output


async def test_a_refused_login_is_an_error_although_the_champion_is_missing_too(
    start_daemon: StartDaemon, make_settings: MakeSettings, tmp_path: Path
) -> None:
    later = {"registry_dir": tmp_path / "registry", "model_dir": None}
    daemon = start_daemon(redis_password="wrong", redis_username="nobody", **later)
    assert await daemon.wait_exit() == 1
    assert "STREAMREC_REDIS_PASSWORD" in daemon.output.splitlines()[-1]


async def test_a_database_that_redis_does_not_have_is_an_error(
    start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    url = make_settings().redis.url.get_secret_value().rsplit("/", 1)[0]
    daemon = start_daemon(redis_url=f"{url}/999")
    assert await daemon.wait_exit() == 1
    assert "DB index is out of range" in daemon.output.splitlines()[-1]


async def test_more_replicas_than_brokers_are_waited_for(servers: Servers, start_daemon: StartDaemon) -> None:
    """The other brokers may still start."""
    apache_kafka_home()  # the embedded server takes any number of replicas
    daemon = start_daemon(kafka_replication_factor=3)
    await waits_for(daemon, "Kafka")
    assert "Kafka refuses to create topic" in daemon.output
    admin = AIOKafkaAdminClient(bootstrap_servers=servers.kafka_bootstrap_servers)
    await admin.start()
    kafka = daemon.settings.kafka
    await admin.create_topics([NewTopic(name, 1, 1) for name in (kafka.topic, kafka.dead_letters)])
    await admin.close()
    await daemon.wait_ready()


def test_a_burst_waits_for_no_champion(make_settings: MakeSettings, tmp_path: Path) -> None:
    ended = run_command(make_settings(registry_dir=tmp_path / "registry"), "serve", "--burst")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith("make one with: streamrec models publish DIR --promote")


@contextlib.asynccontextmanager
async def retraining(settings: Settings) -> AsyncIterator[Retrain]:
    process = Retrain(settings)
    try:
        await process.says("waiting for Kafka: ")
        yield process
    finally:
        process.kill()


async def test_retraining_waits_for_kafka_until_it_comes_or_a_signal(
    not_started: LocalServers, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(
        redis_url=not_started.redis_url,
        kafka_bootstrap_servers=not_started.kafka_bootstrap_servers,
        archive_dir=tmp_path / "archive",
        registry_dir=tmp_path / "registry",
        archive_flush_s=0.2,
        retrain_http_port=0,
    )
    async with retraining(settings) as stopped:
        stopped.process.send_signal(signal.SIGTERM)
        assert "stopped" in (await stopped.ends()).splitlines()[-1]
    async with retraining(settings) as process:
        not_started.kafka.start()
        await process.says("archiving")
        await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
        await process.says("segments written")
        assert process.output.count("waiting for Kafka: ") == process.output.count("Kafka is there;") == 1
