"""Kafka with TLS, logins and quotas: the daemon works with Apache Kafka's own, and explains errors."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError

from streamrec.errors import KafkaUnavailable
from streamrec.kafka.connection import diagnose
from streamrec.kafka.topics import topic_partitions
from streamrec.settings import Settings

from support.certificates import Certificates
from support.daemon_process import Daemon
from support.kafka_client import feed, wait_caught_up
from support.secured_kafka import PASSWORD, SESSION_S, USER, Right, SecuredKafka, login
from support.token_endpoint import TokenEndpoint
from support.waiting import eventually
from support.workload import Record, click

MakeSettings = Callable[..., Settings]
Serve = Callable[[Settings], Daemon]
BASE_MS = 1_700_000_000_000


@pytest.fixture
async def user(secured: SecuredKafka) -> str:
    """A user of PLAIN and SCRAM, with these passwords."""
    await secured.set_password(USER, PASSWORD)
    return USER


async def may_serve(secured: SecuredKafka, settings: Settings, user: str = USER) -> None:
    """Give a user the rights of the daemon."""
    kafka = settings.kafka
    for operation, resource, name in (
        ("Read", "topic", kafka.topic),
        ("Write", "topic", kafka.dead_letters),
        ("Read", "group", kafka.group),
    ):
        await secured.grant(Right(user, operation, resource, name))


async def connects(settings: Settings) -> None:
    assert await topic_partitions(settings.kafka, []) == {}


async def refusal_of(settings: Settings) -> str:
    with pytest.raises(KafkaUnavailable) as raised:
        async with asyncio.timeout(15):
            await topic_partitions(settings.kafka, [])
    assert "\n" not in str(raised.value)
    assert "s3cr3t" not in f"{raised.value!r}"
    return str(raised.value)


def some_clicks(count: int, user: str = "ann") -> list[Record]:
    return [Record(user.encode(), click(user, f"i{n % 50}", BASE_MS + n)) for n in range(count)]


# --- TLS


async def test_brokers_are_reached_over_tls_and_with_a_client_certificate_if_required(
    settings_of: MakeSettings, certificates: Certificates, other_certificates: Certificates
) -> None:
    def with_certificate(cert: Any, key: Any) -> Settings:
        return settings_of("CLIENT_CERTIFICATE", kafka_tls_cert_file=cert, kafka_tls_key_file=key)

    await connects(settings_of("TLS"))
    await connects(with_certificate(*certificates.client("streamrec")))
    assert "requires a client certificate: set STREAMREC_KAFKA_TLS_CERT_FILE" in await refusal_of(
        settings_of("CLIENT_CERTIFICATE")
    )
    stranger = await refusal_of(with_certificate(*other_certificates.client("streamrec")))
    assert "does not accept our client certificate" in stranger


@pytest.mark.parametrize(
    ("listener", "trusted", "message"),
    [
        ("TLS", False, r"signed by an unknown CA .* set STREAMREC_KAFKA_TLS_CA_FILE to its CA's certificate"),
        ("EXPIRED", True, r"out of date \(certificate has expired\): renew it"),
        ("OTHER_NAME", True, r"for another name \(.*127\.0\.0\.1.*\): use a name that the cert"),
    ],
)
async def test_a_broker_with_a_wrong_certificate_is_refused(
    settings_of: MakeSettings, other_certificates: Certificates, listener: str, trusted: bool, message: str
) -> None:
    known = {} if trusted else {"kafka_tls_ca_file": other_certificates.ca_file}
    assert re.search(message, await refusal_of(settings_of(listener, **known)))


async def test_a_mix_up_of_tls_and_plain_ports_is_explained(secured: SecuredKafka, settings_of: MakeSettings) -> None:
    plain = await refusal_of(settings_of(kafka_bootstrap_servers=secured.address("TLS")))
    assert (
        "it closes the connection; does it require TLS on this port, or SASL? See STREAMREC_KAFKA_SECURITY_PROTOCOL"
        in plain
    )
    tls = await refusal_of(settings_of("TLS", kafka_bootstrap_servers=secured.address()))
    assert "does it speak TLS on this port" in tls


# --- logins


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_a_login_is_accepted_or_refused_in_one_line(settings_of: MakeSettings, user: str, mechanism: str) -> None:
    for listener in ("LOGIN", "LOGIN_TLS"):
        await connects(settings_of(listener, **login(mechanism)))
    for name, password in ((user, "s3cr3t-wrong"), ("nobody", PASSWORD)):
        message = await refusal_of(settings_of("LOGIN", **login(mechanism, name, password)))
        assert f"it refuses user {name} or the password, by {mechanism}: set STREAMREC_KAFKA_SASL_USER" in message


async def test_a_port_without_this_login_is_explained(
    secured: SecuredKafka, settings_of: MakeSettings, user: str
) -> None:
    message = await refusal_of(settings_of("SESSIONS", **login("PLAIN")))
    assert "it does not support SASL mechanism PLAIN: set STREAMREC_KAFKA_SASL_MECHANISM" in message
    without = await refusal_of(settings_of("LOGIN", kafka_security_protocol="PLAINTEXT"))
    assert "or SASL? See STREAMREC_KAFKA_SECURITY_PROTOCOL" in without
    superfluous = settings_of("LOGIN", **login("PLAIN"), kafka_bootstrap_servers=secured.address())
    assert "it uses no SASL on this port" in await refusal_of(superfluous)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512", "OAUTHBEARER"])
async def test_a_daemon_serves_over_tls_and_login_and_logs_no_secret_even_at_debug_level(
    secured: SecuredKafka,
    certificates: Certificates,
    settings_of: MakeSettings,
    serve: Serve,
    user: str,
    mechanism: str,
) -> None:
    endpoint = TokenEndpoint()
    async with endpoint.listening(certificates.server()):
        if mechanism == "OAUTHBEARER":
            by = endpoint.login(user, kafka_oauth_tls_ca_file=certificates.ca_file)
            wrong, reason = {"kafka_oauth_client_secret": "s3cr3t-wrong"}, f"it refuses client {user} or its secret"
        else:
            by = login(mechanism)
            wrong, reason = {"kafka_sasl_password": "s3cr3t-wrong"}, f"it refuses user {user} or the password"
        settings = settings_of("LOGIN_TLS", **by, log_level="DEBUG", http_token="s3cr3t-s3cr3t-s3cr3t")
        await may_serve(secured, settings)
        await feed(settings_of(), some_clicks(1))
        daemon = serve(settings)
        await eventually(lambda: daemon.has_logged("OffsetCommitRequest"))
        assert "SaslAuthenticateRequest" in daemon.output, "at debug level aiokafka no longer logs every request"
        assert not any(secret in daemon.output for secret in ("s3cr3t", "auth=Bearer", "eyJ"))
        refused = serve(settings.but(**wrong))
        assert await refused.wait_exit() == 1
        assert reason in refused.output.splitlines()[-1]
        assert "s3cr3t" not in refused.output
        assert "Traceback" not in refused.output


@contextlib.asynccontextmanager
async def fed_with_clicks(settings: Settings) -> AsyncIterator[list[Record]]:
    """Produce clicks and bad records while the block runs; yield the list of all records so far."""
    left, records = asyncio.Event(), list[Record]()

    async def stream() -> None:
        while not left.is_set():
            some = [*some_clicks(4, f"u{len(records)}"), Record(b"bob", b"bad")]
            await feed(settings, some)
            records.extend(some)
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as group:
        group.create_task(stream())
        yield records
        left.set()


async def handled_exactly(daemon: Daemon, settings: Settings, records: list[Record]) -> None:
    """Wait until the group has committed all records; check that each had its effect once."""
    await wait_caught_up(settings)
    bad = sum(record.value == b"bad" for record in records)

    async def applied() -> bool:
        return await daemon.metric("streamrec_events_total", outcome="applied") == len(records) - bad

    await eventually(applied)
    assert await daemon.metric("streamrec_dead_letters_total") == bad


async def test_a_login_that_ends_is_repeated_and_nobody_notices(
    secured: SecuredKafka, settings_of: MakeSettings, serve: Serve, user: str
) -> None:
    """Brokers with connections.max.reauth.ms hang up on a client that, like aiokafka, does not log in again itself."""
    settings = settings_of("SESSIONS", **login("SCRAM-SHA-256"), log_level="DEBUG")
    await may_serve(secured, settings)
    await feed(settings_of(), [])
    daemon = serve(settings)
    await daemon.wait_ready()
    begun, logins = asyncio.get_running_loop().time(), daemon.output.count("Authenticated as")
    async with fed_with_clicks(settings_of()) as records:
        while asyncio.get_running_loop().time() < begun + 3 * SESSION_S:
            assert (await daemon.get("/livez"))[0] == (await daemon.get("/readyz"))[0] == 200
            await asyncio.sleep(0.1)
    await handled_exactly(daemon, settings_of(), records)
    assert daemon.output.count("Authenticated as") >= logins + 2 * 2  # at least two connections, twice
    assert "Kafka is unreachable" not in daemon.output


async def test_a_password_that_changes_at_the_broker_is_logged_while_the_daemon_waits(
    secured: SecuredKafka, settings_of: MakeSettings, serve: Serve, user: str
) -> None:
    settings = settings_of("SESSIONS", **login("SCRAM-SHA-512"))
    await may_serve(secured, settings)
    await feed(settings_of(), some_clicks(3))
    daemon = serve(settings)
    await daemon.wait_ready()
    await secured.set_password(user, "another")
    await eventually(lambda: daemon.has_logged(f"it refuses user {user} or the password"))
    assert (await daemon.get("/livez"))[0] == 200
    await feed(settings_of(), some_clicks(3, "bob"))
    await secured.set_password(user, PASSWORD)
    await eventually(lambda: daemon.has_logged("Kafka is reachable again"), timeout_s=60)
    await daemon.wait_ready()
    await daemon.wait_handled(6)
    assert daemon.output.count("Kafka is unreachable") == 1
    assert "s3cr3t" not in daemon.output
    assert "Traceback" not in daemon.output


async def test_tokens_are_renewed_while_a_daemon_serves(
    secured: SecuredKafka, settings_of: MakeSettings, serve: Serve
) -> None:
    """A broker hangs up when a token ends. While the endpoint fails, the last token does until then."""
    client, endpoint = "client-of-tokens", TokenEndpoint(life_s=4)
    async with endpoint.listening():
        settings = settings_of("SESSIONS", **endpoint.login(client, kafka_oauth_scope="kafka"))
        await may_serve(secured, settings, client)
        await feed(settings_of(), [])
        daemon = serve(settings)
        await daemon.wait_ready()
        at_start = len(endpoint.issued)
        async with fed_with_clicks(settings_of()) as records:
            while len(endpoint.issued) < at_start + 6:
                assert (await daemon.get("/livez"))[0] == (await daemon.get("/readyz"))[0] == 200
                await asyncio.sleep(0.1)
            assert "Kafka is unreachable" not in daemon.output
            endpoint.answer = (503, "down")
            await eventually(lambda: daemon.has_logged(f"waiting for it: no token from {endpoint.url}: it answers 503"))
            assert (await daemon.get("/livez"))[0] == 200
            endpoint.answer = None
            await eventually(lambda: daemon.has_logged("Kafka is reachable again"))
        await handled_exactly(daemon, settings_of(), records)
        assert set(endpoint.issued) == {(client, "kafka")}
        assert daemon.output.count("Kafka is unreachable") == 1
        assert "Traceback" not in daemon.output


async def test_a_token_that_kafka_refuses_is_explained(settings_of: MakeSettings) -> None:
    endpoint = TokenEndpoint(life_s=-60)  # over already
    async with endpoint.listening():
        message = await refusal_of(settings_of("LOGIN", **endpoint.login("late")))
        assert "it refuses the token, by OAUTHBEARER: see issuer, audience" in message
        endpoint.answer = (200, '{"access_token": "no-jwt"}')
        assert "it refuses the token" in await refusal_of(settings_of("LOGIN", **endpoint.login("strange")))


# --- quotas


@pytest.mark.timeout(400)
async def test_a_quota_slows_the_daemon_down_and_nothing_is_lost(
    secured: SecuredKafka, settings_of: MakeSettings, serve: Serve
) -> None:
    user, bytes_per_s = "slow", 10_000.0
    await secured.set_password(user, PASSWORD)
    await secured.set_quotas(user, {"consumer_byte_rate": bytes_per_s, "producer_byte_rate": bytes_per_s})
    settings = settings_of("LOGIN", **login("SCRAM-SHA-256", user))
    await may_serve(secured, settings, user)
    long = b"x" * 900
    records = [
        record
        for n in range(150)
        for record in (Record(b"%d" % n, click(n, "i1", BASE_MS, padding=long.decode())), Record(b"bob", b"bad" + long))
    ]
    await feed(settings_of(), records)
    daemon = serve(settings)
    await daemon.wait_ready()

    async def all_handled() -> bool:
        assert (await daemon.get("/livez"))[0] == 200
        return await daemon.metric("streamrec_dead_letters_total") == 150 and not await daemon.metric(
            "streamrec_lag_records"
        )

    await eventually(all_handled, timeout_s=200)
    assert await daemon.metric("streamrec_events_total", outcome="applied") == 150
    assert "it answers a new connection, but not ours; does a quota slow this client down" in daemon.output
    await eventually(lambda: daemon.has_logged("Kafka is reachable again"))
    assert "Traceback" not in daemon.output


async def test_a_file_that_is_being_replaced_does_not_end_the_search_for_a_reason(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """The watch of the broker and the retried batch ask for the reason while an operator rotates certificates."""
    ca = tmp_path / "ca.pem"
    settings = make_settings(kafka_security_protocol="SSL", kafka_tls_ca_file=ca)
    for content in (None, "", "half of a certif"):
        if content is not None:
            ca.write_text(content)
        found = await diagnose(settings.kafka, KafkaConnectionError())
        assert isinstance(found, KafkaUnavailable), "it is waited for"
        assert f"kafka_tls_ca_file: {'cannot read ' if content is None else ''}{ca}" in str(found)
