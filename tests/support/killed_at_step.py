"""Kill a process at each step at which it changes a folder or an object store."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

from streamrec.storage import Place

from support.preloaded import fork_server
from support.s3_server import S3Server

CHANGES = ("fsync", "replace", "unlink", "rmdir", "mkdir")  # of the module os


def main() -> object:
    """Run ``main()`` of the module in the second argument; SIGKILL comes before its n-th change of the disk."""
    left, module, sys.argv = int(sys.argv[1]), sys.argv[2], sys.argv[2:]

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **more)

        return call

    program = importlib.import_module(module)
    for name in CHANGES:
        vars(os)[name] = counted(vars(os)[name])
    return program.main()


def killed_at_each_step(
    new_place: Callable[[], Place],
    server: S3Server | None,
    module: str,
    arguments: Callable[[Place], Sequence[str]],
    environ: Mapping[str, str],
) -> Iterator[tuple[Place, bool]]:
    """Run a program on one new place after the other, and kill it one step later each time.

    Yield each place, and whether the program was killed there; the last time it was not. In a folder a step is a change
    of a file's name or content on disk; in an object store it is a request, before which and after which it is killed.
    """
    for step in itertools.count(1):
        for when in ("before", "after") if server else ("before",):
            place = new_place()
            given = [*arguments(place)]
            program = module
            if server:
                server.kill_client(step, when)
            else:
                program, given = "support.killed_at_step", [str(step), module, *given]
            with tempfile.TemporaryFile() as log:
                process = fork_server().start(program, given, environ, log.fileno(), log.fileno())
                status = process.wait(100)
                log.seek(0)
                assert status in (0, -signal.SIGKILL), log.read().decode()
            if server:
                server.kill_client(0, "")  # none, from now on
            yield place, status != 0
            if not status:
                return
