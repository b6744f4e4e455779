"""Commands as child processes without the seconds that importing PyTorch takes.

A server process imports streamrec once and forks a child for each command: a real process with its own environment
and output, which gets real signals. Tests of the start itself run `python -m streamrec` instead.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamrec.local.daemon import environment
from streamrec.local.embedded_kafka import adapted
from streamrec.local.servers import EMBEDDED_PROGRAM
from streamrec.settings import Settings

CODE = "from support.preloaded import serve; serve()"
PRELOADED = (
    EMBEDDED_PROGRAM,
    "streamrec.__main__",
    "streamrec.archive.follow",
    "streamrec.daemon",
    "streamrec.demo.daemon",
    "streamrec.rebuild.rebuild",
    "streamrec.retraining.worker",
)
TESTS = Path(__file__).parents[1]


class ForkedCommand:
    """A running command, with the methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._answers = connection.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status if the process has ended; negative: the signal that ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended; return its exit status."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The server process, seen from the tests."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            stdin=theirs,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *sys.path)), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        atexit.register(self.stop)

    def start(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str], output: int, errors: int
    ) -> ForkedCommand:
        """Fork a child that runs ``main()`` of a module.

        Args:
            output, errors: file descriptors of its stdout and stderr.
        """
        ours, theirs = socket.socketpair()
        request = json.dumps({"module": module, "arguments": list(arguments), "env": dict(env)}).encode()
        with theirs:
            socket.send_fds(self._control, [len(request).to_bytes(4, "big")], [theirs.fileno(), output, errors])
            self._control.sendall(request)
        return ForkedCommand(ours)

    def stop(self) -> None:
        """End the server, and with it what is left of its children."""
        self._control.close()
        self._process.wait()


@functools.cache
def fork_server() -> ForkServer:
    """Return the server of this process; it starts on first use."""
    return ForkServer()


def program() -> str:
    """Return the module of the command line, the adapted one if this process uses the embedded Kafka server."""
    return EMBEDDED_PROGRAM if adapted() else "streamrec.__main__"


class Command:
    """A running `streamrec` command whose output is read when it has ended."""

    def __init__(self, settings: Settings, *arguments: str) -> None:
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = fork_server().start(
            program(), arguments, environment(settings), self._output.fileno(), self._errors.fileno()
        )

    def ends(self, timeout_s: float = 100.0) -> tuple[int, str, str]:
        """Wait for the end; return exit status, stdout and stderr."""
        status = self.process.wait(timeout_s)
        texts = []
        for file in (self._output, self._errors):
            file.seek(0)
            texts.append(file.read().decode())
        return status, *texts

    def first_error_line(self) -> str:
        """Return the first line that it has written to stderr; empty before."""
        text = os.pread(self._errors.fileno(), 65_536, 0).decode()
        return text.splitlines()[0] if "\n" in text else ""

    def has_logged(self, text: str) -> bool:
        """Return whether it has written a text to stderr."""
        return text in os.pread(self._errors.fileno(), 65_536, 0).decode()

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()
        self._output.close()
        self._errors.close()


def run_command(settings: Settings, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a command as an operator does; return its exit status and output."""
    command = Command(settings, *arguments)
    try:
        return subprocess.CompletedProcess(list(arguments), *command.ends(timeout_s))
    finally:
        command.kill()


def serve() -> None:
    """Fork children on request, and report how each ended; until the tests close the connection."""
    _preload()
    control = socket.socket(fileno=0)
    children: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if woken in ready:
                woken.recv(4096)
            _reap(children)
            if control in ready and not _fork(control, children):
                break
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _reap(children: dict[int, socket.socket]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with children.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _fork(control: socket.socket, children: dict[int, socket.socket]) -> bool:
    """Serve one request; return whether there was one."""
    head, descriptors, _, _ = socket.recv_fds(control, 4, 3)
    if not head:
        return False
    request = b""
    while len(request) < int.from_bytes(head, "big"):
        request += control.recv(int.from_bytes(head, "big") - len(request))
    connection, output, errors = descriptors
    pid = os.fork()
    if not pid:
        _child(json.loads(request), control, [*children.values()], connection, output, errors)
    os.close(output)
    os.close(errors)
    children[pid] = socket.socket(fileno=connection)
    children[pid].sendall(b"%d\n" % pid)
    return True


def _child(
    request: dict[str, object],
    control: socket.socket,
    others: list[socket.socket],
    connection: int,
    output: int,
    errors: int,
) -> None:
    """Become the command; never return."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.close(connection)
    for other in others:
        other.close()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (errors, 2)):
        os.dup2(source, target)
    control.detach()
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    status = 1
    try:
        sys.argv = ["streamrec", *request["arguments"]]  # type: ignore[misc]
        status = importlib.import_module(str(request["module"])).main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _preload() -> None:
    """Import what the commands import, and load the compiled kernels."""
    import numpy as np
    import torch

    for module in PRELOADED:
        importlib.import_module(module)
    from sasrec import Engine, ItemVocab, SASRec, SASRecConfig

    torch.set_num_threads(1)
    model = SASRec(SASRecConfig(10, max_len=8, hidden_units=16))
    engine = Engine(model, ItemVocab([f"i{n}" for n in range(10)]), cache_bytes=1 << 20)
    engine.recommend([np.arange(1, 4), np.arange(1, 3)], 3, users=["ann", "bob"])
