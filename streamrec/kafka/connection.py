"""Connect to Kafka: the options of every client, its start, and errors in words for the operator."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aiokafka import AIOKafkaProducer
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
from aiokafka.protocol.metadata import MetadataRequest

from streamrec.errors import RIGHTS_ARE_LISTED, KafkaRefused, KafkaUnavailable
from streamrec.setting_groups import KafkaSettings
from streamrec.tls import KAFKA, closed_connection_hint, tls_context, tls_problem

# A join may wait longer than this for the other members; the client then repeats it with its member id.
REQUEST_TIMEOUT_MS = 10_000
DIAGNOSIS_TIMEOUT_MS = 5_000
NO_RIGHT = (TopicAuthorizationFailedError, GroupAuthorizationFailedError, ClusterAuthorizationFailedError)


class Client(Protocol):
    """A consumer or a producer of aiokafka."""

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Close."""


def connection_options(kafka: KafkaSettings) -> dict[str, Any]:
    """Return the keyword arguments that every aiokafka client takes.

    Raises:
        SettingsError: a certificate or key cannot be read.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers.split(","),
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        # a topic that another process has just created is found within seconds, not minutes
        "metadata_max_age_ms": 30_000,
    }
    if kafka.security_protocol.startswith("SASL"):
        assert kafka.sasl_password is not None
        options |= {
            "sasl_mechanism": kafka.sasl_mechanism,
            "sasl_plain_username": kafka.sasl_username,
            "sasl_plain_password": kafka.sasl_password.get_secret_value(),
        }
    if kafka.uses_tls:
        options["ssl_context"] = tls_context(kafka.tls, KAFKA)
    return options


async def start_client(kafka: KafkaSettings, client: Client) -> None:
    """Start a client; close it if it cannot be started.

    Raises:
        KafkaUnavailable: no broker answers, or it refuses the connection.
    """
    try:
        await client.start()
        check_brokers(kafka, client)
    except BaseException as error:  # a cancellation too, or its connections would stay open
        await client.stop()
        if isinstance(error, (KafkaError, OSError)):
            raise kafka_error(kafka, error) from error
        raise


def check_brokers(kafka: KafkaSettings, client: Any) -> None:
    """Raise KafkaUnavailable if a started client knows no broker: without this connection it would never find one."""
    known = client.client if isinstance(client, AIOKafkaProducer) else client._client
    if not known.cluster.brokers():
        raise KafkaUnavailable(f"Kafka at {kafka.bootstrap_servers} is still starting: it names no broker")


def kafka_error(kafka: KafkaSettings, error: Exception) -> KafkaUnavailable:
    """Return a Kafka error in words for the operator."""
    servers = kafka.bootstrap_servers
    if isinstance(error, KafkaConnectionError):
        return KafkaUnavailable(
            f"Kafka at {servers} cannot be reached; is STREAMREC_KAFKA_BOOTSTRAP_SERVERS right, and the broker up?"
        )
    if isinstance(error, TimeoutError):
        return KafkaUnavailable(f"Kafka at {servers} does not answer")
    detail = str(error) or type(error).__name__
    if isinstance(error, NO_RIGHT):
        return KafkaRefused(f"Kafka at {servers}: {detail} ({RIGHTS_ARE_LISTED})")
    return KafkaUnavailable(f"Kafka at {servers}: {detail}")


async def diagnose(kafka: KafkaSettings, error: Exception) -> KafkaUnavailable:
    """Connect once more to find out why the brokers refuse, which the client does not report; return the error."""
    if isinstance(error, NO_RIGHT):
        return kafka_error(kafka, error)
    options = connection_options(kafka) | {"request_timeout_ms": DIAGNOSIS_TIMEOUT_MS}
    del options["metadata_max_age_ms"]
    for host, port, _ in collect_hosts(options.pop("bootstrap_servers")):
        try:
            connection = await create_conn(host, port, **options)
            try:
                await connection.send(MetadataRequest([]))  # a broker that requires SASL is silent before it
            finally:
                connection.close()
        except (KafkaError, OSError, ValueError) as refusal:
            address = f"Kafka at {host}:{port}"
            reason = _reason(kafka, refusal)
            if reason:
                return KafkaRefused(f"{address}: {reason}")
            hint = _closed_hint(kafka, refusal)
            if hint:
                return KafkaUnavailable(f"{address}: {hint}")
    return kafka_error(kafka, error)


def _reason(kafka: KafkaSettings, error: Exception) -> str | None:
    """Return why a broker refuses the connection, and what to do; None if it does not say that it refuses."""
    problem = tls_problem(error, KAFKA)
    if problem:
        return problem + ("; see STREAMREC_KAFKA_SECURITY_PROTOCOL" if "speaks no TLS" in problem else "")
    mechanism = kafka.sasl_mechanism
    if isinstance(error, UnsupportedSaslMechanismError):
        return f"it does not support SASL mechanism {mechanism}: set STREAMREC_KAFKA_SASL_MECHANISM to one it supports"
    if isinstance(error, SaslAuthenticationFailed):
        return (
            f"it refuses user {kafka.sasl_username} or the password, by {mechanism}: set "
            "STREAMREC_KAFKA_SASL_USERNAME and STREAMREC_KAFKA_SASL_PASSWORD, or ..._PASSWORD_FILE"
        )
    if isinstance(error, IllegalSaslStateError):
        return "it uses no SASL on this port: set STREAMREC_KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SSL"
    return None


def _closed_hint(kafka: KafkaSettings, error: Exception) -> str | None:
    """Return the likely cause if a broker closed the connection, which one that starts or stops does too."""
    hint = "" if isinstance(error, TimeoutError) else closed_connection_hint(error, KAFKA, kafka.uses_tls, kafka.tls)
    if hint and not kafka.security_protocol.startswith("SASL"):
        hint = hint.replace("?", ", or SASL?")
    return f"it closes the connection{hint} See STREAMREC_KAFKA_SECURITY_PROTOCOL" if hint else None


def ignore_abandoned_requests(loop: asyncio.AbstractEventLoop) -> None:
    """Do not log Kafka errors of requests whose caller has stopped waiting, such as a commit that was cut short."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), KafkaError):
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
