"""Run a node of Apache Kafka as a child process: broker and controller in one (KRaft).

``KAFKA_HOME`` names an unpacked Apache Kafka (``libs/*.jar``); the node needs the ``java`` of ``JAVA_HOME`` or PATH.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from streamrec.errors import EmbeddedError
from streamrec.local.process import ServerProcess, end_of, free_port

START_TIMEOUT_S = 60.0  # about 4 s on an idle machine
CLUSTER_ID = base64.urlsafe_b64encode(b"streamrec-local.")[:22].decode()
JAVA_OPTIONS = (
    "-Xms128m",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",  # less compilation: the node starts faster
    "-Djava.net.preferIPv4Stack=true",
)
# Metadata request, version 8: size, key, version, correlation id, no client id, no topics, three flags
_METADATA_REQUEST = struct.pack(">ihhihi???", 17, 3, 8, 1, -1, 0, False, False, False)
_METADATA_ANSWER = struct.Struct(">iiii")  # size, correlation id, throttle time, number of brokers
_LOG4J2 = """\
appender.stdout.type=Console
appender.stdout.name=stdout
appender.stdout.layout.type=PatternLayout
appender.stdout.layout.pattern=%d %p %m (%c)%n
rootLogger.level=WARN
rootLogger.appenderRef.stdout.ref=stdout
"""
_LOG4J1 = """\
log4j.rootLogger=WARN,stdout
log4j.appender.stdout=org.apache.log4j.ConsoleAppender
log4j.appender.stdout.layout=org.apache.log4j.PatternLayout
log4j.appender.stdout.layout.ConversionPattern=%d %p %m (%c)%n
"""


def kafka_home(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the Apache Kafka that the environment names; None if it names none."""
    return Path(environ["KAFKA_HOME"]) if environ.get("KAFKA_HOME") else None


def release(home: Path) -> str:
    """Return the version of an unpacked Apache Kafka, for example 4.3.1.

    Raises:
        EmbeddedError: there is none in the folder.
    """
    jars = sorted(home.glob("libs/kafka-clients-*.jar"))
    if not jars:
        raise EmbeddedError(f"KAFKA_HOME={home}: no Apache Kafka there (libs/kafka-clients-*.jar is missing)")
    return jars[0].stem.removeprefix("kafka-clients-")


def apache_kafka(
    home: Path, folder: Path, properties: Mapping[str, str] | None = None, port: int | None = None
) -> ServerProcess:
    """Return a node; its data and its log stay in the folder.

    Args:
        home: an unpacked Apache Kafka.
        properties: settings of the node, which override ours.
        port: None: a free one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    controller_port = free_port()

    def command(port: int) -> list[str]:
        return _prepare(home, folder, _properties(port, controller_port, folder) | dict(properties or {}))

    return ServerProcess("Apache Kafka", folder / "kafka.log", command, names_a_broker, port, START_TIMEOUT_S)


def names_a_broker(connection: socket.socket) -> bool:
    """Return whether the Kafka server at the other end is ready.

    Its port opens before it is part of its cluster; until then its metadata name no broker.
    """
    connection.sendall(_METADATA_REQUEST)
    answer = connection.recv(_METADATA_ANSWER.size, socket.MSG_WAITALL)
    return len(answer) == _METADATA_ANSWER.size and _METADATA_ANSWER.unpack(answer)[3] > 0


def _properties(port: int, controller_port: int, folder: Path) -> dict[str, str]:
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "log.dirs": str(folder / "data"),
        # topics of one node have one replica
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        # the first member of a group does not wait for others
        "group.initial.rebalance.delay.ms": "0",
        # sessions of members may end within seconds
        "group.min.session.timeout.ms": "1000",
    }


def _prepare(home: Path, folder: Path, properties: Mapping[str, str]) -> list[str]:
    """Write the configuration, format the folder unless it has data, and return the command line of the node.

    Raises:
        EmbeddedError: there is no java or no Apache Kafka, or the folder cannot be formatted.
    """
    java = [*java_command(home), f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}"]
    java += [f"-Dlog4j.configuration=file:{folder / 'log4j.properties'}", "-cp", f"{home / 'libs'}/*"]
    (folder / "log4j2.properties").write_text(_LOG4J2)
    (folder / "log4j.properties").write_text(_LOG4J1)
    configuration = folder / "server.properties"
    configuration.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    if not (folder / "data" / "meta.properties").exists():
        tool = [*java, "kafka.tools.StorageTool", "format", "-c", str(configuration), "-t", CLUSTER_ID]
        formatted = subprocess.run(tool, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if formatted.returncode:
            text = end_of(formatted.stderr.strip() or formatted.stdout)
            raise EmbeddedError(f"Apache Kafka in {home} could not format {folder / 'data'}: {text}")
    return [*java, "kafka.Kafka", str(configuration)]


def java_command(home: Path) -> list[str]:
    """Return the beginning of a command line that runs a class of Apache Kafka.

    Raises:
        EmbeddedError: there is no java or no Apache Kafka.
    """
    release(home)  # it must be there
    java_home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=Path(java_home, "bin") if java_home else None)
    if java is None:
        raise EmbeddedError(f"KAFKA_HOME={home}: Apache Kafka needs Java 17: no java on PATH nor in JAVA_HOME")
    return [java, *JAVA_OPTIONS]
