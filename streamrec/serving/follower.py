"""Hot swap: follow the registry's champion and load a new one while the daemon serves.

notice      read the registry every ``registry_poll_s``, and at once after a Redis message
load        beside the live engine, every byte verified. A version that cannot be loaded is refused, and tried again
            after a pause that grows: it may be in the middle of a copy
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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice

from streamrec.aliases import Champion, ShadowAlias
from streamrec.errors import (
    RedisRefused,
    RedisRejected,
    RedisUnavailable,
    RegistryError,
    StoreUnavailable,
    StreamrecError,
    reason,
)
from streamrec.logs import LogOnce
from streamrec.registry import Registry
from streamrec.serving.model import ServedModel
from streamrec.serving.parts import ServingParts
from streamrec.settings import Settings

log = logging.getLogger(__name__)

RESCORE_EVERY_S = 0.1
RETRY_LISTENING_S = 5.0
LONGEST_REFUSAL_S = 300.0  # a champion that was refused is tried again


@dataclass
class _Refusal:
    """A version that could not be loaded, and until when it is not tried again, in monotonic seconds."""

    version: str = ""
    until_s: float = 0.0
    pause_s: float = 0.0

    def covers(self, version: str) -> bool:
        return version == self.version and time.monotonic() < self.until_s

    def after_another(self, version: str, poll_s: float) -> _Refusal:
        """Return the refusal after one more failure."""
        pause_s = min(2 * self.pause_s or poll_s, LONGEST_REFUSAL_S) if version == self.version else poll_s
        return _Refusal(version, time.monotonic() + pause_s, pause_s)


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
        self._refusals = parts.lists.refusals
        self._metrics = parts.metrics
        self._notified = asyncio.Event()
        self._refused = _Refusal()
        self._shadow_alias: ShadowAlias | None = None  # of the current shadow
        self._shadow_refused = _Refusal()
        self._log_refused = LogOnce(log, logging.ERROR)
        self._log_shadow = LogOnce(log, logging.ERROR)
        self._log_shadow_refused = LogOnce(log, logging.ERROR)
        self._log_late = LogOnce(log)
        self._log_unavailable = LogOnce(log)

    def loops(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return the steps of the loops that follow the registry, by name."""
        return {"announcements": self._listen, "registry": self._poll}

    async def _listen(self) -> None:
        """Wake ``_poll`` at each message of a promotion, as long as the connection lasts."""
        channel = self._redis.keys.models_channel
        try:
            async for _ in self._redis.listen(channel):
                self._notified.set()
        except (RedisRefused, RedisRejected) as error:
            self._log_late("a new champion is noticed up to %g s late: %s", self._settings.registry.poll_s, error)
        except RedisUnavailable:  # polling continues
            self._log_late.reset()
        await asyncio.sleep(RETRY_LISTENING_S)

    async def _poll(self) -> None:
        """Look once, then wait for the next message or the next poll."""
        self._notified.clear()
        swapped = await self._follow_champion()
        await self._follow_shadow()
        if swapped:
            await self._rescore()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.registry.poll_s):
                await self._notified.wait()
        if self._notified.is_set():
            self._refused.until_s = 0.0  # the registry has changed

    async def _follow_champion(self) -> bool:
        """Load and swap in a new champion, if there is one; return whether it did."""
        champion = None
        try:
            champion = await asyncio.to_thread(self._registry.champion)
            self._metrics.model_on_hold.set(bool(champion and champion.hold))
            if champion is None or champion.version == self._predictor.version:
                self._refused = _Refusal()
                self._log_refused.reset()
            elif not self._refused.covers(champion.version):
                served = await asyncio.to_thread(self._load, champion.version)
                await self._refusals.prepare(served.vocab)
                self._swap(champion, served)
                return True
            self._log_unavailable.reset()
        except StoreUnavailable as error:
            self._log_unavailable("the registry is unavailable, %s continues: %s", self._predictor.version, error)
        except Exception as error:  # any error: the current model must be served on
            self._refuse(champion.version if champion else "", error)
        return False

    def _refuse(self, version: str, error: Exception) -> None:
        """Leave a champion alone for a while; an alias that cannot be read is read again at the next poll."""
        if version:
            self._refused = self._refused.after_another(version, self._settings.registry.poll_s)
        if self._log_refused("the new champion is refused, %s continues: %s", self._predictor.version, reason(error)):
            self._metrics.swaps.labels("refused").inc()

    def _swap(self, champion: Champion, served: ServedModel) -> None:
        started, previous = time.perf_counter(), self._predictor.version
        self._predictor.swap(served.engine)
        self._counts.serve(served.version)
        self._store.max_len = served.max_len
        self._refused = _Refusal()
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
        if alias == self._shadow_alias or (alias is not None and self._shadow_refused.covers(alias.version)):
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
            self._log_shadow_refused("the shadow %s is refused: %s", alias.version, error)
            self._shadow_refused = self._shadow_refused.after_another(alias.version, self._settings.registry.poll_s)
            self._shadow_alias = None  # tried again, as a champion is
            return
        await self._refusals.prepare(served.vocab)
        self._shadow_refused = _Refusal()
        self._log_shadow_refused.reset()
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
            except StreamrecError as error:  # the others get lists at their next click
                refused |= dict.fromkeys(part, error)
            scored += len(part)
            await asyncio.sleep(max(0.0, began + RESCORE_EVERY_S - time.monotonic()))
        for why in islice(refused.values(), 1):
            log.warning("some users are not re-scored: %s", why, extra={"users": len(refused)})
        log.info("users re-scored", extra={"model": version, "users": scored - len(refused)})
