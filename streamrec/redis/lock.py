"""Locks in Redis: one holder at a time, until it releases the lock or the lock expires."""

from __future__ import annotations

import os
import socket
import uuid

from streamrec.redis.client import RedisClient
from streamrec.redis.script import Script

LOCK = Script(__package__, "lock")


def holder_name() -> str:
    """Return a name that no other process has, and that says where this one runs."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4()}"


async def take_lock(redis: RedisClient, key: str, holder: str, ttl_ms: int) -> str:
    """Take, renew or, with ``ttl_ms=0``, release a lock; return the name of its holder.

    Raises:
        RedisUnavailable: Redis does not answer.
    """
    found: bytes = await redis.run(LOCK, [key], [holder, ttl_ms])
    return found.decode(errors="replace")
