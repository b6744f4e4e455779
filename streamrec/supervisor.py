"""Loops that must live as long as their process.

A loop is a step that is repeated. A step that fails is tried again after a pause, which grows while it fails. The log
has one warning when a loop begins to fail and one line when it works again; meanwhile metrics and /readyz show it.
Nothing but a cancellation ends a loop, or an error that its caller names: one that only an operator can mend.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from streamrec.errors import StreamrecError, reason
from streamrec.health import Loops
from streamrec.metrics import ProcessMetrics
from streamrec.waiting import cancel, pause

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
WELL_AFTER_S = 10.0  # a step that may never end works again if it has not failed for this long

Step = Callable[[], Awaitable[object]]


class Supervisor:
    """Keeps the loops of a process alive.

    Args:
        metrics: get failures, and which loops fail now.
        loops: gets the same for /readyz.
    """

    def __init__(self, metrics: ProcessMetrics, loops: Loops) -> None:
        self._metrics = metrics
        self._loops = loops

    @contextlib.asynccontextmanager
    async def running(self, steps: Mapping[str, Step]) -> AsyncIterator[None]:
        """Repeat steps, each in a task of its own, while the block runs.

        Args:
            steps: by the name of the loop.
        """
        tasks = [asyncio.create_task(self.repeat(name, step), name=name) for name, step in steps.items()]
        try:
            yield
        finally:
            await cancel(*tasks)

    async def repeat(
        self,
        name: str,
        step: Step,
        stop: asyncio.Event | None = None,
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        """Repeat a step until cancelled.

        Args:
            stop: ends the loop after the current step.
            fatal: errors that end the loop.
        """
        stop = stop or asyncio.Event()
        self._metrics.loop_failing.labels(name).set(0)
        pause_s = FIRST_PAUSE_S
        while not stop.is_set():
            well = asyncio.get_running_loop().call_later(WELL_AFTER_S, self._well, name)
            try:
                await step()
            except fatal:
                raise
            except (Exception, asyncio.CancelledError) as error:
                if _is_cancelled(error):
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S) if name in self._loops.failing else FIRST_PAUSE_S
                self._failed(name, error)
                await pause(stop, pause_s)
            else:
                self._well(name)
            finally:
                well.cancel()

    def _failed(self, name: str, error: BaseException) -> None:
        self._metrics.loop_failures.labels(name).inc()
        known = isinstance(error, StreamrecError)
        if name not in self._loops.failing:
            log.warning(
                "the loop %s fails and is tried again: %s", name, reason(error), exc_info=None if known else error
            )
        self._loops.failing.add(name)
        self._metrics.loop_failing.labels(name).set(1)

    def _well(self, name: str) -> None:
        if name in self._loops.failing:
            self._loops.failing.remove(name)
            log.info("the loop %s works again", name)
            self._metrics.loop_failing.labels(name).set(0)


def _is_cancelled(error: BaseException) -> bool:
    """Return whether this task is cancelled; clients that are closed cancel at times the task that waits for them."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
