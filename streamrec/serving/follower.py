"""Hot swap: follows the registry's champion, and puts a new one in the place of the old while clicks go on.

The registry's shadow is followed too: what is set begins, what is taken away or becomes champion ends.

notice      by looking every ``registry_poll_s``, and at once on a Redis message
load        beside the old one, every byte verified; what fails is refused, and the old one stays
warm up     on the users who clicked last
swap        one assignment between two batches: weights, vocabulary and an empty cache together
re-score    the users who clicked lately, at a bounded rate, so that nobody keeps an old list till his next click
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from streamrec.errors import RedisRefused, RedisUnavailable, RegistryError, StreamrecError
from streamrec.metrics import unix_s
from streamrec.registry import Registry, ShadowAlias
from streamrec.serving.model import ServedModel
from streamrec.serving.parts import ServingParts
from streamrec.settings import Settings

log = logging.getLogger(__name__)

RESCORE_EVERY_S = 0.1
LOOK_AGAIN_S = 5.0


class ChampionFollower:
    """Keeps the predictor on the champion of a registry."""

    def __init__(self, settings: Settings, registry: Registry, parts: ServingParts) -> None:
        self._settings = settings
        self._registry = registry
        self._predictor = parts.predictor
        self._shadow = parts.shadow
        self._store = parts.store
        self._publisher = parts.publisher
        self._redis = parts.redis
        self._metrics = parts.metrics
        self._told = asyncio.Event()
        self._refused = ""  # a version that could not be used
        self._said = ""  # what was last said to be wrong
        self._shadow_alias: ShadowAlias | None = None  # the last one that was followed, or refused
        self._said_of_shadow = ""

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._look())

    async def _listen(self) -> None:
        channel = self._redis.keys.models_channel
        refused = False
        while True:
            try:
                async for _ in self._redis.listen(channel):
                    self._told.set()
            except RedisUnavailable as error:  # the look every few seconds does without
                if isinstance(error, RedisRefused) and not refused:
                    log.warning("a new champion is seen %g s late: %s", self._settings.registry.poll_s, error)
                refused = isinstance(error, RedisRefused)
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _look(self) -> None:
        while True:
            swapped = await self._follow()
            await self._follow_shadow()
            if swapped:
                await self._rescore()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.registry.poll_s):
                    await self._told.wait()
            self._told.clear()

    async def _follow(self) -> bool:
        """Swap if there is a new champion; True if one was swapped in."""
        champion = None
        try:
            champion = await asyncio.to_thread(self._registry.champion)
            if champion is None or champion.version in (self._predictor.version, self._refused):
                return False
            served = await asyncio.to_thread(self._load, champion.version)
        except RegistryError as error:
            self._refused = champion.version if champion else ""
            if str(error) != self._said:
                log.error("the new champion is refused, %s stays: %s", self._predictor.version, error)
                self._metrics.swaps.labels("refused").inc()
            self._said = str(error)
            return False
        started, old = time.perf_counter(), self._predictor.version
        self._predictor.swap(served.engine)
        self._store.max_len = served.max_len
        self._refused = self._said = ""
        self._metrics.swaps.labels("swapped").inc()
        self._metrics.model_created.set(unix_s(str(served.metadata.get("created_at"))))
        log.info(
            "model swapped",
            extra={
                "model": champion.version,
                "before": old,
                "reason": champion.reason,
                "swap_s": round(time.perf_counter() - started, 4),
            },
        )
        return True

    async def _follow_shadow(self) -> None:
        """Begin, change or end the shadow, as the registry says."""
        try:
            alias = await asyncio.to_thread(self._registry.shadow) if self._settings.serving.shadow_share else None
        except RegistryError as error:
            if str(error) != self._said_of_shadow:
                log.error("the shadow stays as it is: %s", error)
            self._said_of_shadow = str(error)
            return
        self._said_of_shadow = ""
        if alias is not None and alias.version == self._predictor.version:
            alias = None  # it has become champion
        if alias == self._shadow_alias:
            return
        self._shadow_alias = alias
        self._shadow.end()
        if alias is None:
            return
        try:
            served = await asyncio.to_thread(self._load, alias.version, self._settings.serving.shadow_share)
        except Exception as error:  # whatever it is, the champion is not to suffer from it
            log.error("the shadow %s is refused: %s", alias.version, error)
            return
        self._shadow.begin(served.engine)

    def _load(self, version: str, cache_share: float = 1.0) -> ServedModel:
        """Read a version and warm its engine up."""
        cache_bytes = int(self._settings.inference.cache_bytes * cache_share)
        served = ServedModel.of(
            self._registry.load(version), self._settings.inference, self._settings.sequences.max_len, cache_bytes
        )
        self._predictor.warm_up(served.engine)
        return served

    async def _rescore(self) -> None:
        """Publish new lists for the users who clicked lately, the latest first."""
        waiting = self._predictor.recent_users()
        version, scored = self._predictor.version, 0
        size = max(1, int(self._settings.serving.rescore_users_per_s * RESCORE_EVERY_S))
        while waiting and not self._told.is_set():
            part, waiting = waiting[:size], waiting[size:]
            began = time.monotonic()
            try:
                sequences = await self._store.read(part)
                await self._publisher.publish(await self._predictor.predict(sequences))
            except RedisUnavailable:
                waiting = part + waiting
                await asyncio.sleep(1.0)
                continue
            except StreamrecError as error:  # a value that cannot be read; the others of its part wait for their clicks
                log.warning("not re-scored: %s", error)
            scored += len(part)
            await asyncio.sleep(max(0.0, began + RESCORE_EVERY_S - time.monotonic()))
        log.info("users re-scored", extra={"model": version, "users": scored})
