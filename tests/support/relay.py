"""An address that leads to another server later, as a name or a load balancer does."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamrec.errors import EmbeddedError
from streamrec.local.process import ServerProcess
from streamrec.local.servers import answers_ping, redis_command

from support.redis_cluster import node
from support.waiting import eventually


class Relay:
    """Forwards a port to the server that it leads to now; open connections stay where they are, as with a name."""

    def __init__(self, server: ServerProcess) -> None:
        self.leads_to = server
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._front = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port: int = self._front.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._front.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            theirs = await asyncio.open_connection("127.0.0.1", self.leads_to.port)
            await asyncio.gather(_copied(reader, theirs[1]), _copied(theirs[0], writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


@contextlib.contextmanager
def two_servers() -> Iterator[list[ServerProcess]]:
    """Start two single servers; skip the test if none is installed."""
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, contextlib.ExitStack() as stack:
        servers = []
        for name in ("primary", "replica"):
            data = Path(folder) / name
            data.mkdir()
            server = ServerProcess(
                "Redis", data / "log", lambda port, data=data: redis_command(port, data), answers_ping
            )
            try:
                server.start()
            except EmbeddedError as error:
                pytest.skip(f"needs Redis servers of its own: {error}")
            stack.callback(server.kill)
            servers.append(server)
        yield servers


async def replicate(replica: ServerProcess, primary: ServerProcess) -> None:
    async with node(replica) as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", primary.port)
        await eventually(lambda: is_linked(replica))


async def is_linked(replica: ServerProcess) -> bool:
    async with node(replica) as client:
        return bool((await client.info("replication")).get("master_link_status") == "up")


async def switch(relay: Relay, former: ServerProcess, new: ServerProcess) -> None:
    """Let primary and replica change places without a loss, and then lead the name to the new primary."""
    async with node(former) as client:
        await client.execute_command("FAILOVER", "TO", "127.0.0.1", new.port)
    await eventually(lambda: is_linked(former))
    relay.leads_to = new
