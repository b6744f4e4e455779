"""The one module that imports redis: connection, scripts, time-outs, and errors in the daemon's own words."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from importlib import resources
from types import TracebackType
from typing import Any, Self

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from streamrec.errors import RedisUnavailable, SettingsError, StreamrecError
from streamrec.metrics import Metrics
from streamrec.settings import Settings

MAX_CONNECTIONS = 6  # the loop, the refresh, the probe, the re-scoring, the listener, the page
RETRIES = 2
LISTEN_TIMEOUT_S = 0.5  # below any sensible time-out of the socket, which would end the listening
SCAN_COUNT = 1000
SCRIPTS = ("append", "publish", "popularity", "lock", "online")
REFUSAL = "STREAMREC "  # what errors of the scripts themselves begin with


class RedisClient:
    """A small pool of connections.

    The default of redis-py waits up to a minute and applies a command twice when the answer is lost. Here
    time-outs are short; applying a script twice is harmless, since the guard knows the offsets.

    Raises:
        SettingsError: the URL has an option that redis-py does not know, or a wrong value for one.
    """

    def __init__(self, settings: Settings, metrics: Metrics | None = None) -> None:
        url = settings.redis_url.get_secret_value()
        tls = {"ssl_ca_certs": str(settings.redis_tls_ca_file)} if settings.redis_tls_ca_file else {}
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=settings.redis_timeout_s * (RETRIES + 2),
                socket_timeout=settings.redis_timeout_s,
                socket_connect_timeout=settings.redis_timeout_s,
                retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), RETRIES),
                **tls,
            )
            # connects to nothing yet, but takes the URL's options or not
            pool.make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, RedisError) as error:
            raise SettingsError(f"redis_url: an option after the ? is unknown or wrong: {error}") from None
        self._redis = redis.Redis.from_pool(pool)
        self._address = settings.redis_address
        self._metrics = metrics
        self._scripts = {
            name: self._redis.register_script(resources.files(__package__).joinpath(f"{name}.lua").read_text())
            for name in SCRIPTS
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def run(self, script: str, keys: list[str], args: Iterable[str | int | float]) -> Any:
        """Run one of the package's Lua scripts: one round trip, atomic.

        Raises:
            RedisUnavailable: it could not be run, or its answer was lost.
            StreamrecError: the script itself refused, so that waiting would not help.
        """
        started = time.perf_counter()
        try:
            with _cancellation_kept():
                return await self._scripts[script](keys=keys, args=list(args))
        except ResponseError as error:
            if str(error).startswith(REFUSAL):
                raise StreamrecError(str(error).removeprefix(REFUSAL)) from None
            raise self._unavailable(error) from error
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        finally:
            if self._metrics is not None:
                self._metrics.redis_seconds.labels(script).observe(time.perf_counter() - started)

    async def ping(self) -> None:
        """Raises RedisUnavailable unless the server answers."""
        await self._call("PING")

    async def get_many(self, keys: list[str]) -> list[bytes | None]:
        """Values of string keys, None where there is none."""
        values: list[bytes | None] = await self._call("MGET", *keys) if keys else []
        return values

    async def members(self, key: str) -> set[str]:
        """Members of a set."""
        return {member.decode(errors="replace") for member in await self._call("SMEMBERS", key)}

    async def hash(self, key: str) -> dict[str, str]:
        """Fields of a hash; none where there is no such key."""
        found = await self._call("HGETALL", key)
        return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}

    async def set(self, key: str, value: bytes, ttl_s: int) -> None:
        """Write a string key."""
        await self._call("SET", key, value, "EX", ttl_s)

    async def memory_bytes(self) -> int:
        """Memory that the server's data take."""
        return int((await self._call("INFO", "memory"))["used_memory"])

    async def notify(self, channel: str, message: str) -> None:
        """Send a message to whoever listens now."""
        await self._call("PUBLISH", channel, message)

    async def lock(self, key: str, holder: str, ttl_ms: int) -> str:
        """Take or keep a lock, or with 0 ms give it back; returns who holds it now."""
        found: bytes = await self.run("lock", [key], [holder, ttl_ms])
        return found.decode(errors="replace")

    async def listen(self, channel: str) -> AsyncIterator[str]:
        """Messages of a channel, for ever.

        Raises:
            RedisUnavailable: the connection was lost.
        """
        try:
            async with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:
                await subscription.subscribe(channel)
                while True:
                    message = await subscription.get_message(timeout=LISTEN_TIMEOUT_S)
                    if message is not None:
                        yield message["data"].decode(errors="replace")
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    async def scan(self, prefix: str) -> AsyncIterator[str]:
        """Names of the keys that begin with a prefix; each once."""
        pattern = "".join(f"[{c}]" if c in "*?[" else c for c in prefix) + "*"
        seen = set()
        try:
            async for key in self._redis.scan_iter(match=pattern, count=SCAN_COUNT):
                if key not in seen:
                    seen.add(key)
                    yield key.decode(errors="replace")
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    async def _call(self, *command: str | bytes | int) -> Any:
        try:
            with _cancellation_kept():
                return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> RedisUnavailable:
        detail = (str(error) or type(error).__name__).rstrip(".")
        if isinstance(error, (RedisConnectionError, OSError)) and not isinstance(error, AuthenticationError):
            detail += "; is STREAMREC_REDIS_URL right, and the server up?"
        return RedisUnavailable(f"Redis at {self._address}: {detail}")


@contextlib.contextmanager
def _cancellation_kept() -> Iterator[None]:
    """redis-py sends within asyncio.wait_for, which loses a cancellation now and then before Python 3.12."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError
