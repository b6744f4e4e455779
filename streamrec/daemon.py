"""`streamrec serve`: start the parts (startup.py), run the worker, shut down.

SIGTERM or SIGINT: not ready -> stop fetching -> finish the current batch, with a deadline -> commit -> leave the group
-> close Redis. A second signal exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable

from streamrec.errors import RedisRefused, RedisRejected, RedisTakesNoWrites, RedisUnavailable, Stopped
from streamrec.health import Health
from streamrec.items.sweep import Sweeper
from streamrec.logs import LogOnce
from streamrec.registry import Registry
from streamrec.serving.follower import ChampionFollower
from streamrec.serving.lists import SharedLists
from streamrec.serving.online import OnlineCounts
from streamrec.settings import Settings
from streamrec.startup import Daemon, Startup
from streamrec.stop_signals import stop_signals
from streamrec.supervisor import Step, Supervisor
from streamrec.waiting import cancel
from streamrec.web.page import LivePage, PageMaker

log = logging.getLogger(__name__)


async def serve(
    settings: Settings, burst: bool = False, page: PageMaker = LivePage, on_end: Callable[[int], None] = lambda _: None
) -> int:
    """Run the daemon until a signal stops it; return the exit status.

    Args:
        burst: stop once the topic is drained; what is missing at the start is an error, and not waited for.
        page: makes the page of the HTTP port.
        on_end: called with the exit status when all is done, before the clients are closed.

    Raises:
        StreamrecError: the daemon cannot start, or must not continue.
    """
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as clients:  # closed in reverse order
        try:
            daemon = await Startup(settings, page, clients, stop, patient=not burst).run()
        except Stopped:
            log.info("stopped", extra={"events": 0})
            return 0
        supervisor = Supervisor(daemon.parts.metrics, daemon.parts.health.loops)
        async with supervisor.running(_beside_the_clicks(settings, daemon)):
            with stop_signals(stop, lambda name: _on_signal(daemon, name)):
                serving = asyncio.create_task(daemon.worker.run(stop, burst), name="worker")
                await _run(serving, stop)
                if not await _shut_down(daemon, serving, settings.serving.shutdown_timeout_s):
                    on_end(1)
                    return 1
            outcome = "drained" if burst and not stop.is_set() else "stopped"
            log.info(outcome, extra={"events": daemon.worker.handled_events})
            on_end(0)
            return 0


async def _run(serving: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Wait until the worker ends or a signal comes."""
    signalled = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, signalled), return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()


async def _shut_down(daemon: Daemon, serving: asyncio.Task[None], timeout_s: float) -> bool:
    """Finish the current batch and flush the counts; return whether the batch was finished in time."""
    if daemon.worker.idle:  # no batch to finish, and a poll may wait for a rebalance to end
        serving.cancel()
    done, _ = await asyncio.wait((serving,), timeout=timeout_s)
    if not done:
        await cancel(serving)
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    if not done:
        log.error("the current batch was not finished in time; it is not committed and will be redelivered")
        return False
    for flush in (daemon.parts.lists.refresh, daemon.parts.counts.flush, daemon.marks.store):
        with contextlib.suppress(RedisUnavailable, RedisRejected):
            await flush()
    return True


def _on_signal(daemon: Daemon, name: str) -> None:
    log.info("stopping: the current batch is finished first", extra={"signal": name})
    daemon.parts.health.stopping = True


def _beside_the_clicks(settings: Settings, daemon: Daemon) -> dict[str, Step]:
    """Return the steps of the loops that run beside the clicks, by name."""
    parts, wait_idle = daemon.parts, daemon.consumer.wait_idle
    registry = settings.registry.dir
    loops: dict[str, Step] = {
        "lists": functools.partial(_refresh, parts.lists, parts.counts, parts.health, settings.lists.refresh_s),
        "redis-watch": parts.watch.run,
        "kafka-watch": daemon.consumer.watch.run,
        "topic-marks": daemon.marks.run,
        "shadow": functools.partial(parts.shadow.run, wait_idle),
        "history": daemon.history.run,
        "sweep": Sweeper(parts.redis, parts.lists.refusals, settings.lists.top_k, parts.metrics).run,
        "explainer": functools.partial(daemon.explainer.run, wait_idle),
    }
    if daemon.items is not None:
        loops |= {"items": daemon.items.follow, "availability": parts.lists.refusals.watch_time}
    if registry is not None:
        loops |= ChampionFollower(settings, Registry(registry), parts).loops()
    return loops


async def _refresh(lists: SharedLists, counts: OnlineCounts, health: Health, every_s: float) -> None:
    """Refresh the popular list and flush the online figures regularly; neither stops the other."""
    warnings = LogOnce(log), LogOnce(log)
    while True:
        await asyncio.sleep(every_s)
        for part, warning in zip((lists.refresh, counts.flush), warnings, strict=True):
            try:
                await part()
            except (RedisRefused, RedisRejected) as error:
                warning("popular list and online figures are behind: %s", error)
            except RedisUnavailable as error:
                if health.redis_answers and isinstance(error, RedisTakesNoWrites):  # else the worker and the probe warn
                    warning("popular list and online figures are behind: %s", error)
            else:
                warning.reset()
