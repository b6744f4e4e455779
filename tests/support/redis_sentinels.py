"""Start a primary, its replicas and three Sentinels, for tests of failovers."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from streamrec.errors import EmbeddedError
from streamrec.local.process import ServerProcess
from streamrec.local.servers import redis_command, redis_program

from support.redis_cluster import node
from support.waiting import eventually

NAME = "clicks"  # of the primary, as the sentinels know it
SENTINELS = 3


class WatchedServers:
    """A primary, its replicas and three sentinels, on ports of 127.0.0.1.

    Args:
        down_after_ms: the sentinels take a server for down after this time without an answer.
        server_options: more options of the servers.
        sentinel_lines: more lines of the sentinels' configuration.
    """

    def __init__(
        self,
        replicas: int,
        down_after_ms: int = 500,
        server_options: Sequence[str] = (),
        sentinel_lines: Sequence[str] = (),
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="streamrec-sentinel-"))
        self._down_after_ms = down_after_ms
        self._server_options = server_options
        self._sentinel_lines = sentinel_lines
        self.servers = [self._server(number) for number in range(1 + replicas)]  # the first begins as the primary
        self.sentinels = [self._sentinel(number) for number in range(SENTINELS)]

    @property
    def redis_url(self) -> str:
        """URL of the sentinels."""
        return f"redis+sentinel://{self.addresses}/{NAME}/0"

    @property
    def addresses(self) -> str:
        return ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)

    def start(self) -> None:
        for server in self.servers:
            server.start()
        for sentinel in self.sentinels:
            sentinel.start()

    def stop(self) -> None:
        for process in (*self.sentinels, *self.servers):
            process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def wait_watched(self, **login: Any) -> None:
        """Wait until every sentinel knows the others and all replicas: a failover needs both."""

        async def is_watched() -> bool:
            states = [await self.state(number, **login) for number in range(SENTINELS)]
            return all(
                state["num-slaves"] == len(self.servers) - 1 and state["num-other-sentinels"] == SENTINELS - 1
                for state in states
            )

        await eventually(is_watched)

    async def state(self, number: int = 0, **login: Any) -> dict[str, Any]:
        """Return what a sentinel says about the primary."""
        async with redis.Redis(port=self.sentinels[number].port, **login) as client:
            masters: Any = await client.sentinel_masters()
            return dict(masters[NAME])

    async def primary(self) -> ServerProcess:
        """Return the server that the first sentinel calls the primary."""
        port = (await self.state())["port"]
        return next(server for server in self.servers if server.port == port)

    async def wait_failed_over(self, former: ServerProcess) -> ServerProcess:
        """Wait until every sentinel names another primary; return it."""

        async def is_agreed() -> ServerProcess | None:
            ports = {(await self.state(number))["port"] for number in range(SENTINELS)}
            return next((s for s in self.servers if ports == {s.port} and s is not former), None)

        return await eventually(is_agreed)

    async def order_failover(self) -> None:
        """Have the sentinels make a replica the primary, though the primary is up."""
        async with node(self.sentinels[0]) as client:
            await client.execute_command("SENTINEL FAILOVER", NAME)

    def _server(self, number: int) -> ServerProcess:
        folder = self._folder / f"server-{number}"
        folder.mkdir()

        def command(port: int) -> list[str]:
            # after a restart the first one is a primary again, until the sentinels make it a replica
            role = ["--replicaof", "127.0.0.1", str(self.servers[0].port)] if number else []
            return [*redis_command(port, folder), "--repl-diskless-sync-delay", "0", *role, *self._server_options]

        return ServerProcess("Redis", self._folder / f"server-{number}.log", command, _answers)

    def _sentinel(self, number: int) -> ServerProcess:
        folder = self._folder / f"sentinel-{number}"
        folder.mkdir()

        def command(port: int) -> list[str]:
            lines = [
                f"port {port}",
                "bind 127.0.0.1",
                f"dir {folder}",
                f"sentinel monitor {NAME} 127.0.0.1 {self.servers[0].port} 2",
                f"sentinel down-after-milliseconds {NAME} {self._down_after_ms}",
                f"sentinel failover-timeout {NAME} 5000",
                *self._sentinel_lines,
            ]
            configuration = folder / "sentinel.conf"
            if not configuration.exists():  # the sentinel stores its state there
                configuration.write_text("\n".join(lines) + "\n")
            return [redis_program(), str(configuration), "--sentinel"]

        return ServerProcess("Sentinel", self._folder / f"sentinel-{number}.log", command, _answers)


def _answers(connection: Any) -> bool:
    """Return whether a server or sentinel answers, perhaps that it requires a password."""
    connection.sendall(b"PING\r\n")
    return bool(connection.recv(16).startswith((b"+PONG", b"-NOAUTH")))


@contextlib.asynccontextmanager
async def watched(replicas: int = 1, **options: Any) -> AsyncIterator[WatchedServers]:
    """Run the servers and sentinels while the block runs; skip the test if they are not installed."""
    servers = WatchedServers(replicas, **options)
    try:
        servers.start()
    except EmbeddedError as error:
        servers.stop()
        pytest.skip(f"needs servers and sentinels to stop and kill: {error}")
    try:
        await servers.wait_watched()
        yield servers
    finally:
        servers.stop()
