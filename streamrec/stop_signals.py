"""SIGTERM and Ctrl-C: the first asks a process to stop, the second ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals(stop: asyncio.Event, told: Callable[[str], None]) -> Iterator[None]:
    """Set ``stop`` at the first signal, after ``told`` was called with its name; exit with status 1 at the second."""

    def handle(name: str) -> None:
        if stop.is_set():
            log.warning("stopped at once", extra={"signal": name})
            os._exit(1)
        told(name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number.name)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
