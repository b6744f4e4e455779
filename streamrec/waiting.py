"""Wait for what may come by itself: a server that starts, the first champion of a registry.

What only an operator can mend is not waited for: that error leaves at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from streamrec.errors import (
    KafkaRefused,
    KafkaUnavailable,
    NoChampion,
    RedisRefused,
    RedisUnavailable,
    Stopped,
    StoreUnreachable,
)

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 3.0
CANCEL_AGAIN_S = 2.0  # what a task does at its end takes less
R = TypeVar("R")


def _ignore(_: str) -> None:
    pass


async def until_there(
    name: str, attempt: Callable[[], Awaitable[R]], stop: asyncio.Event, note: Callable[[str], None] = _ignore
) -> R:
    """Repeat an attempt until it succeeds; return its result.

    Each reason to wait is logged once, and the end of the wait.

    Args:
        name: the missing server or thing, for log and ``note``.
        attempt: makes new clients each time: one that met a starting broker may never find the others.
        stop: ends the wait.
        note: called with the name when the wait begins, and with an empty text when it ends.

    Raises:
        Stopped: ``stop`` was set first.
        StreamrecError: waiting would not help.
    """
    reasons: set[str] = set()
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            result = await _unless_stopped(attempt(), stop)
        except (KafkaRefused, RedisRefused):
            raise
        except (KafkaUnavailable, RedisUnavailable, StoreUnreachable, NoChampion) as error:
            if str(error) not in reasons:
                reasons.add(str(error))
                log.warning("waiting for %s: %s", name, error)
            note(name)
        else:
            if reasons:
                log.info("%s is there; the start continues", name)
                note("")
            return result
        await pause(stop, pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Wait some seconds, or until ``stop`` is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended.

    A task can lose a cancellation: before Python 3.12 `asyncio.wait_for`, which clients use, loses one that comes
    together with the result. So each task is cancelled again until it ends.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # else asyncio would log it


async def _unless_stopped(work: Awaitable[R], stop: asyncio.Event) -> R:
    """Return the result of the work; cancel it if ``stop`` is set first, and raise Stopped."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Stopped("stopped while waiting")
        return working.result()
    finally:
        await cancel(working, stopping)  # until connections are closed
