"""`streamrec retrain`: follows the topic into the archive, and trains a model whenever it is time.

archive    goes on all the time (archiver.py)
tell       /metrics for Prometheus: which rounds made a model, which did not and why
wait       until a round is due: so long after the last one, and so many new clicks
lock       in Redis, so that only one worker trains
train      in a thread (retrain.py)
announce   a new champion to the daemons
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator

from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.errors import (
    ArchiveError,
    RedisUnavailable,
    RegistryError,
    RetrainError,
    RetrainStopped,
    StreamrecError,
)
from streamrec.metrics import RetrainMetrics, unix_s
from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.retraining.lock import take_lock
from streamrec.retraining.round import Verdict, retrain
from streamrec.settings import Settings
from streamrec.stop_signals import stop_signals
from streamrec.web.server import WebServer

log = logging.getLogger(__name__)

LOCK_TTL_MS = 15_000
LOCK_RENEWED_EVERY_S = 4.0
LOOK_EVERY_S = 1.0
REASONS: dict[type[StreamrecError], str] = {
    RetrainError: "training",
    ArchiveError: "archive",
    RegistryError: "registry",
    RedisUnavailable: "redis",
    RetrainStopped: "stopped",
}


class RetrainWorker:
    """Follows the topic and trains.

    Args:
        follow: read the topic into the archive; False trains on what is there, and needs no Kafka.
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
        self._stop = asyncio.Event()

    async def once(self) -> Verdict:
        """Read the topic to its end, and train one round.

        Raises:
            RetrainStopped: a signal came first.
            StreamrecError: the round cannot be done, or another worker trains.
        """
        with stop_signals(self._stop, _told):
            if self._follow:
                await self._archiver().run(self._stop, burst=True)
            return await self._round()

    async def run(self) -> None:
        """Follow the topic, and train whenever a round is due, until a signal comes.

        Raises:
            StreamrecError: topic, archive or what is in Redis cannot be used, or the port of /metrics is taken.
        """
        with stop_signals(self._stop, _told):
            async with self._seen_from_outside():
                await self._follow_and_train()
        log.info("stopped")

    async def _follow_and_train(self) -> None:
        with contextlib.suppress(RedisUnavailable):  # the archive goes on without; a round asks again
            async with RedisClient(self._settings.redis) as redis:
                await redis.check_format()
        rounds = asyncio.create_task(self._rounds())
        try:
            if self._follow:
                await self._archiver().run(self._stop)
            else:
                await self._stop.wait()
        finally:
            self._stop.set()
            await rounds

    async def _rounds(self) -> None:
        last_s = await asyncio.to_thread(self._last_round_s)
        self._metrics.last_round.set(last_s)
        log.info(
            "retraining",
            extra={
                "every_s": self._settings.retrain.every_s,
                "min_new_events": self._settings.retrain.min_new_events,
                "archive": self._settings.archive.dir,
                "registry": self._settings.registry.dir,
            },
        )
        while not self._stop.is_set():
            wait_s = last_s + self._settings.retrain.every_s - time.time()
            if wait_s > 0 or await asyncio.to_thread(self._new_events) < self._settings.retrain.min_new_events:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(LOOK_EVERY_S, min(wait_s, 60.0))):
                        await self._stop.wait()
                continue
            reason = None
            try:
                verdict = await self._round()
                self._metrics.rounds.labels("promoted" if verdict.promoted else "refused").inc()
                self._metrics.last_round.set_to_current_time()
            except StreamrecError as error:  # too few clicks, say: the next round may do better
                reason = next((name for kind, name in REASONS.items() if isinstance(error, kind)), "unexpected")
                log.warning("no model this time: %s", error)
            except Exception:  # the archive must go on
                reason = "unexpected"
                log.exception("a round of retraining failed")
            if reason is not None:
                self._metrics.failures.labels(reason).inc()
            last_s = time.time()

    async def _round(self) -> Verdict:
        """Train one round while nobody else does."""
        async with RedisClient(self._settings.redis) as redis, self._lock(redis) as lost:
            verdict = await asyncio.to_thread(
                retrain, self._settings, progress=self._progress, stop=lambda: self._stop.is_set() or lost.is_set()
            )
            if verdict.promoted:
                try:
                    await redis.notify(redis.keys.models_channel, verdict.version)
                except RedisUnavailable as error:
                    log.warning("the daemons will see it within %g s (%s)", self._settings.registry.poll_s, error)
        return verdict

    @contextlib.asynccontextmanager
    async def _lock(self, redis: RedisClient) -> AsyncIterator[asyncio.Event]:
        """Hold the lock; the event is set when somebody else has taken it."""
        key, own = (
            redis.keys.training,
            f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4()}",
        )
        await redis.check_format()
        holder = await take_lock(redis, key, own, LOCK_TTL_MS)
        if holder != own:
            raise RetrainError(
                f"another worker trains: {holder} holds {key} in Redis; should it have died, the lock ends within "
                f"{LOCK_TTL_MS // 1000} s"
            )
        lost = asyncio.Event()

        async def keep() -> None:
            while True:
                await asyncio.sleep(LOCK_RENEWED_EVERY_S)
                with contextlib.suppress(RedisUnavailable):  # one who takes it meanwhile is seen at the next try
                    if await take_lock(redis, key, own, LOCK_TTL_MS) != own:
                        lost.set()

        keeping = asyncio.create_task(keep())
        try:
            yield lost
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            with contextlib.suppress(RedisUnavailable):
                await take_lock(redis, key, own, 0)

    @contextlib.asynccontextmanager
    async def _seen_from_outside(self) -> AsyncIterator[None]:
        """/metrics and /livez; a default port that is taken is replaced by a free one."""
        retrain, given = self._settings.retrain, self._settings.given
        http = self._settings.http.model_copy(update={"port": retrain.http_port})
        web = WebServer(
            http, self._metrics, None, chosen="retrain_http_port" in given, variable="STREAMREC_RETRAIN_HTTP_PORT"
        )
        log.info("metrics are served", extra={"http": await web.start()})
        try:
            yield
        finally:
            await web.stop()

    def _archiver(self) -> Archiver:
        settings = self._settings
        return Archiver(settings.kafka, settings.events, self._archive, settings.archive.flush_s)

    def _last_round_s(self) -> float:
        """When the newest version was made, so that a restart does not train at once; 0 where there is none."""
        made = [version.created_at for version in self._registry.versions() if version.created_at]
        return unix_s(made[-1]) if made else 0.0

    def _new_events(self) -> int:
        """Records in the archive that came after the last round, whatever became of its model."""
        known = [version.metadata.get("next_offsets") for version in self._registry.versions()]
        last = next((offsets for offsets in reversed(known) if isinstance(offsets, dict)), {})
        return sum(end - int(last.get(str(number), 0)) for number, end in self._archive.next_offsets().items())


def _told(name: str) -> None:
    log.info("stopping", extra={"signal": name})
