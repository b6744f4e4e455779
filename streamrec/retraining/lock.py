"""The lock in Redis that lets one worker train at a time."""

from __future__ import annotations

from streamrec.redis.client import RedisClient
from streamrec.redis.script import Script

LOCK = Script(__package__, "lock")


async def take_lock(redis: RedisClient, key: str, holder: str, ttl_ms: int) -> str:
    """Take, renew or, with ``ttl_ms=0``, release a lock; return who holds it now.

    Raises:
        RedisUnavailable: Redis does not answer.
    """
    found: bytes = await redis.run(LOCK, [key], [holder, ttl_ms])
    return found.decode(errors="replace")
