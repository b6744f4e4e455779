"""Hot swap: follow the registry's champion and load a new one while the daemon serves.

notice      read the registry every ``registry_poll_s``, and at once after a Redis message
load        beside the live engine, every byte verified; a damaged version is refused. If the registry cannot be read,
            the next poll tries again
warm up     on the sequences of users who clicked last
swap        one assignment between two batches: weights, vocabulary and an empty cache together
re-score    publish new lists for recently active users, at a bounded rate

The follower also begins and ends the shadow as the registry says. A shadow that has become champion ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from itertools import islice

from streamrec.aliases import Champion, ShadowAlias
from streamrec.errors import (
    RedisRefused,
    RedisRejected,
    RedisUnavailable,
    RegistryError,
    StoreUnavailable,
    StreamrecError,
)
from streamrec.logs import LogOnce
from streamrec.registry import Registry
from streamrec.serving.model import ServedModel
from streamrec.serving.parts import ServingParts
from streamrec.settings import Settings

log = logging.getLogger(__name__)

RESCORE_EVERY_S = 0.1
RETRY_LISTENING_S = 5.0


class ChampionFollower:
    """Serves the champion of a registry with the predictor."""

    def __init__(self, settings: Settings, registry: Registry, parts: ServingParts) -> None:
        self._settings = settings
        self._registry = registry
        self._predictor = parts.predictor
        self._shadow = parts.shadow
        self._store = parts.store
        self._publisher = parts.publisher
        self._counts = parts.counts
        self._redis = parts.redis
        self._metrics = parts.metrics
        self._notified = asyncio.Event()
        self._refused_version = ""
        self._shadow_alias: ShadowAlias | None = None  # of the current shadow, or of one that was refused
        self._log_refused = LogOnce(log, logging.ERROR)
        self._log_shadow = LogOnce(log, logging.ERROR)
        self._log_late = LogOnce(log)
        self._log_unavailable = LogOnce(log)

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._poll())

    async def _listen(self) -> None:
        """Wake ``_poll`` at each message of a promotion."""
        channel = self._redis.keys.models_channel
        while True:
            try:
                async for _ in self._redis.listen(channel):
                    self._notified.set()
            except (RedisRefused, RedisRejected) as error:
                self._log_late("a new champion is noticed up to %g s late: %s", self._settings.registry.poll_s, error)
            except RedisUnavailable:  # polling continues
                self._log_late.reset()
            await asyncio.sleep(RETRY_LISTENING_S)

    async def _poll(self) -> None:
        while True:
            swapped = await self._follow_champion()
            await self._follow_shadow()
            if swapped:
                await self._rescore()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.registry.poll_s):
                    await self._notified.wait()
            self._notified.clear()

    async def _follow_champion(self) -> bool:
        """Load and swap in a new champion, if there is one; return whether it did."""
        champion = None
        try:
            champion = await asyncio.to_thread(self._registry.champion)
            if champion is None or champion.version in (self._predictor.version, self._refused_version):
                self._log_unavailable.reset()
                return False
            served = await asyncio.to_thread(self._load, champion.version)
        except StoreUnavailable as error:
            self._log_unavailable("the registry is unavailable, %s continues: %s", self._predictor.version, error)
            return False
        except RegistryError as error:
            self._refused_version = champion.version if champion else ""
            if self._log_refused("the new champion is refused, %s continues: %s", self._predictor.version, error):
                self._metrics.swaps.labels("refused").inc()
            return False
        self._swap(champion, served)
        return True

    def _swap(self, champion: Champion, served: ServedModel) -> None:
        started, previous = time.perf_counter(), self._predictor.version
        self._predictor.swap(served.engine)
        self._counts.serve(served.version)
        self._store.max_len = served.max_len
        self._refused_version = ""
        self._log_refused.reset()
        self._log_unavailable.reset()
        self._metrics.swaps.labels("swapped").inc()
        self._metrics.model_created.set(served.created_s)
        log.info(
            "model swapped",
            extra={
                "model": champion.version,
                "before": previous,
                "reason": champion.reason,
                "swap_s": round(time.perf_counter() - started, 4),
            },
        )

    async def _follow_shadow(self) -> None:
        """Begin, replace or end the shadow as the registry says."""
        try:
            alias = await asyncio.to_thread(self._registry.shadow) if self._settings.serving.shadow_share else None
        except StoreUnavailable:  # the poll of the champion reports it
            return
        except RegistryError as error:
            self._log_shadow("the current shadow continues: %s", error)
            return
        self._log_shadow.reset()
        if alias is not None and alias.version == self._predictor.version:
            alias = None  # the shadow has become champion
        if alias == self._shadow_alias:
            return
        self._shadow_alias = alias
        self._shadow.end()
        if alias is None:
            return
        try:
            served = await asyncio.to_thread(self._load, alias.version, self._settings.serving.shadow_share)
        except StoreUnavailable as error:
            log.warning("the shadow %s waits for the registry: %s", alias.version, error)
            self._shadow_alias = None  # the next poll tries again
            return
        except Exception as error:  # any error: the shadow must not disturb the champion
            log.error("the shadow %s is refused: %s", alias.version, error)
            return
        self._shadow.begin(served.engine)

    def _load(self, version: str, cache_share: float = 1.0) -> ServedModel:
        """Read a version and warm up its engine."""
        cache_bytes = int(self._settings.inference.cache_bytes * cache_share)
        served = ServedModel.of(
            self._registry.load(version), self._settings.inference, self._settings.sequences.max_len, cache_bytes
        )
        self._predictor.warm_up(served.engine)
        return served

    async def _rescore(self) -> None:
        """Publish new lists for recently active users, the latest click first, until the registry changes again."""
        waiting = self._predictor.recent_users()
        version, scored = self._predictor.version, 0
        refused: dict[str, StreamrecError] = {}
        size = max(1, int(self._settings.serving.rescore_users_per_s * RESCORE_EVERY_S))
        while waiting and not self._notified.is_set():
            part, waiting = waiting[:size], waiting[size:]
            began = time.monotonic()
            try:
                sequences = await self._store.read(part, refused.__setitem__)
                await self._publisher.publish(await self._predictor.predict(sequences), refused.__setitem__)
            except RedisUnavailable:
                waiting = part + waiting
                await asyncio.sleep(1.0)
                continue
            except RedisRejected as rejection:
                refused |= dict.fromkeys(part, rejection)
            scored += len(part)
            await asyncio.sleep(max(0.0, began + RESCORE_EVERY_S - time.monotonic()))
        for error in islice(refused.values(), 1):
            log.warning("some users are not re-scored: %s", error, extra={"users": len(refused)})
        log.info("users re-scored", extra={"model": version, "users": scored - len(refused)})
