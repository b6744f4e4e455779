"""A broker that is starting: its port is open, but its metadata name no broker yet.

A real one is in this state for a moment only. Requests other than for metadata go to a real broker behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

HOST = "127.0.0.1"
METADATA = 3


class StartingBroker:
    """A front of a broker; when ``starting`` is False, its answers lead clients to the broker itself."""

    def __init__(self, behind: int) -> None:
        self.starting = True
        self.address = ""
        self._behind = behind

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[StartingBroker]:
        server = await asyncio.start_server(self._serve, HOST, 0)
        self.address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_connection(HOST, self._behind)
        with _closing(writer), _closing(broker_writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:  # these clients send a request when the one before is answered
                request = await _frame(reader)
                if int.from_bytes(request[:2]) == METADATA and self.starting:
                    answer = request[4:8] + _no_brokers(request[3])
                else:
                    broker_writer.write(len(request).to_bytes(4) + request)
                    answer = await _frame(broker_reader)
                writer.write(len(answer).to_bytes(4) + answer)
                await writer.drain()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4)))


def _no_brokers(version: int) -> bytes:
    """Return metadata without brokers, cluster id, controller and topics."""
    throttled, cluster_id, controller = bytes(4), b"\xff" * 2, b"\xff" * 4
    return throttled * (version >= 3) + bytes(4) + cluster_id * (version >= 2) + controller * (version >= 1) + bytes(4)


@contextlib.contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    finally:
        writer.transport.abort()
