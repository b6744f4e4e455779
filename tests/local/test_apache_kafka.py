"""A node of Apache Kafka as a child process."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from streamrec.errors import EmbeddedError
from streamrec.kafka.topics import ensure_topics
from streamrec.local.apache_kafka import apache_kafka, names_a_broker
from streamrec.local.process import ServerProcess
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.kafka_client import produce_clicks, read_topic
from support.servers import apache_kafka_home


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ServerProcess]:
    server = apache_kafka(apache_kafka_home(), tmp_path / "kafka")
    yield server
    server.kill()


def settings_of(node: ServerProcess) -> Settings:
    return load_settings(flags={"kafka_bootstrap_servers": f"127.0.0.1:{node.port}"})


async def test_a_killed_node_comes_back_on_its_port_with_every_acknowledged_record(node: ServerProcess) -> None:
    settings = settings_of(node)
    node.start()
    assert await ensure_topics(settings.kafka, ["clicks"]) == ["clicks"]
    await produce_clicks(settings, [(f"user {n}", "item") for n in range(100)])
    node.kill()
    node.start()
    assert len(await read_topic(settings, "clicks")) == 100


def test_a_property_that_kafka_refuses_is_reported(tmp_path: Path) -> None:
    node = apache_kafka(apache_kafka_home(), tmp_path, {"process.roles": "nonsense"})
    with pytest.raises(EmbeddedError, match=r"could not format .*nonsense"):
        node.start()


def test_a_folder_without_apache_kafka_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"KAFKA_HOME=.*: no Apache Kafka there"):
        apache_kafka(tmp_path, tmp_path / "kafka").start()


@pytest.mark.parametrize("java_home", [None, "no-such-folder"])
def test_a_missing_java_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, java_home: str | None) -> None:
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka-clients-4.3.1.jar").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if java_home is not None:
        monkeypatch.setenv("JAVA_HOME", java_home)
    with pytest.raises(EmbeddedError, match="needs Java 17: no java on PATH nor in JAVA_HOME"):
        apache_kafka(tmp_path, tmp_path / "kafka").start()


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (struct.pack(">iiii", 20, 1, 0, 1), True),
        (struct.pack(">iiii", 20, 1, 0, 0), False),  # it listens, and is not yet part of its cluster
        (b"\0\0\0", False),
    ],
)
def test_a_node_is_ready_when_its_metadata_name_a_broker(answer: bytes, ready: bool) -> None:
    ours, theirs = socket.socketpair()

    def server() -> None:
        with theirs:
            theirs.recv(64)
            theirs.sendall(answer)

    with ours:
        thread = Thread(target=server)
        thread.start()
        assert names_a_broker(ours) is ready
        thread.join()
