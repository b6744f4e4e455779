"""Connect to Kafka: the options of every client, its start, and errors in words for the operator."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    BrokerResponseError,
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    RequestTimedOutError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
    kafka_errors,
)
from aiokafka.protocol.metadata import MetadataRequest

from streamrec.errors import RIGHTS_ARE_LISTED, KafkaForbidden, KafkaRefused, KafkaUnavailable, SettingsError
from streamrec.kafka.tokens import NoToken, TokenRefused, token_provider
from streamrec.setting_groups import KafkaSettings
from streamrec.tls import KAFKA, closed_connection_hint, tls_context, tls_problem

# A join may wait longer than this for the other members; the client then repeats it with its member id.
REQUEST_TIMEOUT_MS = 10_000
DIAGNOSIS_TIMEOUT_MS = 5_000
BROKER_TIMEOUT_S = 5.0  # of one step of a running client, which would otherwise try for ever
# mechanisms that log in with a token, and why a broker refuses one
TOKEN_HINTS = {
    "OAUTHBEARER": "see issuer, audience and claims that it requires, and STREAMREC_KAFKA_OAUTH_SCOPE",
    "AWS_MSK_IAM": "allow kafka-cluster:Connect in the identity's IAM policy, and see STREAMREC_KAFKA_AWS_REGION",
}
# Codes of brokers after which a new try may succeed, though aiokafka does not call them retriable: an unknown error, a
# damaged request, a broker or replica that starts, a network error, a rebalance (22, 25, 27), a login that an operator
# may correct (33, 34, 58).
PASSING = {-1, 2, 8, 9, 11, 13, 22, 25, 27, 33, 34, 58}
# what a broker refuses for good, and what to do; aiokafka reports some of these only as part of a text
SETTING_REFUSED = {
    "FencedInstanceIdError": "another daemon joined under the same name: give each its own "
    "STREAMREC_KAFKA_GROUP_INSTANCE_ID",
    "GroupMaxSizeReachedError": "the group is full (group.max.size of the brokers)",
    "InvalidSessionTimeoutError": "set STREAMREC_KAFKA_SESSION_TIMEOUT_S within group.min.session.timeout.ms and "
    "group.max.session.timeout.ms of the brokers",
    "InconsistentGroupProtocolError": "another program is in the group: set another STREAMREC_KAFKA_GROUP",
}
NO_RIGHT = (TopicAuthorizationFailedError, GroupAuthorizationFailedError, ClusterAuthorizationFailedError)


class FencedInstanceIdError(BrokerResponseError):  # type: ignore[misc]
    """Another member has joined with this static name."""

    errno, message = 82, "FENCED_INSTANCE_ID"


class GroupMaxSizeReachedError(BrokerResponseError):  # type: ignore[misc]
    """The group has as many members as the brokers allow."""

    errno, message = 81, "GROUP_MAX_SIZE_REACHED"


class InvalidRecordError(BrokerResponseError):  # type: ignore[misc]
    """A broker refuses a record: its topic is compacted, and the record has no key."""

    errno, message = 87, "INVALID_RECORD"


# aiokafka 0.14 reports these as unknown errors
kafka_errors.update(
    {error.errno: error for error in (FencedInstanceIdError, GroupMaxSizeReachedError, InvalidRecordError)}
)


class Client(Protocol):
    """A consumer or a producer of aiokafka."""

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Close."""


def connection_options(kafka: KafkaSettings) -> dict[str, Any]:
    """Return the keyword arguments that every aiokafka client takes.

    Raises:
        SettingsError: a certificate or key cannot be read, or what the mechanism needs is missing.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers.split(","),
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        # a topic that another process has just created is found within seconds, not minutes
        "metadata_max_age_ms": 30_000,
    }
    if kafka.uses_sasl and kafka.sasl_mechanism in TOKEN_HINTS:
        options |= {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_provider": token_provider(kafka)}
    elif kafka.uses_sasl:
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
        KafkaForbidden: a right is missing.
    """
    try:
        await client.start()
        check_brokers(client_of(client))
    except BaseException as error:  # a cancellation too, or its connections would stay open
        await client.stop()
        if isinstance(error, (KafkaError, OSError)):
            raise await diagnose(kafka, error) from error
        raise


def client_of(client: Client) -> AIOKafkaClient:
    """Return the connections of a consumer or producer."""
    return client.client if isinstance(client, AIOKafkaProducer) else vars(client)["_client"]


class NoBroker(KafkaError):  # type: ignore[misc]
    """The metadata name no broker: it is still starting, or refuses a token."""


def check_brokers(client: AIOKafkaClient) -> None:
    """Raise NoBroker if a started client knows no broker: without this connection it would never find one."""
    if not client.cluster.brokers():
        raise NoBroker


def kafka_error(kafka: KafkaSettings, error: Exception) -> KafkaUnavailable | KafkaForbidden:
    """Return a Kafka error in words for the operator."""
    servers = kafka.bootstrap_servers
    if isinstance(error, NO_RIGHT):
        return KafkaForbidden(f"Kafka at {servers} refuses a right {_object_of(error)} ({RIGHTS_ARE_LISTED})")
    if isinstance(error, KafkaConnectionError):
        return KafkaUnavailable(
            f"Kafka at {servers} cannot be reached; is STREAMREC_KAFKA_BOOTSTRAP_SERVERS right, and the broker up?"
        )
    if isinstance(error, NoBroker):
        return KafkaUnavailable(f"Kafka at {servers} is still starting: it names no broker")
    if isinstance(error, TimeoutError):
        return KafkaUnavailable(f"Kafka at {servers} does not answer")
    for name, remedy in SETTING_REFUSED.items():
        if name in f"{error!r}":
            return KafkaForbidden(f"Kafka at {servers} refuses this member: {remedy}")
    if isinstance(error, BrokerResponseError) and not error.retriable and error.errno not in PASSING:
        return KafkaForbidden(f"Kafka at {servers} refuses for good: {error}")
    return KafkaUnavailable(f"Kafka at {servers}: {str(error) or type(error).__name__}")


def _object_of(error: KafkaError) -> str:
    """Return on what a right is missing."""
    if isinstance(error, ClusterAuthorizationFailedError):  # the answer to a producer that may not write anywhere
        return "to write to the topic, or Kafka before 2.8 IdempotentWrite"
    found = error.args[0] if error.args and isinstance(error.args[0], set) else set(error.args)
    names = sorted(name.topic if isinstance(name, TopicPartition) else str(name) for name in found)
    return f"on {'group' if isinstance(error, GroupAuthorizationFailedError) else 'topic'} {', '.join(names)}"


async def diagnose(kafka: KafkaSettings, error: Exception) -> KafkaUnavailable | KafkaForbidden:
    """Connect once more to find out why the brokers refuse, which the client does not report; return the error."""
    if isinstance(error, NO_RIGHT):
        return kafka_error(kafka, error)
    try:
        options = connection_options(kafka) | {"request_timeout_ms": DIAGNOSIS_TIMEOUT_MS}
    except SettingsError as problem:  # a file is being replaced: the watch task and the batch must outlive that
        return KafkaUnavailable(f"{kafka_error(kafka, error)}; {problem}")
    del options["metadata_max_age_ms"]
    for host, port, _ in collect_hosts(options.pop("bootstrap_servers")):
        address = f"Kafka at {host}:{port}"
        try:
            reason = await _refusal(kafka, host, port, options)
        except NoToken as refusal:
            return (KafkaRefused if isinstance(refusal, TokenRefused) else KafkaUnavailable)(str(refusal))
        except (KafkaError, OSError, ValueError) as refusal:
            reason = _reason(kafka, refusal)
            if reason:
                return KafkaRefused(f"{address}: {reason}")
            reason = _closed_hint(kafka, refusal)
        else:
            if not reason and isinstance(error, (TimeoutError, RequestTimedOutError)):
                reason = (
                    "it answers a new connection, but not ours; does a quota slow this client down, or does another "
                    "broker not answer?"
                )
        if reason:  # a broker that starts looks the same
            return KafkaUnavailable(f"{address}: {reason}")
    return kafka_error(kafka, error)


async def _refusal(kafka: KafkaSettings, host: str, port: int, options: dict[str, Any]) -> str | None:
    """Connect to a broker; return why it refuses a token, which it reports by no error; None if it does not.

    It refuses a token by an answer that the client does not read, so that the next request fails instead: the broker
    answers without naming itself, or closes the connection.
    """
    connection = await create_conn(host, port, **options)
    takes_token = kafka.uses_sasl and kafka.sasl_mechanism in TOKEN_HINTS
    try:
        # a broker that requires SASL is silent before this request
        refused = not (await connection.send(MetadataRequest([]))).brokers
    except KafkaConnectionError:
        if not takes_token:
            raise
        refused = True
    finally:
        connection.close()
    return _refused_token(kafka) if takes_token and refused else None


def _refused_token(kafka: KafkaSettings) -> str:
    return f"it refuses the token, by {kafka.sasl_mechanism}: {TOKEN_HINTS[kafka.sasl_mechanism]}"


def _reason(kafka: KafkaSettings, error: Exception) -> str | None:
    """Return why a broker refuses the connection, and what to do; None if it does not say that it refuses."""
    problem = tls_problem(error, KAFKA, kafka.tls)
    if problem:
        return problem + ("; see STREAMREC_KAFKA_SECURITY_PROTOCOL" if "speaks no TLS" in problem else "")
    mechanism = kafka.sasl_mechanism
    if isinstance(error, UnsupportedSaslMechanismError):
        return f"it does not support SASL mechanism {mechanism}: set STREAMREC_KAFKA_SASL_MECHANISM to one it supports"
    if isinstance(error, SaslAuthenticationFailed) and mechanism in TOKEN_HINTS:
        return _refused_token(kafka)
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
    if hint and not kafka.uses_sasl:
        hint = hint.replace("?", ", or SASL?")
    return f"it closes the connection{hint} See STREAMREC_KAFKA_SECURITY_PROTOCOL" if hint else None


async def fetch_metadata(kafka: KafkaSettings, topics: list[str] | None) -> Any:
    """Return the metadata of topics, None: of all, by the addresses in the settings; names are resolved again.

    Raises:
        KafkaError, OSError: no address answers.
    """
    client = AIOKafkaClient(**connection_options(kafka))
    try:
        await client.bootstrap()
        check_brokers(client)
        request = MetadataRequest(topics, allow_auto_topic_creation=False)
        return await client.send(client.get_random_node(), request)
    finally:
        await client.close()


async def learn_brokers_again(kafka: KafkaSettings, client: Client) -> None:
    """Give a client the brokers that the addresses in the settings lead to now. Raises as ``fetch_metadata`` does.

    A client keeps the brokers of its last metadata, and asks only these (Kafka's own does as here since KIP-899).
    """
    teach_brokers(client, await fetch_metadata(kafka, list(vars(client_of(client))["_topics"]) or None))


def teach_brokers(client: Client, metadata: Any) -> None:
    """Give a client the brokers that metadata of its topics name."""
    if metadata.brokers:
        client_of(client).cluster.update_metadata(metadata)


def ignore_abandoned_requests(loop: asyncio.AbstractEventLoop) -> None:
    """Do not log Kafka errors of requests whose caller has stopped waiting, such as a commit that was cut short."""

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), KafkaError):
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
