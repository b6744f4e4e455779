"""Talk to Redis: run scripts and commands with short time-outs. nodes.py chooses the server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError, ResponseError

from streamrec.errors import RedisUnavailable, SettingsError, StreamrecError
from streamrec.formats import FORMAT, refusal
from streamrec.metrics import Metrics
from streamrec.redis.errors import redis_error
from streamrec.redis.keys import Keys
from streamrec.redis.nodes import Cluster, Command, NotReplicated, OneServer, RedisArg, Wait
from streamrec.redis.script import Script
from streamrec.redis.sentinels import Sentinels, WatchedServer
from streamrec.setting_groups import RedisSettings
from streamrec.tls import REDIS, tls_context

MAX_CONNECTIONS = 6  # per node: loop, refresh, probe, re-scoring, listener, page
RETRIES = 2
LISTEN_TIMEOUT_S = 0.5  # below any sensible socket time-out, which would end the subscription
SCAN_COUNT = 1000
WAIT_SHARE = 0.8  # of the time-out: WAIT must end before the connection times out
REFUSAL = "STREAMREC "  # first word of errors that our scripts raise


class RedisClient:
    """A small pool of connections.

    Time-outs are short: by default redis-py waits up to a minute. A command whose answer is lost is sent again, which
    is harmless for a script, since the replay guard knows the offsets.

    Raises:
        SettingsError: the URL has an unknown option or a wrong value of one, or a TLS file is wrong.
    """

    def __init__(self, settings: RedisSettings, metrics: Metrics | None = None) -> None:
        identity = _identity(settings)
        try:
            options = {
                "max_connections": MAX_CONNECTIONS,
                "timeout": settings.timeout_s * (RETRIES + 2),
                "socket_timeout": settings.timeout_s,
                "socket_connect_timeout": settings.timeout_s,
                "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), RETRIES),
                **identity,
                **parse_url(settings.server_url),
            }
            self._nodes = _nodes(settings, options)
        except (ValueError, TypeError, RedisError) as error:
            raise SettingsError(f"redis_url: an option after the ? is unknown or wrong: {error}") from None
        self._settings = settings
        self._cluster = settings.cluster
        self.keys = Keys(settings.key_prefix)
        self._probed = (self.keys.popular, self.keys.popularity)
        replicas, timeout_ms = settings.wait_replicas, max(1, int(settings.timeout_s * WAIT_SHARE * 1000))
        self._wait = Wait(replicas, timeout_ms) if replicas else None
        self._metrics = metrics

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._nodes.aclose()

    async def run(self, script: Script, keys: list[str], args: Iterable[RedisArg]) -> Any:
        """Run a Lua script: atomic, in one round trip. On a cluster all keys must be in one slot.

        Raises:
            RedisUnavailable: it could not be run, its answer was lost, or too few replicas have its writes.
            StreamrecError: the script itself refused; waiting would not help.
        """
        return (await self._run(script, [(keys, args)]))[0]

    async def run_each(
        self, script: Script, shared: Sequence[RedisArg], calls: Sequence[tuple[list[str], list[RedisArg]]]
    ) -> list[list[Any]]:
        """Run a script for many users, each with their own keys and arguments; return the reply for each.

        This is one call for all, on a cluster one call per user and one round trip per node. Raises like ``run``; the
        script may then have run for some users.
        """
        if self._cluster:
            return await self._run(script, [(keys, [*shared, *args]) for keys, args in calls])
        args = [*shared, *(arg for _, args in calls for arg in args)]
        reply = await self.run(script, [key for keys, _ in calls for key in keys], args)
        size = len(reply) // len(calls)
        return [reply[start : start + size] for start in range(0, len(reply), size)]

    async def _run(self, script: Script, calls: Sequence[tuple[list[str], Iterable[RedisArg]]]) -> list[Any]:
        commands = [
            Command(keys[0] if keys else "", ("EVALSHA", script.sha, len(keys), *keys, *args)) for keys, args in calls
        ]
        started = time.perf_counter()
        try:
            return await self._send(commands, script, self._wait if script.replicated else None)
        finally:
            if self._metrics is not None:
                self._metrics.redis_seconds.labels(script.name).observe(time.perf_counter() - started)

    async def ping(self) -> None:
        """Raise RedisUnavailable unless each primary answers and has its replicas."""
        if isinstance(self._nodes, WatchedServer):
            with _cancellation_preserved():
                await self._nodes.follow()
        if self._wait is not None:
            fewest = min(await self._on_primaries("WAIT", *self._wait))
            if fewest < self._wait.replicas:
                raise self._unavailable(NotReplicated(fewest, self._wait))
        if self._cluster:
            await self._on_primaries("PING")
            await self._call("EXISTS", self._probed[0])  # nodes of a cluster that is down answer PING, not this
        else:
            await self._call("EXISTS", *self._probed)  # keys of two slots: a cluster refuses

    async def check_format(self, claim: bool = True) -> None:
        """Refuse data of an unknown format under the prefix; without a format key, data are new or lost.

        Args:
            claim: write our format if none is there, since data follow.

        Raises:
            RedisUnavailable: Redis does not answer.
            StreamrecError: the stored data have an unknown format.
        """
        if claim:
            await self._call("SET", self.keys.format, FORMAT, "NX")
        (found,) = await self.get_many([self.keys.format])
        if found != FORMAT.encode() and (found is not None or claim):
            where = f"key {self.keys.format} of Redis at {self._settings.address}"
            text = "another type" if found is None else found.decode(errors="replace")
            raise StreamrecError(refusal(where, text, "set another STREAMREC_REDIS_KEY_PREFIX"))

    async def get_many(self, keys: list[str]) -> list[bytes | None]:
        """Return the values of string keys, None for a missing key."""
        if self._cluster:
            return await self._send([Command(key, ("GET", key)) for key in keys])
        values: list[bytes | None] = await self._call("MGET", *keys) if keys else []
        return values

    async def members(self, key: str) -> set[str]:
        """Return the members of a set."""
        return {member.decode(errors="replace") for member in await self._call("SMEMBERS", key)}

    async def hash(self, key: str) -> dict[str, str]:
        """Return the fields of a hash, empty for a missing key."""
        found = await self._call("HGETALL", key)
        return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}

    async def set(self, key: str, value: bytes, ttl_s: int) -> None:
        """Write a string key."""
        await self._call("SET", key, value, "EX", ttl_s)

    async def delete(self, key: str) -> None:
        """Remove a key."""
        await self._call("DEL", key)

    async def memory_bytes(self) -> int:
        """Return the memory used by all primaries."""
        return sum(int(info["used_memory"]) for info in await self._on_primaries("INFO", "memory"))

    async def notify(self, channel: str, message: str) -> None:
        """Send a message to the current listeners of a channel."""
        await self._call("PUBLISH", channel, message)

    async def listen(self, channel: str) -> AsyncIterator[str]:
        """Yield the messages of a channel, without end.

        Raises:
            RedisUnavailable: the connection was lost.
        """
        try:
            with _cancellation_preserved():
                node = await self._nodes.client_of(channel)  # any node would do: they forward messages
            async with node.pubsub(ignore_subscribe_messages=True) as subscription:
                with _cancellation_preserved():
                    await subscription.subscribe(channel)
                while await self._nodes.client_of(channel) is node:
                    with _cancellation_preserved():
                        message = await subscription.get_message(timeout=LISTEN_TIMEOUT_S)
                    if message is not None:
                        yield message["data"].decode(errors="replace")
            raise RedisError("another server is the primary now")
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    async def scan(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of the keys that begin with a prefix, each once."""
        pattern = "".join(f"[{c}]" if c in "*?[" else c for c in prefix) + "*"
        seen = set()
        try:
            for node in await self._nodes.primaries():
                async for key in node.scan_iter(match=pattern, count=SCAN_COUNT):
                    if key not in seen:
                        seen.add(key)
                        yield key.decode(errors="replace")
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    async def _call(self, name: str, key: str, *more: RedisArg) -> Any:
        return (await self._send([Command(key, (name, key, *more))]))[0]

    async def _send(
        self, commands: Sequence[Command], script: Script | None = None, wait: Wait | None = None
    ) -> list[Any]:
        try:
            with _cancellation_preserved():
                answers = await self._nodes.send(commands, script, wait)
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        failed = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if isinstance(failed, ResponseError) and str(failed).startswith(REFUSAL):
            raise StreamrecError(str(failed).removeprefix(REFUSAL))
        if failed is not None:
            raise self._unavailable(failed) from failed
        return answers

    async def _on_primaries(self, *parts: RedisArg) -> list[Any]:
        try:
            with _cancellation_preserved():
                nodes = await self._nodes.primaries()
                commands = [node.execute_command(*parts) for node in nodes]  # type: ignore[no-untyped-call]
                # wait for all, also after an error: a late one might connect again after close()
                answers = await asyncio.gather(*commands, return_exceptions=True)
            for error in (answer for answer in answers if isinstance(answer, BaseException)):
                raise error
            return answers
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> RedisUnavailable:
        self._nodes.mark_stale()
        return redis_error(self._settings, error)


def _nodes(settings: RedisSettings, options: dict[str, Any]) -> OneServer | Cluster | WatchedServer:
    """Return the server or servers that the settings name."""
    sentinels = settings.sentinels
    if sentinels is None:
        return Cluster(options) if settings.cluster else OneServer(options)
    password = settings.sentinel_password
    login = {"username": settings.sentinel_username, "password": password.get_secret_value() if password else None}
    return WatchedServer(options, Sentinels(sentinels.sentinels, sentinels.name, options, login))


def _identity(settings: RedisSettings) -> dict[str, Any]:
    """Return the options of redis-py for login and TLS."""
    password = settings.password
    given: dict[str, Any] = {"username": settings.username}
    given["password"] = password.get_secret_value() if password else None
    if settings.uses_tls:
        tls_context(settings.tls, REDIS)  # redis-py would read the files later, without naming the wrong one
        files = {"ca_certs": settings.tls.ca_file, "certfile": settings.tls.cert_file}
        files["keyfile"] = settings.tls.key_file
        given |= {f"ssl_{name}": str(path) if path else None for name, path in files.items()}
        given["ssl_check_hostname"] = True  # the default only of newer redis-py
    return {name: value for name, value in given.items() if value}


@contextlib.contextmanager
def _cancellation_preserved() -> Iterator[None]:
    """Raise a cancellation that redis-py has lost: asyncio.wait_for loses some before Python 3.12."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError
