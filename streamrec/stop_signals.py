"""Stop at the first SIGTERM or Ctrl-C, exit at once at the second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals(stop: asyncio.Event, on_first: Callable[[str], None]) -> Iterator[None]:
    """At the first signal call ``on_first`` with its name, then set ``stop``; at the second exit with status 1."""

    def handle(name: str) -> None:
        if stop.is_set():
            log.warning("stopped at once", extra={"signal": name})
            os._exit(1)
        on_first(name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number.name)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
