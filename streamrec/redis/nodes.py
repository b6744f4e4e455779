"""Send commands to one server. cluster.py chooses the owner of a key, sentinels.py finds a server by sentinels."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import redis.asyncio as redis
from redis.exceptions import NoScriptError, RedisError

from streamrec.redis.script import Script

RedisArg = str | bytes | int | float
Primary = redis.Redis  # the client of a server
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


class Pool(redis.BlockingConnectionPool):
    """A pool whose connections can be renewed: the name or relay behind the address may lead elsewhere by now.

    redis-py keeps connections that answer READONLY, LOADING, NOREPLICAS and the like, also idle ones.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.renewals = 0
        self._made: set[Any] = set()
        self._outdated: set[Any] = set()

    def renew(self) -> None:
        """Close each connection that is open now: one in use when it is released, an idle one before its next use.

        Not at once: another task may be about to use the idle one.
        """
        self.renewals += 1
        self._outdated = set(self._made)

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """Return a connection for exclusive use."""
        connection = await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
        self._made.add(connection)
        try:
            if await self._close_outdated(connection):
                await connection.connect()
        except BaseException:
            await super().release(connection)
            raise
        return connection

    async def release(self, connection: Any) -> None:
        """Take a connection back."""
        await self._close_outdated(connection)
        await super().release(connection)

    async def _close_outdated(self, connection: Any) -> bool:
        if connection not in self._outdated:
            return False
        self._outdated.discard(connection)
        await connection.disconnect()
        return True


class OneServer:
    """One server. After any error that waiting may end, no connection from before it is used again.

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
        return await pipelined(await self.client_of(""), commands, script, wait)

    async def client_of(self, key: str) -> redis.Redis:
        """Return the client of the owner of a key."""
        if self._stale:
            self._stale = False
            renew(self._client)
        return self._client

    async def primaries(self) -> list[redis.Redis]:
        """Return the clients of all primaries."""
        return [await self.client_of("")]

    async def keys_at_primaries(self, name: Callable[[int], str]) -> list[str]:
        """Return a numbered key at each primary."""
        return [name(0)]

    def mark_stale(self) -> None:
        """Renew the connections before the next command."""
        self._stale = True

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def pipelined(
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


@contextlib.contextmanager
def cancellation_preserved() -> Iterator[None]:
    """Raise a cancellation that redis-py has lost: asyncio.wait_for loses some before Python 3.12."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


def pool_of(client: redis.Redis) -> Pool:
    """Return the pool of a client that ``new_client`` has made."""
    pool = client.connection_pool
    assert isinstance(pool, Pool)
    return pool


def renew(client: redis.Redis) -> None:
    """Use no connection of a client again that is open now."""
    pool_of(client).renew()


def new_client(options: Mapping[str, Any]) -> redis.Redis:
    """Return a client with a pool of its own; it does not connect yet."""
    pool = Pool(**options)
    # makes a connection object without connecting: a wrong option raises here
    pool.make_connection()  # type: ignore[no-untyped-call]
    return redis.Redis.from_pool(pool)
