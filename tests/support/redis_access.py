"""Make events and batches, and connect to Redis without the package's client."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import re
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

import redis.asyncio as redis

from streamrec.errors import RedisUnavailable
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.redis.script import Script
from streamrec.schemas import CLICK, ClickEvent, EventBatch, Role, StoredItems
from streamrec.settings import Settings

BASE_MS = 1_700_000_000_000


def event(
    user: str,
    item: str,
    offset: int,
    timestamp_ms: int = BASE_MS,
    partition: int = 0,
    record_ts_ms: int = BASE_MS,
    role: Role = CLICK,
) -> ClickEvent:
    return ClickEvent(user, item, timestamp_ms, partition, offset, record_ts_ms, role=role)


def record(
    user: str,
    items: list[str],
    timestamp_ms: int,
    partition: int,
    offset: int,
    record_ts_ms: int,
    role: Role = CLICK,
) -> list[ClickEvent]:
    """Return the clicks of one record."""
    return [
        ClickEvent(user, item, timestamp_ms, partition, offset, record_ts_ms, place, role)
        for place, item in enumerate(items)
    ]


def batch(*events: ClickEvent) -> EventBatch:
    return EventBatch(events=list(events))


def clicks(user: str, items: list[str], first_offset: int = 0, partition: int = 0) -> EventBatch:
    return batch(
        *(event(user, item, offset, BASE_MS + offset, partition) for offset, item in enumerate(items, first_offset))
    )


def stored(items: Iterable[str]) -> StoredItems:
    """Return item ids in the form that Redis stores."""
    return StoredItems.of(items)


def under(redis: RedisClient, settings: Settings) -> RedisClient:
    """Return the same connection with the keys of these settings."""
    found = copy.copy(redis)
    found.keys = Keys(settings.redis.key_prefix)
    return found


@contextlib.asynccontextmanager
async def raw_redis(settings: Settings) -> AsyncIterator[redis.Redis]:
    client = redis.Redis.from_url(settings.redis.url.get_secret_value())
    try:
        yield client
    finally:
        await client.aclose()


class RedisThatFailsScripts(RedisClient):
    """Refuses scripts while it is broken, but runs the first ``working`` ones.

    ``arrived`` is set when a script is called, and the call fails when ``fail`` is set: a test can act in between.
    """

    broken = True
    working = 0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.arrived, self.fail = asyncio.Event(), asyncio.Event()

    async def run(self, script: Script, keys: list[str], args: Any) -> Any:
        if not self.broken or self.working:
            self.working = max(0, self.working - 1)
            return await super().run(script, keys, args)
        self.arrived.set()
        await self.fail.wait()
        raise RedisUnavailable("down")


class SentCommands(list[str]):
    """Names of the commands that clients sent; commands of scripts are left out."""


@contextlib.asynccontextmanager
async def commands_about(settings: Settings) -> AsyncIterator[SentCommands]:
    """Collect the commands with a key of these settings while the block runs; the list is filled at its end."""
    found = SentCommands()
    end = f"end-{uuid.uuid4().hex}"
    async with raw_redis(settings) as client, client.monitor() as monitor:
        yield found
        async with raw_redis(settings) as other:
            await other.echo(end)  # type: ignore[no-untyped-call]
        async for command in monitor.listen():
            if end in command["command"]:
                return
            if settings.redis.key_prefix in command["command"] and command["client_type"] != "lua":
                found.append(re.split(r"\s", command["command"])[0].strip('"').upper())
