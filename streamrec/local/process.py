"""Run a server as a child process: start, stop, kill, pause."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from streamrec.errors import EmbeddedError

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


class ServerProcess:
    """A server as a child process on a port of 127.0.0.1; a restart uses the same port.

    On Linux the kernel ends it when this process ends, even if that is killed.

    Args:
        log: the file that gets its output.
        command: returns its command line; gets the port.
        answers: returns whether the server at the other end of a connection is ready.
    """

    def __init__(
        self,
        name: str,
        log: Path,
        command: Callable[[int], list[str]],
        answers: Callable[[socket.socket], bool],
        port: int | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.name = name
        self.port = port or free_port()
        self._log = log
        self._command = command
        self._answers = answers
        self._start_timeout_s = start_timeout_s
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers; after a stop it has its data again.

        Raises:
            EmbeddedError: it does not start; the message has the end of its log.
        """
        self.launch()
        self.wait_up()

    def launch(self) -> None:
        """Start it, and do not wait: a node of a cluster answers only when others run too."""
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

    def wait_up(self) -> None:
        """Wait until it answers.

        Raises:
            EmbeddedError: it ended, or does not answer in time; the message has the end of its log.
        """
        deadline = time.monotonic() + self._start_timeout_s
        while not self.is_up():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise EmbeddedError(f"{self.name} did not start: {end_of(self._log.read_text(errors='replace'))}")
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

    def is_up(self) -> bool:
        """Return whether it answers now."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
            return self._answers(connection)
        return False


def end_of(log: str) -> str:
    """Return the end of a log for a message, without the frames of Java's stack traces."""
    return "\n".join(line for line in log.splitlines() if not line.startswith("\tat "))[-500:].strip()


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies. Linux; call it in a child before exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
