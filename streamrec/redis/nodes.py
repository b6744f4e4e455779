"""Send commands to one server, or on a cluster to the owner of each key. sentinels.py finds a server by sentinels.

redis-py's own cluster client is not used, for three reasons. It may send ASKING and its command over two connections,
so that keys of a moving slot are not found. It cuts all connections, busy ones too, when the cluster is down for a
moment. And WAIT must follow the writes on their connection. Here each node has an ordinary client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import redis.asyncio as redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, NoScriptError, RedisError, TryAgainError

from streamrec.redis.script import Script

# Before each try. A redirect is followed at once; while a slot moves, a user's keys may be on two nodes for a moment.
PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
MAX_NODES_QUERIED = 3  # for the slots, by one call: nodes that hang cost a time-out each

RedisArg = str | bytes | int | float
Address = tuple[str, int]


class Command(NamedTuple):
    """A command, and the key that decides which node gets it."""

    key: str
    parts: Sequence[RedisArg]


class Wait(NamedTuple):
    """A number of replicas that must acknowledge the writes within a time."""

    replicas: int
    timeout_ms: int


class NotReplicated(RedisError):
    """Too few replicas acknowledged in time; the primary still has the writes."""

    def __init__(self, acknowledged: int, wait: Wait) -> None:
        super().__init__(
            f"{acknowledged} of redis_wait_replicas={wait.replicas} have the writes after {wait.timeout_ms / 1000:g} s"
        )


class OneServer:
    """One server.

    An error closes idle connections: redis-py keeps one that answered READONLY, though the name may lead elsewhere now.

    Args:
        options: of redis-py's connection pool.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._client = new_client(options)
        self._stale = False

    async def send(
        self, commands: Sequence[Command], script: Script | None = None, wait: Wait | None = None
    ) -> list[Any]:
        """Return the answers in order, errors among them.

        Args:
            script: the script that EVALSHA in the commands runs; it is loaded if the server does not have it.
            wait: replicas to wait for after the commands.
        """
        return await _pipelined(await self.client_of(""), commands, script, wait)

    async def client_of(self, key: str) -> redis.Redis:
        """Return the client of the owner of a key."""
        if self._stale:
            self._stale = False
            await self._client.connection_pool.disconnect(inuse_connections=False)
        return self._client

    async def primaries(self) -> list[redis.Redis]:
        """Return the clients of all primaries."""
        return [await self.client_of("")]

    def mark_stale(self) -> None:
        """Close idle connections before the next command."""
        self._stale = True

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class Cluster:
    """The nodes of a cluster.

    The owners of the slots are fetched again after a MOVED redirect and after any error.

    Args:
        options: of redis-py's connection pool; host and port are those of the seed node.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._seed: Address = (options.get("host", "localhost"), options.get("port", 6379))
        self._clients: dict[Address, redis.Redis] = {self._seed: new_client(options)}
        self._removed: list[redis.Redis] = []  # of nodes that left; their busy connections end by themselves
        self._owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._stale = True
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

    def mark_stale(self) -> None:
        """Fetch the owners of the slots again before the next command."""
        self._stale = True

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
                _pipelined(self._client(address), [commands[index] for index in indices], script, wait, asking)
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
            for address in list(self._clients)[:MAX_NODES_QUERIED] if self._stale else ():
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
        self._owners, self._stale = owners, False
        self._removed += [self._clients.pop(address) for address in self._clients.keys() - found - {self._seed}]
        for client in self._removed:
            await client.connection_pool.disconnect(inuse_connections=False)

    def _client(self, address: Address) -> redis.Redis:
        if address not in self._clients:
            self._clients[address] = new_client(self._options | {"host": address[0], "port": address[1]})
        return self._clients[address]


async def _pipelined(
    client: redis.Redis,
    commands: Sequence[Command],
    script: Script | None = None,
    wait: Wait | None = None,
    asking: bool = False,
) -> list[Any]:
    """Return the answers in order, errors among them; all commands use one connection.

    Writes that WAIT has acknowledged survive the loss of the primary. WAIT counts the writes of its own connection, so
    only the server that took them can answer; a primary that was demoted meanwhile answers with an error. A retry
    writes again what it finds done, if only the TTL (append.lua): otherwise its WAIT would have nothing to wait for.
    """
    sent: list[Sequence[RedisArg]] = []
    for command in commands:
        sent += [("ASKING",), command.parts] if asking else [command.parts]
    if wait is not None:
        sent.append(("WAIT", *wait))
    try:
        answers = await _answers(client, sent)
        if script is not None and any(isinstance(answer, NoScriptError) for answer in answers):
            loaded, *answers = await _answers(client, [("SCRIPT LOAD", script.text), *sent])
            if isinstance(loaded, Exception):
                return [loaded] * len(commands)
    except (RedisError, OSError) as error:
        return [error] * len(commands)
    if wait is not None:
        acknowledged = answers.pop()
        if not isinstance(acknowledged, int) or acknowledged < wait.replicas:
            failure = acknowledged if isinstance(acknowledged, Exception) else NotReplicated(acknowledged, wait)
            answers = [answer if isinstance(answer, Exception) else failure for answer in answers]
    return answers[1::2] if asking else answers


async def _answers(client: redis.Redis, sent: Iterable[Sequence[RedisArg]]) -> list[Any]:
    pipeline = client.pipeline(transaction=False)
    for parts in sent:
        pipeline.execute_command(*parts)
    return await pipeline.execute(raise_on_error=False)


def new_client(options: Mapping[str, Any]) -> redis.Redis:
    """Return a client with a pool of its own; it does not connect yet."""
    pool = redis.BlockingConnectionPool(**options)
    # makes a connection object without connecting: a wrong option raises here
    pool.make_connection()  # type: ignore[no-untyped-call]
    return redis.Redis.from_pool(pool)


def _slot(key: str) -> int:
    return key_slot(key.encode())


def _address(error: AskError) -> Address:
    """Return the target of a redirect."""
    return error.host, error.port
