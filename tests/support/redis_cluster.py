"""Start Redis Clusters for a test, and move slots by hand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis.asyncio as redis
from redis.crc import key_slot

from streamrec.errors import EmbeddedError
from streamrec.local.cluster import EmbeddedCluster
from streamrec.local.process import ServerProcess


@contextlib.contextmanager
def running(replicas: int) -> Iterator[EmbeddedCluster]:
    try:
        found = EmbeddedCluster(replicas=replicas).start()
    except EmbeddedError as error:
        pytest.skip(f"needs cluster nodes to stop and kill: {error}")
    try:
        yield found
    finally:
        found.stop()


def cluster_settings(cluster: EmbeddedCluster) -> dict[str, Any]:
    return {"redis_url": cluster.redis_url, "redis_cluster": True}


@contextlib.asynccontextmanager
async def node(server: ServerProcess) -> AsyncIterator[redis.Redis]:
    client = redis.Redis(port=server.port)
    try:
        yield client
    finally:
        await client.aclose()


class MovingSlot:
    """Moves a slot from its owner to another node, step by step."""

    def __init__(self, cluster: EmbeddedCluster, slot: int, source: int, target: int) -> None:
        self._cluster, self._slot, self._source, self._target = cluster, slot, source, target

    async def _set(self, number: int, *state: str) -> None:
        async with node(self._cluster.nodes[number]) as client:
            await client.execute_command("CLUSTER SETSLOT", self._slot, *state)

    async def begin(self) -> None:
        await self._set(self._target, "IMPORTING", self._cluster.node_id(self._source))
        await self._set(self._source, "MIGRATING", self._cluster.node_id(self._target))

    async def move_keys(self, at_once: int = 1) -> None:
        port = self._cluster.nodes[self._target].port
        async with node(self._cluster.nodes[self._source]) as client:
            while keys := await client.execute_command("CLUSTER GETKEYSINSLOT", self._slot, at_once):
                await client.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "REPLACE", "KEYS", *keys)

    async def end(self) -> None:
        for number in (self._target, self._source):
            await self._set(number, "NODE", self._cluster.node_id(self._target))


def slot_of(key: str) -> int:
    return key_slot(key.encode())


async def owner_of(cluster: EmbeddedCluster, slot: int, queried: int = 0) -> int:
    """Return the number of the owner of a slot, according to one node."""
    async with node(cluster.nodes[queried]) as client:
        for start, end, (_, port, *_), *_ in await client.execute_command("CLUSTER SLOTS"):
            if start <= slot <= end:
                return [server.port for server in cluster.nodes].index(port)
    raise AssertionError(f"no node has slot {slot}")
