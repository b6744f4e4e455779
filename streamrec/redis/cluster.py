"""Send commands to the owner of each key on a Redis Cluster.

redis-py's own cluster client is not used, for three reasons. It may send ASKING and its command over two connections,
so that keys of a moving slot are not found. It cuts all connections, busy ones too, when the cluster is down for a
moment. And WAIT must follow the writes on their connection. Here each node has an ordinary client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import redis.asyncio as redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, TryAgainError

from streamrec.redis.nodes import Address, Command, Wait, new_client, pipelined, renew
from streamrec.redis.script import Script

# Before each try. A redirect is followed at once; while a slot moves, a user's keys may be on two nodes for a moment.
PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
MAX_NODES_QUERIED = 3  # for the slots, by one call: nodes that hang cost a time-out each
MAX_KEYS_TRIED = 50_000  # to find one at each primary: some 50 ms, and only after slots have moved


class Cluster:
    """The nodes of a cluster.

    The owners of the slots are fetched again after a MOVED redirect and after any error. The seed is queried too, and
    its name resolved anew: all nodes may have other addresses by now.

    Args:
        options: of redis-py's connection pool; host and port are those of the seed node.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._seed: Address = (options.get("host", "localhost"), options.get("port", 6379))
        self._clients: dict[Address, redis.Redis] = {self._seed: new_client(options)}
        self._removed: list[redis.Redis] = []  # of nodes that left; their busy connections end by themselves
        self._owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._keys_at_primaries: list[str] = []
        self._stale = True
        self._failed = False
        self._refreshing = asyncio.Lock()

    async def send(
        self, commands: Sequence[Command], script: Script | None = None, wait: Wait | None = None
    ) -> list[Any]:
        """Return the answers in order, errors among them. Arguments as for ``OneServer``.

        Each node gets one pipeline, which is no transaction: each command succeeds or fails on its own.

        Raises:
            RedisError: no node answers with the owners of the slots.
        """
        answers: list[Any] = [None] * len(commands)
        pending: Iterable[int] = range(len(commands))
        for pause_s in PAUSES_S:
            await asyncio.sleep(pause_s)
            await self._refresh_slots()
            targets = [(self._owners[_slot(commands[index].key)], index) for index in pending]
            await self._send(targets, commands, answers, script, wait)
            redirected = [(_address(answers[index]), index) for _, index in targets if type(answers[index]) is AskError]
            await self._send(redirected, commands, answers, script, wait, asking=True)
            pending = [index for _, index in targets if isinstance(answers[index], (AskError, TryAgainError))]
            if not pending:
                break
            for error in (answers[index] for index in pending if isinstance(answers[index], MovedError)):
                self._query_first(_address(error))
        return answers

    async def client_of(self, key: str) -> redis.Redis:
        """Return the client of the owner of a key.

        Raises:
            RedisError: the owner is unknown, and no node answers with it.
        """
        await self._refresh_slots()
        owner = self._owners[_slot(key)]
        if owner is None:
            raise ClusterDownError("no node has the slot")
        return self._clients[owner]

    async def primaries(self) -> list[redis.Redis]:
        """Return the clients of all primaries.

        Raises:
            RedisError: the primaries are unknown, and no node answers with them.
        """
        await self._refresh_slots()
        return [self._clients[address] for address in dict.fromkeys(self._owners) if address is not None]

    async def keys_at_primaries(self, name: Callable[[int], str]) -> list[str]:
        """Return a numbered key at each primary, but for one that owns hardly any slot.

        Raises:
            RedisError: the primaries are unknown, and no node answers with them.
        """
        await self._refresh_slots()
        if not self._keys_at_primaries:
            found: dict[Address | None, str] = {None: ""}
            wanted = len({None, *self._owners})
            for key in map(name, range(MAX_KEYS_TRIED)):
                found.setdefault(self._owners[_slot(key)], key)
                if len(found) == wanted:
                    break
            self._keys_at_primaries = [key for key in found.values() if key]
        return self._keys_at_primaries

    def mark_stale(self) -> None:
        """Fetch the owners of the slots again before the next command, over new connections."""
        self._stale = self._failed = True

    async def aclose(self) -> None:
        """Close all connections."""
        for client in (*self._clients.values(), *self._removed):
            await client.aclose()

    async def _send(
        self,
        targets: Sequence[tuple[Address | None, int]],
        commands: Sequence[Command],
        answers: list[Any],
        script: Script | None,
        wait: Wait | None,
        asking: bool = False,
    ) -> None:
        """Send commands to their targets, pairs of node and index, and store the answers at the indices."""
        by_node: dict[Address, list[int]] = {}
        for address, index in targets:
            if address is None:
                answers[index] = ClusterDownError("no node has the slot")
            else:
                by_node.setdefault(address, []).append(index)
        replies = await asyncio.gather(
            *(
                pipelined(self._client(address), [commands[index] for index in indices], script, wait, asking)
                for address, indices in by_node.items()
            )
        )
        for indices, reply in zip(by_node.values(), replies, strict=True):
            for index, answer in zip(indices, reply, strict=True):
                answers[index] = answer

    def _query_first(self, address: Address) -> None:
        """Fetch the slots again, first from the target of a MOVED redirect: other nodes may not know it yet."""
        self._clients = {address: self._client(address)} | self._clients
        self._stale = True

    async def _refresh_slots(self) -> None:
        """Fetch the owners of the slots if they are stale; a node that fails is queried last next time."""
        async with self._refreshing:
            error: Exception = ClusterDownError("no node knows the owners of the slots")
            if self._failed:
                self._failed = False
                for client in self._clients.values():
                    renew(client)
            for address in self._to_query() if self._stale else ():
                try:
                    shards = await self._clients[address].execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
                except (RedisError, OSError) as failed:
                    error = failed
                    shards = None
                if shards:
                    await self._update_slots(shards, address[0])
                    return
                self._clients[address] = self._clients.pop(address)
            if self._stale:
                raise error

    def _to_query(self) -> list[Address]:
        """Return the nodes to query for the slots: a few, and always the seed."""
        known = [address for address in self._clients if address != self._seed]
        some = known[: MAX_NODES_QUERIED - 1]
        return [self._seed, *some] if next(iter(self._clients)) == self._seed else [*some, self._seed]

    async def _update_slots(self, shards: Sequence[Any], queried: str) -> None:
        """Store the owners of the slots, and drop the clients of nodes that left the cluster.

        The client of the seed node remains: a new node may get its name.

        Args:
            shards: the answer to CLUSTER SLOTS.
            queried: host of the node that answered; an empty host in the answer means this one.
        """
        owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        found = set()
        for start, end, *nodes in shards:
            addresses = [(node[0].decode() if node[0] else queried, int(node[1])) for node in nodes]
            owners[start : end + 1] = [addresses[0]] * (end + 1 - start)
            found.update(addresses)
        for address in found:
            self._client(address)
        if owners != self._owners:
            self._keys_at_primaries = []
        self._owners, self._stale = owners, False
        self._removed += [self._clients.pop(address) for address in self._clients.keys() - found - {self._seed}]
        for client in self._removed:
            await client.connection_pool.disconnect(inuse_connections=False)

    def _client(self, address: Address) -> redis.Redis:
        if address not in self._clients:
            self._clients[address] = new_client(self._options | {"host": address[0], "port": address[1]})
        return self._clients[address]


def _slot(key: str) -> int:
    return key_slot(key.encode())


def _address(error: AskError) -> Address:
    """Return the target of a redirect."""
    return error.host, error.port
