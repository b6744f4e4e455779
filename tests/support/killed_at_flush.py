"""Run a `streamrec` command that kills itself when it flushes a file to disk for the n-th time."""

from __future__ import annotations

import os
import signal
import sys

from streamrec.commands import main as command_line


def main() -> int:
    """Run the command of this process; its first argument is n."""
    left, flush = int(sys.argv[1]), os.fsync

    def fsync(file: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)

    os.fsync = fsync
    return command_line.main(sys.argv[2:])
