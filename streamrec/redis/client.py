"""Talk to Redis: run scripts and commands with short time-outs. nodes.py chooses the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from redis.exceptions import RedisError

from streamrec.errors import RedisRejected, RedisUnavailable, StreamrecError
from streamrec.formats import FORMAT, refusal
from streamrec.metrics import Metrics
from streamrec.redis.connection import connect
from streamrec.redis.errors import RedisFailure, redis_error
from streamrec.redis.isolation import Call, Isolation
from streamrec.redis.keys import Keys
from streamrec.redis.nodes import (
    Command,
    NotReplicated,
    Primary,
    RedisArg,
    Wait,
    cancellation_preserved,
    pipelined,
    pool_of,
)
from streamrec.redis.script import Script
from streamrec.redis.sentinels import WatchedServer
from streamrec.setting_groups import RedisSettings

LISTEN_TIMEOUT_S = 0.5  # below any sensible socket time-out, which would end the subscription
SCAN_COUNT = 1000
PROBE_TTL_S = 60
WAIT_SHARE = 0.8  # of the time-out: WAIT must end before the connection times out


class RedisClient:
    """A small pool of connections.

    Time-outs are short: by default redis-py waits up to a minute. A command whose answer is lost is sent again, which
    is harmless for a script, since the replay guard knows the offsets.

    Raises:
        SettingsError: the URL has an unknown option or a wrong value of one, or a TLS file is wrong.
    """

    def __init__(self, settings: RedisSettings, metrics: Metrics | None = None) -> None:
        self._nodes = connect(settings)
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
            RedisRejected: the script or Redis refuses the data; waiting would not help.
        """
        return self._successful(await self._run(script, [(keys, args)]), [keys])[0]

    async def run_each(
        self, script: Script, shared: Sequence[RedisArg], calls: Sequence[Call]
    ) -> list[list[Any] | RedisRejected]:
        """Run a script for many users, each with their own keys and arguments; return the reply for each.

        This is one call for all, on a cluster one call per user and one round trip per node. A user whose call can
        never succeed gets an error in place of the reply, and the others get theirs. Raises RedisUnavailable like
        ``run``; the script may then have run for some users.
        """
        isolation = Isolation(script, self._run, self._error)
        if self._cluster:
            each = _with_shared(shared, calls)
            return await isolation.each(await self._run(script, each), each)
        together = [*shared, *(arg for _, args in calls for arg in args)]
        try:
            reply = await self.run(script, [key for keys, _ in calls for key in keys], together)
        except (RedisUnavailable, RedisRejected) as error:
            if not isinstance(error.__cause__, Exception):
                raise
            return await isolation.together(error.__cause__, _with_shared(shared, calls))
        size = len(reply) // len(calls)
        return [reply[start : start + size] for start in range(0, len(reply), size)]

    async def primaries(self) -> list[Primary]:
        """Return all servers that take writes. Raises RedisUnavailable if they are unknown."""
        try:
            with cancellation_preserved():
                return await self._nodes.primaries()
        except (RedisError, OSError) as error:
            raise self._error(error) from error

    async def run_at(self, script: Script, calls: Sequence[tuple[Primary, Sequence[RedisArg]]]) -> list[Any]:
        """Run a script without keys at servers, each with its arguments; return the replies. Raises as ``run`` does."""
        wait = self._wait if script.replicated else None
        with cancellation_preserved():
            answers = await asyncio.gather(
                *(pipelined(at, [Command("", ("EVALSHA", script.sha, 0, *args))], script, wait) for at, args in calls)
            )
        return self._successful([answer for (answer,) in answers], [[]] * len(calls))

    async def _run(self, script: Script, calls: Sequence[tuple[list[str], Iterable[RedisArg]]]) -> list[Any]:
        """Return the answers, errors among them."""
        commands = [
            Command(keys[0] if keys else "", ("EVALSHA", script.sha, len(keys), *keys, *args)) for keys, args in calls
        ]
        started = time.perf_counter()
        try:
            return await self._answers(commands, script, self._wait if script.replicated else None)
        finally:
            if self._metrics is not None:
                self._metrics.redis_seconds.labels(script.name).observe(time.perf_counter() - started)

    async def ping(self) -> None:
        """Raise RedisUnavailable unless each primary answers and has its replicas. This writes nothing."""
        await self._follow()
        if self._wait is not None:
            fewest = min(await self._on_primaries("WAIT", *self._wait))
            if fewest < self._wait.replicas:
                raise self._error(NotReplicated(fewest, self._wait))
        if self._cluster:
            await self._on_primaries("PING")
            await self._call("EXISTS", self._probed[0])  # nodes of a cluster that is down answer PING, not this
        else:
            await self._call("EXISTS", *self._probed)  # keys of two slots: a cluster refuses

    async def probe(self) -> None:
        """Raise RedisUnavailable or RedisRejected unless each primary takes a write and has its replicas.

        A server that is full or read-only, or cannot save, still answers reads.
        """
        await self._follow()
        try:
            with cancellation_preserved():
                keys = await self._nodes.keys_at_primaries(self.keys.probe)
        except (RedisError, OSError) as error:
            raise self._error(error) from error
        writes = [Command(key, ("SET", key, "1", "EX", PROBE_TTL_S)) for key in keys]
        self._successful(await self._answers(writes, wait=self._wait), [[key] for key in keys])

    async def _follow(self) -> None:
        if isinstance(self._nodes, WatchedServer):
            with cancellation_preserved():
                await self._nodes.follow()

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
        """Return the values of string keys, None for a missing key or one of another type."""
        if self._cluster:  # MGET also here: a GET of a key of another type would be an error
            return [value for (value,) in await self._send([Command(key, ("MGET", key)) for key in keys])]
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
            with cancellation_preserved():
                node = await self._nodes.client_of(channel)  # any node would do: they forward messages
            renewals = pool_of(node).renewals
            async with node.pubsub(ignore_subscribe_messages=True) as subscription:
                with cancellation_preserved():
                    await subscription.subscribe(channel)
                while await self._nodes.client_of(channel) is node and pool_of(node).renewals == renewals:
                    with cancellation_preserved():
                        message = await subscription.get_message(timeout=LISTEN_TIMEOUT_S)
                    if message is not None:
                        yield message["data"].decode(errors="replace")
            raise RedisError("another server may be the primary now")
        except (RedisError, OSError) as error:
            raise self._error(error) from error

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
            raise self._error(error) from error

    async def _call(self, name: str, key: str, *more: RedisArg) -> Any:
        return (await self._send([Command(key, (name, key, *more))]))[0]

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        return self._successful(await self._answers(commands), [[command.key] for command in commands])

    async def _answers(
        self, commands: Sequence[Command], script: Script | None = None, wait: Wait | None = None
    ) -> list[Any]:
        """Return the answers, errors among them."""
        if not commands:
            return []
        try:
            with cancellation_preserved():
                return await self._nodes.send(commands, script, wait)
        except (RedisError, OSError) as error:
            raise self._error(error) from error

    def _successful(self, answers: list[Any], keys: Sequence[list[str]]) -> list[Any]:
        """Return the answers if none is an error."""
        for answer, of in zip(answers, keys, strict=True):
            if isinstance(answer, Exception):
                raise self._error(answer, of) from answer
        return answers

    async def _on_primaries(self, *parts: RedisArg) -> list[Any]:
        try:
            with cancellation_preserved():
                nodes = await self._nodes.primaries()
                commands = [node.execute_command(*parts) for node in nodes]  # type: ignore[no-untyped-call]
                # wait for all, also after an error: a late one might connect again after close()
                answers = await asyncio.gather(*commands, return_exceptions=True)
            for error in (answer for answer in answers if isinstance(answer, BaseException)):
                raise error
            return answers
        except (RedisError, OSError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception, keys: Sequence[str] = ()) -> RedisFailure:
        failure = redis_error(self._settings, error, ", ".join(keys))
        if isinstance(failure, RedisUnavailable):
            self._nodes.mark_stale()
        return failure


def _with_shared(shared: Sequence[RedisArg], calls: Sequence[Call]) -> list[Call]:
    return [(keys, [*shared, *args]) for keys, args in calls]
