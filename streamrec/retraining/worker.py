"""`streamrec retrain`: copies the topic into the archive, and trains a model whenever a round is due.

archive    all the time (archive/follow.py)
metrics    at /metrics: rounds that made a model, and why others made none
wait       until the last round is ``retrain_every_s`` ago and ``retrain_min_new_events`` clicks are new
lock       in Redis, so that one worker trains at a time (lock.py)
train      in a thread (round.py)
notify     the daemons of a new champion

Archiving and rounds are two loops (supervisor.py): one that fails is tried again, and does not stop the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.errors import (
    ArchiveError,
    RedisRejected,
    RedisUnavailable,
    RegistryError,
    RetrainError,
    RetrainStopped,
    StoreUnavailable,
    StreamrecError,
)
from streamrec.health import WorkerHealth
from streamrec.logs import LogOnce
from streamrec.metrics import RetrainMetrics, unix_s
from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.retraining.lock import training_lock
from streamrec.retraining.promotion import Verdict
from streamrec.retraining.round import retrain
from streamrec.settings import Settings
from streamrec.stop_signals import stop_signals
from streamrec.supervisor import Supervisor
from streamrec.waiting import pause
from streamrec.web.server import WebServer

log = logging.getLogger(__name__)

MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0  # between two looks whether a round is due
CONFIRM_TIMEOUT_S = 60.0  # of Redis, before a promotion
FAILURE_REASONS: dict[type[StreamrecError], str] = {
    RetrainError: "training",
    ArchiveError: "archive",
    RegistryError: "registry",
    StoreUnavailable: "store",
    RedisUnavailable: "redis",
    RedisRejected: "redis",
    RetrainStopped: "stopped",
}


class RetrainWorker:
    """Copies the topic into the archive and trains on it.

    Args:
        follow: read the topic; False trains on the archive alone and needs no Kafka.
        progress: draw a progress bar on stderr.
    """

    def __init__(self, settings: Settings, follow: bool = True, progress: bool = False) -> None:
        assert settings.archive.dir is not None and settings.registry.dir is not None
        self._settings = settings
        self._follow = follow
        self._progress = progress
        self._archive = EventArchive(settings.archive.dir, settings.kafka.topic_epoch)
        self._registry = Registry(settings.registry.dir)
        self._metrics = RetrainMetrics()
        self._health = WorkerHealth()
        self._supervisor = Supervisor(self._metrics, self._health.loops)
        self._log_held = LogOnce(log)
        self._due_s: float | None = None  # monotonic; None: before the first look
        self._stop = asyncio.Event()

    async def once(self) -> Verdict:
        """Read the topic to its end, and train one round.

        Raises:
            RetrainStopped: a signal came first.
            StreamrecError: the round failed, or another worker trains.
        """
        with stop_signals(self._stop, _log_signal):
            if self._follow:
                await self._archiver().run(self._stop, burst=True)
            return await self._train_round()

    async def run(self) -> None:
        """Follow the topic, and train whenever a round is due, until a signal comes.

        Raises:
            StreamrecError: topic, archive or the data in Redis cannot be used, or the port of /metrics is taken.
        """
        with stop_signals(self._stop, _log_signal):
            async with self.metrics_server():
                await self._check_redis_format()
                await self._follow_and_train()
        log.info("stopped")

    @contextlib.asynccontextmanager
    async def metrics_server(self) -> AsyncIterator[None]:
        """Serve /metrics, /livez and /readyz while the block runs.

        Raises:
            SettingsError: the port was set and is taken; instead of a default port, a free one is used.
        """
        retrain, given = self._settings.retrain, self._settings.given
        http = self._settings.http.model_copy(update={"port": retrain.http_port})
        web = WebServer(
            http,
            self._metrics,
            self._health,
            chosen="retrain_http_port" in given,
            variable="STREAMREC_RETRAIN_HTTP_PORT",
        )
        log.info("metrics are served", extra={"http": await web.start()})
        try:
            yield
        finally:
            await web.stop()

    async def _check_redis_format(self) -> None:
        with contextlib.suppress(RedisUnavailable):  # archiving needs no Redis; each round checks again
            async with RedisClient(self._settings.redis) as redis:
                await redis.check_format()

    async def _follow_and_train(self) -> None:
        retrain = self._settings.retrain
        log.info(
            "retraining",
            extra={
                "every_s": retrain.every_s,
                "min_new_events": retrain.min_new_events,
                "archive": str(self._archive.store),
                "registry": str(self._registry.store),
            },
        )
        rounds = asyncio.create_task(self._supervisor.repeat("rounds", self._look, self._stop))
        try:
            if self._follow:
                archive = self._archiver()
                await self._supervisor.repeat(
                    "archive", lambda: archive.run(self._stop), self._stop, fatal=(StreamrecError,)
                )
            else:
                await self._stop.wait()
        finally:
            self._stop.set()
            await rounds

    async def _look(self) -> None:
        """Train a round if one is due, else wait until the next look."""
        try:
            if self._due_s is None:
                self._due_s = await asyncio.to_thread(self._first_due_s)
            wait_s = self._due_s - time.monotonic()
            due = wait_s <= 0 and await asyncio.to_thread(self._has_new_events)
        except Exception as error:
            self._metrics.failures.labels(_reason(error)).inc()
            raise
        if due:
            await self._try_round()
            self._due_s = time.monotonic() + self._settings.retrain.every_s
        else:
            await pause(self._stop, max(MIN_WAIT_S, min(wait_s, MAX_WAIT_S)))

    async def _try_round(self) -> None:
        """Train one round, and count its outcome. No failure ends the process: archiving continues."""
        try:
            verdict = await self._train_round()
        except StreamrecError as error:  # too few clicks, for example; the next round may succeed
            self._metrics.failures.labels(_reason(error)).inc()
            log.warning("no model this time: %s", error)
        except Exception as error:
            self._metrics.failures.labels(_reason(error)).inc()
            log.exception("a round of retraining failed")
        else:
            self._metrics.rounds.labels(verdict.outcome).inc()
            self._metrics.last_round.set_to_current_time()

    async def _train_round(self) -> Verdict:
        """Train one round under the lock, and notify the daemons of a new champion."""
        async with RedisClient(self._settings.redis) as redis:
            await redis.check_format()
            async with training_lock(redis, self._supervisor) as lock:
                loop = asyncio.get_running_loop()

                def has_lock() -> bool:
                    return asyncio.run_coroutine_threadsafe(lock.confirm(), loop).result(CONFIRM_TIMEOUT_S)

                verdict = await asyncio.to_thread(
                    retrain,
                    self._settings,
                    progress=self._progress,
                    stop=lambda: self._stop.is_set() or lock.lost,
                    may_promote=has_lock,
                )
            if verdict.promoted:
                await self._notify_daemons(redis, verdict.version)
        return verdict

    async def _notify_daemons(self, redis: RedisClient, version: str) -> None:
        try:
            await redis.notify(redis.keys.models_channel, version)
        except Exception as error:  # the promotion is done
            log.warning(
                "the daemons are not notified; they find the champion within %g s (%s)",
                self._settings.registry.poll_s,
                error,
            )

    def _archiver(self) -> Archiver:
        settings = self._settings
        return Archiver(settings.kafka, settings.events, self._archive, settings.archive.flush_s, self._metrics)

    def _first_due_s(self) -> float:
        """Return when the first round is due: a restart waits like a run, and never longer: clocks err."""
        made = [unix_s(version.created_at) for version in self._registry.versions()]
        last_s = min(made[-1], time.time()) if made else 0.0
        self._metrics.last_round.set(last_s)
        return time.monotonic() + self._settings.retrain.every_s - (time.time() - last_s)

    def _has_new_events(self) -> bool:
        """Return whether there are enough new clicks for a round; note whether the champion is on hold."""
        champion = self._registry.champion()
        held = champion.hold if champion else None
        self._metrics.on_hold.set(held is not None)
        if held is None:
            self._log_held.reset()
        else:
            self._log_held(
                "rounds do not promote: the champion is on hold (%s); to lift it: streamrec models hold --off",
                held.reason,
            )
        return self._new_events() >= self._settings.retrain.min_new_events

    def _new_events(self) -> int:
        """Count the records of this topic epoch that were archived after the last round that made a model."""
        known = [version.metadata for version in self._registry.versions()]
        of_epoch = (m.get("next_offsets") for m in known if m.get("topic_epoch", 0) == self._archive.topic_epoch)
        *_, last = {}, *(offsets for offsets in of_epoch if isinstance(offsets, dict))
        return sum(end - int(last.get(str(number), 0)) for number, end in self._archive.next_offsets().items())


def _reason(error: Exception) -> str:
    """Return the reason of a failure, as the metrics name it."""
    return next((reason for kind, reason in FAILURE_REASONS.items() if isinstance(error, kind)), "unexpected")


def _log_signal(name: str) -> None:
    log.info("stopping", extra={"signal": name})
