"""The lock in Redis that lets one worker train at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator

from streamrec.errors import RedisRejected, RedisUnavailable, RetrainError
from streamrec.redis.client import RedisClient
from streamrec.redis.script import Script

LOCK = Script(__package__, "lock")
LOCK_TTL_MS = 15_000
RENEW_EVERY_S = 4.0


async def take_lock(redis: RedisClient, key: str, holder: str, ttl_ms: int) -> str:
    """Take, renew or, with ``ttl_ms=0``, release a lock; return the name of its holder.

    Raises:
        RedisUnavailable: Redis does not answer.
    """
    found: bytes = await redis.run(LOCK, [key], [holder, ttl_ms])
    return found.decode(errors="replace")


@contextlib.asynccontextmanager
async def training_lock(redis: RedisClient) -> AsyncIterator[asyncio.Event]:
    """Hold the lock while the block runs; the event is set when another worker takes it over.

    Raises:
        RetrainError: another worker holds the lock.
        RedisUnavailable: Redis does not answer.
    """
    key, name = redis.keys.training, f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4()}"
    holder = await take_lock(redis, key, name, LOCK_TTL_MS)
    if holder != name:
        raise RetrainError(
            f"another worker trains: {holder} holds the lock {key} in Redis; if that worker is dead, the lock expires "
            f"within {LOCK_TTL_MS // 1000} s"
        )
    taken_over = asyncio.Event()
    renewal = asyncio.create_task(_renew(redis, key, name, taken_over))
    try:
        yield taken_over
    finally:
        renewal.cancel()
        await asyncio.gather(renewal, return_exceptions=True)
        with contextlib.suppress(RedisUnavailable, RedisRejected):
            await take_lock(redis, key, name, 0)


async def _renew(redis: RedisClient, key: str, name: str, taken_over: asyncio.Event) -> None:
    while True:
        await asyncio.sleep(RENEW_EVERY_S)
        with contextlib.suppress(RedisUnavailable):  # the next renewal finds out whether another worker took the lock
            try:
                held = await take_lock(redis, key, name, LOCK_TTL_MS) == name
            except RedisRejected:  # another program has overwritten the key
                held = False
            if not held:
                taken_over.set()
