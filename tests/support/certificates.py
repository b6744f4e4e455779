"""Certificates of a CA of its own, and a front that adds TLS to a server that has none."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme
from cryptography.hazmat.primitives import serialization

HOST = "127.0.0.1"


class Certificates:
    """A CA, and the files of certificates that it signed."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self._numbers = itertools.count()
        folder.mkdir()
        self.ca_file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca_file)

    def server(self, *names: str, expired: bool = False, requires_client: bool = False) -> ssl.SSLContext:
        """Return the TLS context of a server with these names."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._signed(names, expired).configure_cert(context)
        if requires_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self._ca.configure_trust(context)
        return context

    def key_store(self, *names: str, expired: bool = False) -> Path:
        """Return key and certificate of a server with these names, as Java reads them."""
        signed = self._signed(names, expired)
        key = serialization.load_pem_private_key(signed.private_key_pem.bytes(), None)
        pkcs8 = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self._folder / f"server-{next(self._numbers)}.pem"
        path.write_bytes(pkcs8 + b"".join(pem.bytes() for pem in signed.cert_chain_pems))
        return path

    def client(self, name: str) -> tuple[Path, Path]:
        """Return certificate and key of a client."""
        signed = self._ca.issue_cert(name)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        signed.cert_chain_pems[0].write_to_path(cert)
        signed.private_key_pem.write_to_path(key)
        return cert, key

    def _signed(self, names: tuple[str, ...], expired: bool) -> trustme.LeafCert:
        until = datetime.now(UTC) - timedelta(days=1) if expired else None
        return self._ca.issue_cert(*(names or (HOST,)), not_after=until)


@contextlib.asynccontextmanager
async def tls_front(port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Terminate TLS in front of a server on a local port; yield the port of the front."""
    handlers: set[asyncio.Task[None]] = set()

    async def connected(*ours: Any) -> None:
        handlers.add(asyncio.current_task())  # type: ignore[arg-type]
        writers = [ours[1]]
        try:
            theirs = await asyncio.open_connection(HOST, port)
            writers.append(theirs[1])
            await _until_either_ends(_copy(ours[0], theirs[1]), _copy(theirs[0], ours[1]))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for writer in writers:
                writer.transport.abort()

    server = await asyncio.start_server(connected, HOST, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()


async def _until_either_ends(*directions: Any) -> None:
    tasks = [asyncio.create_task(direction) for direction in directions]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
