"""The lock in Redis that lets one worker train at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from streamrec.errors import RetrainError, StreamrecError
from streamrec.redis.client import RedisClient
from streamrec.redis.lock import holder_name, take_lock
from streamrec.supervisor import Supervisor

LOCK_TTL_MS = 15_000
RENEW_EVERY_S = 4.0


class TrainingLock:
    """The lock, while this worker trains. It saves work; that two workers do no harm is the registry's compare-and-set.

    A worker may lose it: its process was stopped for longer than the lock lives, or Redis has failed over.
    """

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._key = redis.keys.training
        self._name = holder_name()
        self.lost = False

    async def take(self) -> None:
        """Take the lock.

        Raises:
            RetrainError: another worker has it.
            RedisUnavailable: Redis does not answer.
        """
        holder = await take_lock(self._redis, self._key, self._name, LOCK_TTL_MS)
        if holder != self._name:
            raise RetrainError(
                f"another worker trains: {holder} holds the lock {self._key} in Redis; if that worker is dead, the "
                f"lock expires within {LOCK_TTL_MS // 1000} s"
            )

    async def confirm(self) -> bool:
        """Renew the lock; return whether this worker still has it. Without Redis no other can take it."""
        with contextlib.suppress(StreamrecError):
            self.lost |= await take_lock(self._redis, self._key, self._name, LOCK_TTL_MS) != self._name
        return not self.lost

    async def keep(self) -> None:
        """Wait, then renew the lock."""
        await asyncio.sleep(RENEW_EVERY_S)
        await self.confirm()

    async def release(self) -> None:
        """Let another worker train; without an answer of Redis the lock expires."""
        with contextlib.suppress(StreamrecError):
            await take_lock(self._redis, self._key, self._name, 0)


@contextlib.asynccontextmanager
async def training_lock(redis: RedisClient, supervisor: Supervisor) -> AsyncIterator[TrainingLock]:
    """Hold the lock while the block runs.

    Raises:
        RetrainError: another worker holds the lock.
        RedisUnavailable: Redis does not answer.
    """
    lock = TrainingLock(redis)
    await lock.take()
    try:
        async with supervisor.running({"lock": lock.keep}):
            yield lock
    finally:
        await lock.release()
