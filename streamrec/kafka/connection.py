"""Kafka connection options, topics, and the producer of dead letters and replays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.admin import DescribeGroupsRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.protocol.metadata import MetadataRequest

from streamrec.errors import RIGHTS_ARE_LISTED, KafkaUnavailable
from streamrec.schemas import DeadLetter
from streamrec.settings import Settings
from streamrec.tls import hung_up_hint, tls_context, tls_problem

TOPIC_ALREADY_EXISTS, TOPIC_AUTHORIZATION_FAILED, CLUSTER_AUTHORIZATION_FAILED = 36, 29, 31
# Kafka's default limit of a record is 1 MiB; the rest of a longer dead letter stays at its origin.
MAX_DEAD_LETTER_BYTES = 900_000
# Joins wait for the whole group, possibly longer than this: they are then sent again, under the same member id.
REQUEST_TIMEOUT_MS = 10_000
DISMISSAL_TIMEOUT_S = 5.0
LOOK_TIMEOUT_MS = 5_000
EMPTY_FETCH_S = 0.002
NO_RIGHT = (TopicAuthorizationFailedError, GroupAuthorizationFailedError, ClusterAuthorizationFailedError)


def connection_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments that every aiokafka client takes.

    Raises:
        SettingsError: a certificate or key cannot be read.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "security_protocol": settings.kafka_security_protocol,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        # a topic that another process has just made is seen within seconds, not minutes
        "metadata_max_age_ms": 30_000,
    }
    if settings.kafka_security_protocol.startswith("SASL"):
        assert settings.kafka_sasl_password is not None
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            "sasl_plain_password": settings.kafka_sasl_password.get_secret_value(),
        }
    if settings.kafka_security_protocol.endswith("SSL"):
        options["ssl_context"] = tls_context(settings, "kafka")
    return options


def unavailable(settings: Settings, error: Exception) -> KafkaUnavailable:
    """A Kafka error in words for the operator."""
    servers = settings.kafka_bootstrap_servers
    if isinstance(error, KafkaConnectionError):
        return KafkaUnavailable(
            f"Kafka at {servers} cannot be reached; is STREAMREC_KAFKA_BOOTSTRAP_SERVERS right, and the broker up?"
        )
    if isinstance(error, TimeoutError):
        return KafkaUnavailable(f"Kafka at {servers} does not answer")
    detail = str(error) or type(error).__name__
    if isinstance(error, NO_RIGHT):
        detail += f" ({RIGHTS_ARE_LISTED})"
    return KafkaUnavailable(f"Kafka at {servers}: {detail}")


async def explained(settings: Settings, error: Exception) -> KafkaUnavailable:
    """The same after a look at why no broker will have us: the client swallows what it is told."""
    if isinstance(error, NO_RIGHT):
        return unavailable(settings, error)
    options = connection_options(settings) | {"request_timeout_ms": LOOK_TIMEOUT_MS}
    del options["metadata_max_age_ms"]
    for host, port, _ in collect_hosts(options.pop("bootstrap_servers")):
        try:
            connection = await create_conn(host, port, **options)
            try:
                await connection.send(MetadataRequest([]))  # before it, a broker that wants SASL says nothing
            finally:
                connection.close()
        except (KafkaError, OSError, ValueError) as refusal:
            why = _why_refused(settings, refusal)
            if why:
                return KafkaUnavailable(f"Kafka at {host}:{port}: {why}")
    return unavailable(settings, error)


def _why_refused(settings: Settings, error: Exception) -> str | None:
    """What a broker has against this connection, and what to do; None where it is just not there."""
    problem = tls_problem(error, "kafka")
    if problem:
        return problem + ("; see STREAMREC_KAFKA_SECURITY_PROTOCOL" if "speaks no TLS" in problem else "")
    mechanism = settings.kafka_sasl_mechanism
    if isinstance(error, UnsupportedSaslMechanismError):
        return f"it does not take SASL mechanism {mechanism}: set STREAMREC_KAFKA_SASL_MECHANISM to one that it takes"
    if isinstance(error, SaslAuthenticationFailed):
        return (
            f"it refuses user {settings.kafka_sasl_username} or the password, by {mechanism}: set "
            "STREAMREC_KAFKA_SASL_USERNAME and STREAMREC_KAFKA_SASL_PASSWORD, or ..._PASSWORD_FILE"
        )
    if isinstance(error, IllegalSaslStateError):
        return "it asks for no SASL on this port: set STREAMREC_KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SSL"
    hint = "" if isinstance(error, TimeoutError) else hung_up_hint(error, settings, "kafka")
    if hint and not settings.kafka_security_protocol.startswith("SASL"):
        hint = hint.replace("?", ", or SASL?")
    return f"it hangs up{hint} See STREAMREC_KAFKA_SECURITY_PROTOCOL" if hint else None


def ignore_abandoned_requests(loop: asyncio.AbstractEventLoop) -> None:
    """Errors of requests that nobody waits for any more, as when a commit was cut short, are no news."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), KafkaError):
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)


async def ensure_topics(settings: Settings, topics: Iterable[str]) -> list[str]:
    """Create the topics that do not exist; returns their names.

    Raises:
        KafkaUnavailable: the brokers cannot be reached, or refuse.
    """
    admin = AIOKafkaAdminClient(**connection_options(settings))
    try:
        await admin.start()
        existing = set(await admin.list_topics())
        missing = [topic for topic in topics if topic not in existing]
        if not missing:
            return []
        response = await admin.create_topics(
            [NewTopic(topic, settings.kafka_partitions, settings.kafka_replication_factor) for topic in missing]
        )
        for topic, code, message in response.topic_errors:
            if code in (TOPIC_AUTHORIZATION_FAILED, CLUSTER_AUTHORIZATION_FAILED):
                raise KafkaUnavailable(
                    f"topic {topic} is not there, or may not be seen, and may not be created: create it, and allow "
                    f"Describe on it ({RIGHTS_ARE_LISTED})"
                )
            if code not in (0, TOPIC_ALREADY_EXISTS):
                raise KafkaUnavailable(f"Kafka refuses to create topic {topic}: {message} (error {code})")
        return missing
    except (KafkaError, OSError) as error:
        raise await explained(settings, error) from error
    finally:
        await admin.close()


def pause_after_empty_fetches(consumer: AIOKafkaConsumer) -> None:
    """Ask a broker that has nothing new and says so at once no more than every EMPTY_FETCH_S.

    Kafka answers an empty fetch only after ``fetch_max_wait_ms``. Some brokers, the embedded one among them, do not
    wait, and aiokafka then asks thousands of times a second: a core of ours, and one of theirs.
    """
    fetch = consumer._fetcher._proc_fetch_request

    async def fetch_patiently(*request: Any) -> bool:
        asked_s = time.monotonic()
        found: bool = await fetch(*request)
        if not found and time.monotonic() - asked_s < EMPTY_FETCH_S:
            with contextlib.suppress(asyncio.CancelledError):  # as the client's own does: it waits for it to end
                await asyncio.sleep(EMPTY_FETCH_S)
        return found

    consumer._fetcher._proc_fetch_request = fetch_patiently


class Producer:
    """Writes records, acknowledged by all replicas.

    Args:
        idempotent: a retry inside the client never doubles a record. Off, a producer outlives brokers that
            forget what it sent, where an idempotent one of aiokafka fails for good.
        told: is called with each dead letter that was acknowledged.
    """

    def __init__(
        self, settings: Settings, idempotent: bool = True, told: Callable[[DeadLetter], None] = lambda _: None
    ) -> None:
        self._settings = settings
        self._told = told
        self._producer = AIOKafkaProducer(
            **connection_options(settings),
            acks="all",
            enable_idempotence=idempotent,
            max_request_size=2**20,
            linger_ms=2,
        )

    async def start(self) -> None:
        """Raises KafkaUnavailable where no broker answers."""
        try:
            await self._producer.start()
        except BaseException as error:  # Ctrl-C too, or its connections would be left open
            await self._producer.stop()
            if isinstance(error, (KafkaError, OSError)):
                raise unavailable(self._settings, error) from error
            raise

    async def stop(self) -> None:
        """Wait for what was sent, and close."""
        await self._producer.stop()

    async def send(self, topic: str, key: bytes, value: bytes) -> Any:
        """Queue a record; returns the future of its acknowledgement."""
        try:
            return await self._producer.send(topic, value, key=key)
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings, error) from error

    async def settle(self, sent: Iterable[Any]) -> None:
        """Wait until everything queued is acknowledged.

        Args:
            sent: what ``send`` returned.

        Raises:
            KafkaUnavailable: a record was not.
        """
        try:
            await self._producer.flush()
            for acknowledgement in sent:
                await acknowledgement
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings, error) from error

    async def send_dead_letters(self, letters: Collection[DeadLetter]) -> None:
        """Write dead letters with their origin and reason in headers; returns once all are acknowledged.

        Raises:
            KafkaUnavailable: one was not; send all again (dead letters may then stand twice).
        """
        try:
            await asyncio.gather(*[await self._send_dead_letter(letter) for letter in letters])
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings, error) from error
        for letter in letters:
            self._told(letter)

    async def _send_dead_letter(self, letter: DeadLetter) -> Any:
        headers = {
            "streamrec.reason": letter.reason,
            "streamrec.topic": letter.topic,
            "streamrec.partition": str(letter.partition),
            "streamrec.offset": str(letter.offset),
            "streamrec.timestamp_ms": str(letter.timestamp_ms),
        }
        value, key = letter.value, letter.key
        if len(value or b"") + len(key or b"") > MAX_DEAD_LETTER_BYTES:
            headers["streamrec.cut_from_bytes"] = str(len(value or b""))
            key = key[:1024] if key else key
            value = value[: MAX_DEAD_LETTER_BYTES - 1024] if value else value
        return await self._producer.send(
            self._settings.kafka_dead_letters,
            value,
            key=key,
            headers=[(name, text[:1000].encode(errors="replace")) for name, text in headers.items()],
        )


def member_name() -> str:
    """A new client id for a group member of this process: it tells on which machine which process runs."""
    return f"{_member_prefix()}{os.getpid()}-{os.urandom(3).hex()}"


async def leave_for_members(settings: Settings, own: str = "") -> int:
    """Say goodbye to the group for daemons of this machine that died without doing so; returns how many.

    Else whoever joins next waits for them until the session time-out, and with the embedded broker, which
    knows none, for ever. A help, not a need: where the broker does not allow it, nothing happens.

    Args:
        own: the client id of a member of this process that has lost its membership, or gives it up.
    """
    group = settings.kafka_group
    client = AIOKafkaClient(**connection_options(settings))
    try:
        async with asyncio.timeout(DISMISSAL_TIMEOUT_S):
            await client.bootstrap()
            node = await client.coordinator_lookup(CoordinationType.GROUP, group)
            if not await client.ready(node, group=ConnectionGroup.COORDINATION):
                return 0
            described = await client.send(node, DescribeGroupsRequest([group]), group=ConnectionGroup.COORDINATION)
            members = [member for _, _, _, _, _, members, *_ in described.groups for member in members]
            dead = [member_id for member_id, client_id, *_ in members if client_id == own or _died(client_id)]
            for member_id in dead:
                await client.send(node, LeaveGroupRequest(group, member_id), group=ConnectionGroup.COORDINATION)
            return len(dead)
    except (KafkaError, OSError, TimeoutError):
        return 0
    finally:
        await client.close()


def _member_prefix() -> str:
    # process ids mean something only within their namespace: containers may share a host's name
    namespace = Path("/proc/self/ns/pid")
    return f"streamrec-{socket.gethostname()}-{namespace.stat().st_ino if namespace.exists() else 0}-"


def _died(client_id: str) -> bool:
    """Whether this is the name of a process of this machine that is no more."""
    prefix = _member_prefix()
    pid = client_id.removeprefix(prefix).partition("-")[0]
    if not client_id.startswith(prefix) or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # dead, its parent not told
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False


async def topic_partitions(settings: Settings, topics: Iterable[str]) -> dict[str, int]:
    """Partitions of each topic, 0 for one that does not exist.

    Raises:
        KafkaUnavailable: the brokers cannot be reached, or refuse.
    """
    admin = AIOKafkaAdminClient(**connection_options(settings))
    try:
        await admin.start()
        # asking about a topic by name may create it, so only those that exist are asked about
        existing = set(await admin.list_topics())
        known = [topic for topic in topics if topic in existing]
        described = await admin.describe_topics(known) if known else []
        counts = {topic["topic"]: len(topic["partitions"]) for topic in described}
        return {topic: counts.get(topic, 0) for topic in topics}
    except (KafkaError, OSError) as error:
        raise await explained(settings, error) from error
    finally:
        await admin.close()
