"""Where commands go: to one server, or on a cluster each to the node that has its key.

redis-py's own cluster client is not used. It may send ASKING and the command that it is for over two connections, so
that keys of a slot that moves are not found, and it cuts all connections, those in use too, whenever the cluster is
down for a moment; and WAIT has to follow the writes over their connection. Each node has an ordinary client instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import redis.asyncio as redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, NoScriptError, RedisError, TryAgainError

from streamrec.redis.script import Script

# A redirection is followed at once. Keys of one user may be at two nodes while their slot moves: that takes a moment.
PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
ASKED = 3  # nodes that one call asks who has which slots, if they hang

RedisArg = str | bytes | int | float
Address = tuple[str, int]


class Command(NamedTuple):
    """What is sent, and the key that says where."""

    key: str
    parts: Sequence[RedisArg]


class Wait(NamedTuple):
    """So many replicas must have what was written, within so long."""

    replicas: int
    timeout_ms: int


class NotReplicated(RedisError):
    """Too few replicas acknowledged in time; what was written stays written at its primary."""

    def __init__(self, acknowledged: int, wait: Wait) -> None:
        super().__init__(
            f"{acknowledged} of redis_wait_replicas={wait.replicas} have what was written, after "
            f"{wait.timeout_ms / 1000:g} s"
        )


class OneServer:
    """One server. ``options`` are those of redis-py's connection pool."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._client = _client(options)

    async def send(
        self, commands: Sequence[Command], script: Script | None = None, wait: Wait | None = None
    ) -> list[Any]:
        """Answers in order, errors among them; ``script`` is what EVALSHA means."""
        return await _pipelined(self._client, commands, script, wait)

    async def client_of(self, key: str) -> redis.Redis:
        """Who has a key."""
        return self._client

    async def primaries(self) -> list[redis.Redis]:
        """All who have keys."""
        return [self._client]

    def doubt(self) -> None:
        """Something went wrong."""

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class Cluster:
    """The nodes of a cluster. ``options`` are those of redis-py's connection pool, with the first node to be asked.

    Who has which slots is asked anew where a node says that another one has them, and after anything went wrong.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._first: Address = (options.get("host", "localhost"), options.get("port", 6379))
        self._clients: dict[Address, redis.Redis] = {self._first: _client(options)}
        self._gone: list[redis.Redis] = []  # of nodes that left; what is in use there ends by itself
        self._owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._stale = True
        self._asking = asyncio.Lock()

    async def send(
        self, commands: Sequence[Command], script: Script | None = None, wait: Wait | None = None
    ) -> list[Any]:
        """Answers in order, errors among them; ``script`` is what EVALSHA means.

        A pipeline a node, not a transaction: commands take effect or not, each for itself.

        Raises:
            RedisError: no node says who has the keys.
        """
        answers: list[Any] = [None] * len(commands)
        waiting: Iterable[int] = range(len(commands))
        for pause_s in PAUSES_S:
            await asyncio.sleep(pause_s)
            await self._know()
            where = [(self._owners[_slot(commands[place].key)], place) for place in waiting]
            await self._send(where, commands, answers, script, wait)
            asked = [(_address(answers[place]), place) for _, place in where if type(answers[place]) is AskError]
            await self._send(asked, commands, answers, script, wait, asking=True)
            waiting = [place for _, place in where if isinstance(answers[place], (AskError, TryAgainError))]
            if not waiting:
                break
            for error in (answers[place] for place in waiting if isinstance(answers[place], MovedError)):
                self._ask_first(_address(error))
        return answers

    async def client_of(self, key: str) -> redis.Redis:
        """The node that has a key.

        Raises:
            RedisError: it is not known, and nobody says.
        """
        await self._know()
        owner = self._owners[_slot(key)]
        if owner is None:
            raise ClusterDownError("no node has the slot")
        return self._clients[owner]

    async def primaries(self) -> list[redis.Redis]:
        """The nodes that have keys.

        Raises:
            RedisError: they are not known, and nobody says.
        """
        await self._know()
        return [self._clients[address] for address in dict.fromkeys(self._owners) if address is not None]

    def doubt(self) -> None:
        """Something went wrong: ask again who has which slots."""
        self._stale = True

    async def aclose(self) -> None:
        """Close all connections."""
        for client in (*self._clients.values(), *self._gone):
            await client.aclose()

    async def _send(
        self,
        where: Sequence[tuple[Address | None, int]],
        commands: Sequence[Command],
        answers: list[Any],
        script: Script | None,
        wait: Wait | None,
        asking: bool = False,
    ) -> None:
        places: dict[Address, list[int]] = {}
        for address, place in where:
            if address is None:
                answers[place] = ClusterDownError("no node has the slot")
            else:
                places.setdefault(address, []).append(place)
        found = await asyncio.gather(
            *(
                _pipelined(self._client(address), [commands[place] for place in there], script, wait, asking)
                for address, there in places.items()
            )
        )
        for there, theirs in zip(places.values(), found, strict=True):
            for place, answer in zip(there, theirs, strict=True):
                answers[place] = answer

    def _ask_first(self, address: Address) -> None:
        """Ask again who has which slots, and first the node that is said to have one: others may not know yet."""
        self._clients = {address: self._client(address)} | self._clients
        self._stale = True

    async def _know(self) -> None:
        """Ask one node after the other, until one says who has which slots; who does not is asked last from then on."""
        async with self._asking:
            error: Exception = ClusterDownError("no node knows who has which slots")
            for address in list(self._clients)[:ASKED] if self._stale else ():
                try:
                    shards = await self._clients[address].execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
                except (RedisError, OSError) as failed:
                    error = failed
                    shards = None
                if shards:
                    await self._note(shards, address[0])
                    return
                self._clients[address] = self._clients.pop(address)
            if self._stale:
                raise error

    async def _note(self, shards: Sequence[Any], asked: str) -> None:
        """Note who has which slots, and forget nodes that are gone, but for the first: its name may be a new one's."""
        owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        found = set()
        for start, end, *nodes in shards:
            addresses = [(node[0].decode() if node[0] else asked, int(node[1])) for node in nodes]
            owners[start : end + 1] = [addresses[0]] * (end + 1 - start)
            found.update(addresses)
        for address in found:
            self._client(address)
        self._owners, self._stale = owners, False
        self._gone += [self._clients.pop(address) for address in self._clients.keys() - found - {self._first}]
        for client in self._gone:
            await client.connection_pool.disconnect(inuse_connections=False)

    def _client(self, address: Address) -> redis.Redis:
        if address not in self._clients:
            self._clients[address] = _client(self._options | {"host": address[0], "port": address[1]})
        return self._clients[address]


async def _pipelined(
    client: redis.Redis,
    commands: Sequence[Command],
    script: Script | None = None,
    wait: Wait | None = None,
    asking: bool = False,
) -> list[Any]:
    """Answers in order, errors among them, over one connection.

    Why what a WAIT has acknowledged survives the primary: WAIT speaks of the writes of its own connection, so the
    server that took them answers, and none that was promoted since; one that was demoted meanwhile answers with an
    error. What a retry finds done is written again, if only its TTL (append.lua), or its WAIT would wait for nothing.
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
            lacking = acknowledged if isinstance(acknowledged, Exception) else NotReplicated(acknowledged, wait)
            answers = [answer if isinstance(answer, Exception) else lacking for answer in answers]
    return answers[1::2] if asking else answers


async def _answers(client: redis.Redis, sent: Iterable[Sequence[RedisArg]]) -> list[Any]:
    pipeline = client.pipeline(transaction=False)
    for parts in sent:
        pipeline.execute_command(*parts)
    return await pipeline.execute(raise_on_error=False)


def _client(options: Mapping[str, Any]) -> redis.Redis:
    pool = redis.BlockingConnectionPool(**options)
    # connects to nothing yet, but takes the options or not
    pool.make_connection()  # type: ignore[no-untyped-call]
    return redis.Redis.from_pool(pool)


def _slot(key: str) -> int:
    return key_slot(key.encode())


def _address(error: AskError) -> Address:
    return error.host, error.port
