"""An address that leads to another server later, as a name or a load balancer does."""

from __future__ import annotations

import asyncio
import contextlib

from streamrec.local.process import ServerProcess


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
        with contextlib.suppress(OSError, asyncio.CancelledError):
            theirs = await asyncio.open_connection("127.0.0.1", self.leads_to.port)
            await asyncio.gather(_copied(reader, theirs[1]), _copied(theirs[0], writer))


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
