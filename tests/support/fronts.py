"""Proxies in front of the embedded servers that add TLS and SASL, which those servers do not support.

A front is as strict as a real server: OpenSSL verifies certificates, and SCRAM follows RFC 5802.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import trustme
from aiokafka.protocol.types import Array, Bytes, Int16, Schema, String

HOST = "127.0.0.1"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Certificates:
    """A CA, and the files of certificates that it signed."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        folder.mkdir()
        self.ca_file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca_file)

    def server(self, *names: str, expired: bool = False, requires_client: bool = False) -> ssl.SSLContext:
        """Return the TLS context of a server with these names."""
        until = datetime.now(UTC) - timedelta(days=1) if expired else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*(names or (HOST,)), not_after=until).configure_cert(context)
        if requires_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self._ca.configure_trust(context)
        return context

    def client(self, name: str) -> tuple[Path, Path]:
        """Return certificate and key of a client."""
        signed = self._ca.issue_cert(name)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        signed.cert_chain_pems[0].write_to_path(cert)
        signed.private_key_pem.write_to_path(key)
        return cert, key


@contextlib.asynccontextmanager
async def tls_front(port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Terminate TLS in front of a server on a local port; yield the port of the front."""

    async def serve(ours: Streams, theirs: Streams) -> None:
        await _until_either_ends(_copy(ours[0], theirs[1]), _copy(theirs[0], ours[1]))

    async with _before(port, context, serve) as own_port:
        yield own_port


@dataclass
class KafkaFront:
    """A front of a broker: TLS if it has a context, SASL if it has users. It records which requests clients send.

    Args:
        users: passwords by name; a client must log in as one of them.
        may_create: False: refuse to create topics, as without an ACL.
        may_join: False: refuse to find the group coordinator, as without an ACL.
        starting: name no broker in the metadata, as a broker before it is part of its cluster.
    """

    behind: int
    tls: ssl.SSLContext | None = None
    mechanism: str = ""
    users: Mapping[str, str] = field(default_factory=dict)
    may_create: bool = True
    may_join: bool = True
    starting: bool = False
    port: int = 0
    requested: set[int] = field(default_factory=set)  # API keys of requests that reached the broker
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[KafkaFront]:
        async with _before(self.behind, self.tls, self._serve) as self.port:
            yield self

    def hang_up(self) -> None:
        """Close every connection, as a broker does at its restart."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    async def _serve(self, ours: Streams, theirs: Streams) -> None:
        self._writers.append(ours[1])
        await _until_either_ends(self._requests(*ours, theirs[1]), self._answers(theirs[0], ours[1]))

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, broker: asyncio.StreamWriter
    ) -> None:
        login = Scram(self.mechanism, self.users) if self.mechanism.startswith("SCRAM") else Plain(self.users)
        while True:
            frame = await _frame(reader)
            key, correlation = int.from_bytes(frame[:2]), frame[4:8]
            if key == SASL_HANDSHAKE:
                body = self._handshake(_string(frame[_header_end(frame) :]))
            elif key == SASL_AUTHENTICATE:
                body = login.answer(Bytes.decode(BytesIO(frame[_header_end(frame) :])))
                body += b"" if frame[3] == 0 else SESSION_LASTS
            elif self.users and not login.done and key != API_VERSIONS:
                return  # close the connection, as a broker does
            elif key == CREATE_TOPICS and not self.may_create:
                body = self._no_topic(frame)
            elif key == FIND_COORDINATOR and not self.may_join:
                body = NO_GROUP if frame[3] == 0 else bytes(4) + NO_GROUP[:2] + b"\xff\xff" + NO_GROUP[2:]
            elif key == METADATA and self.starting:
                body = _no_brokers(frame[3])
            else:
                self.requested.add(key)
                broker.write(len(frame).to_bytes(4) + frame)
                await broker.drain()
                continue
            writer.write((len(body) + 4).to_bytes(4) + correlation + body)
            await writer.drain()

    def _handshake(self, mechanism: str) -> bytes:
        if not self.users:
            return HANDSHAKE.encode((ILLEGAL_STATE, []))
        return HANDSHAKE.encode((0 if mechanism == self.mechanism else UNSUPPORTED_MECHANISM, [self.mechanism]))

    @staticmethod
    def _no_topic(frame: bytes) -> bytes:
        throttled = bytes(4) if frame[3] >= 2 else b""
        topic = _string(frame[_header_end(frame) + 4 :])
        return throttled + NO_TOPICS.encode(([(topic, TOPIC_AUTHORIZATION_FAILED, "Authorization failed.")],))

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = ((len(HOST)).to_bytes(2) + HOST.encode() + port.to_bytes(4) for port in (self.behind, self.port))
        while True:
            # the metadata contain the address of the broker, to which clients would connect next
            frame = (await _frame(reader)).replace(theirs, ours)
            writer.write(len(frame).to_bytes(4) + frame)
            await writer.drain()


METADATA, FIND_COORDINATOR = 3, 10
API_VERSIONS, SASL_HANDSHAKE, SASL_AUTHENTICATE, CREATE_TOPICS = 18, 17, 36, 19
TOPIC_AUTHORIZATION_FAILED, UNSUPPORTED_MECHANISM, ILLEGAL_STATE, AUTHENTICATION_FAILED = 29, 33, 34, 58
SESSION_LASTS = bytes(8)  # milliseconds; 0: without end
HANDSHAKE = Schema(("error", Int16), ("mechanisms", Array(String("utf-8"))))
NO_TOPICS = Schema(("topics", Array(("topic", String("utf-8")), ("error", Int16), ("message", String("utf-8")))))
# GROUP_AUTHORIZATION_FAILED and an empty broker; since version 1 also a throttle time and a message
NO_GROUP = (30).to_bytes(2) + b"\xff" * 4 + bytes(2) + b"\xff" * 4
AUTHENTICATE = Schema(("error", Int16), ("message", String("utf-8")), ("bytes", Bytes))


class Plain:
    """The broker's side of RFC 4616."""

    def __init__(self, users: Mapping[str, str]) -> None:
        self._users = users
        self.done = False

    def answer(self, message: bytes) -> bytes:
        _, user, password = message.decode().split("\0")
        self.done = self._users.get(user) == password
        return AUTHENTICATE.encode((0, None, b"") if self.done else REFUSED)


class Scram:
    """The broker's side of RFC 5802."""

    def __init__(self, mechanism: str, users: Mapping[str, str]) -> None:
        self._hash = mechanism.removeprefix("SCRAM-").replace("-", "").lower()
        self._users = users
        self._first = ""
        self.done = False

    def answer(self, message: bytes) -> bytes:
        text = message.decode()
        if not self._first:
            bare = text.removeprefix("n,,")
            fields = dict(part.split("=", 1) for part in bare.split(","))
            self._user, self._nonce = fields["n"].replace("=2C", ",").replace("=3D", "="), fields["r"] + "broker"
            first = f"r={self._nonce},s={base64.b64encode(b'salt').decode()},i=4096"
            self._first = f"{bare},{first}"
            return AUTHENTICATE.encode((0, None, first.encode()))
        unproven, _, proof = text.rpartition(",p=")
        signed = f"{self._first},{unproven}".encode()
        password = self._users.get(self._user, "no password").encode()
        salted = hashlib.pbkdf2_hmac(self._hash, password, b"salt", 4096)
        client_key = self._hmac(salted, b"Client Key")
        signature = self._hmac(hashlib.new(self._hash, client_key).digest(), signed)
        right = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        self.done = self._user in self._users and base64.b64decode(proof) == right
        verifier = base64.b64encode(self._hmac(self._hmac(salted, b"Server Key"), signed))
        return AUTHENTICATE.encode((0, None, b"v=" + verifier) if self.done else REFUSED)

    def _hmac(self, key: bytes, message: bytes) -> bytes:
        return hmac.new(key, message, self._hash).digest()


# Apache Kafka's answer to a wrong password and to an unknown user
REFUSED = (AUTHENTICATION_FAILED, "Authentication failed during authentication due to invalid credentials", b"")


async def _frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4)))


def _no_brokers(version: int) -> bytes:
    """Return metadata without brokers, cluster id, controller and topics."""
    throttled, cluster_id, controller = bytes(4), b"\xff" * 2, b"\xff" * 4
    return throttled * (version >= 3) + bytes(4) + cluster_id * (version >= 2) + controller * (version >= 1) + bytes(4)


def _header_end(frame: bytes) -> int:
    """Return where the body of a request begins: after API key, version, correlation id and client id."""
    return 10 + max(0, int.from_bytes(frame[8:10], signed=True))


def _string(data: bytes) -> str:
    return data[2 : 2 + int.from_bytes(data[:2])].decode()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()


async def _until_either_ends(*directions: Coroutine[Any, Any, None]) -> None:
    tasks = [asyncio.create_task(direction) for direction in directions]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _before(
    port: int, context: ssl.SSLContext | None, serve: Callable[[Streams, Streams], Awaitable[None]]
) -> AsyncIterator[int]:
    """Listen on a free port; open a connection to the server for each client that connects."""
    handlers: set[asyncio.Task[None]] = set()

    async def connected(*ours: Any) -> None:
        handlers.add(asyncio.current_task())  # type: ignore[arg-type]
        writers = [ours[1]]
        try:
            theirs = await asyncio.open_connection(HOST, port)
            writers.append(theirs[1])
            await serve(ours, theirs)
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
