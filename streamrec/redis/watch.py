"""Watch whether Redis takes writes: the one owner of ``health.redis_answers``.

Redis takes writes if the last probe wrote at each primary, and no batch waits. A server that is full or read-only,
or cannot save, still answers reads. A batch counts too: its calls are larger, and may use other connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from streamrec.errors import RedisRefused, RedisTakesNoWrites, StreamrecError
from streamrec.health import Health
from streamrec.redis.client import RedisClient

log = logging.getLogger(__name__)

PROBE_EVERY_S = 1.0
REFUSALS = (RedisRefused, RedisTakesNoWrites)


class RedisWatch:
    """Writes a tiny key regularly, and hears of batches that wait."""

    def __init__(self, redis: RedisClient, health: Health) -> None:
        self._redis = redis
        self._health = health
        self._probe_error: StreamrecError | None = None
        self._batch_error: StreamrecError | None = None
        self._due = asyncio.Event()

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_EVERY_S):
                    await self._due.wait()
            self._due.clear()
            await self._probe()

    def batch_waits(self, error: StreamrecError) -> None:
        """Note that a batch waits because of this error."""
        self._batch_error = error
        self._update()

    def batch_continues(self) -> None:
        """Note that the batch has written what it waited for."""
        self._batch_error = None
        self._due.set()  # the last probe may have failed before
        self._update()

    def batch_abandoned(self) -> None:
        """Note that no batch waits any more; the next probe shows whether Redis takes writes."""
        if self._batch_error is not None:
            self._probe_error, self._batch_error = self._batch_error, None
            self._due.set()
            self._update()

    async def _probe(self) -> None:
        try:
            await self._redis.probe()
        except StreamrecError as error:
            if self._health.redis_answers:
                log.warning("Redis takes no writes, waiting: %s", error)
            self._probe_error = error
        else:
            self._probe_error = None
        self._update()

    def _update(self) -> None:
        health, error = self._health, self._batch_error or self._probe_error
        answers = error is None
        # waiting is right while the server refuses; it is not if others can write and this batch gets no answer
        stuck = error is not None and self._probe_error is None and not isinstance(error, REFUSALS)
        if answers and not health.redis_answers:
            log.info("Redis is reachable again")
        if (answers and not health.redis_answers) or (stuck and not health.redis_fails_batch):
            health.progressed()  # from here on a time without a commit counts
        health.redis_answers, health.redis_fails_batch = answers, stuck
        health.redis_refuses = isinstance(error, REFUSALS)
