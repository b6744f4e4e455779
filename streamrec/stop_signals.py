"""Stop at the first SIGTERM or Ctrl-C, exit at once at the second, and do not hang at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

END_S = 15.0


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


def end_soon(status: int) -> None:
    """End the process in END_S, if it has not ended by then: a client that hangs must not keep it.

    Call it when all work is done, in the event loop.
    """
    timer = threading.Timer(END_S, _end, (status, asyncio.get_running_loop()))
    timer.daemon = True
    timer.start()


def _end(status: int, loop: asyncio.AbstractEventLoop) -> None:
    tasks = sorted(str(task.get_coro()) for task in asyncio.all_tasks(loop))
    threads = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    log.warning("not everything stopped in %g s; ended at once", END_S, extra={"tasks": tasks, "threads": threads})
    os._exit(status)
