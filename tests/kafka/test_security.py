"""Kafka with TLS, logins and ACLs: the daemon works, needs only the documented rights, and explains errors.

A front before the real broker terminates TLS, requires a login, or refuses new topics (fronts.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import GroupAuthorizationFailedError, TopicAuthorizationFailedError

from sasrec import load_model
from streamrec.errors import KafkaUnavailable
from streamrec.kafka.connection import kafka_error
from streamrec.kafka.topics import ensure_topics, topic_partitions
from streamrec.local.daemon import environment
from streamrec.local.embedded_kafka import adapted
from streamrec.local.servers import LocalServers
from streamrec.registry import Registry
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.daemon_process import Daemon, Retrain
from support.fronts import Certificates, KafkaFront
from support.kafka_client import feed
from support.preloaded import program
from support.waiting import eventually
from support.workload import Record, click

PAGE = (Path(__file__).parents[2] / "deploy" / "SECURITY.md").read_text("utf-8")
USER, PASSWORD = "str=eam,rec", "s3cr3t-right"
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
LOGIN = {"kafka_sasl_username": USER, "kafka_sasl_password": PASSWORD}
CREATE_TOPICS = 19


async def connects(address: str, **more: Any) -> None:
    settings = load_settings(flags={"kafka_bootstrap_servers": address} | more)
    assert await topic_partitions(settings.kafka, ["no-such-topic"]) == {"no-such-topic": 0}


async def refusal_of(address: str, **more: Any) -> str:
    settings = load_settings(flags={"kafka_bootstrap_servers": address} | more)
    with pytest.raises(KafkaUnavailable) as raised:
        async with asyncio.timeout(15):
            await ensure_topics(settings.kafka, ["no-such-topic"])
    assert "\n" not in str(raised.value)
    assert "s3cr3t" not in f"{raised.value!r}"
    return str(raised.value)


# --- TLS


async def test_brokers_are_reached_over_tls_and_with_a_client_certificate_if_required(
    own: LocalServers, certificates: Certificates, other_certificates: Certificates
) -> None:
    tls: dict[str, Any] = {"kafka_security_protocol": "SSL", "kafka_tls_ca_file": certificates.ca_file}
    async with KafkaFront(own.kafka.port, certificates.server()).listening() as front:
        await connects(front.address, **tls)
    async with KafkaFront(own.kafka.port, certificates.server(requires_client=True)).listening() as front:
        cert, key = certificates.client("streamrec")
        await connects(front.address, **tls, kafka_tls_cert_file=cert, kafka_tls_key_file=key)
        assert "does it require a client certificate (kafka_tls_cert_file)" in await refusal_of(front.address, **tls)
        cert, key = other_certificates.client("streamrec")
        stranger = await refusal_of(front.address, **tls, kafka_tls_cert_file=cert, kafka_tls_key_file=key)
        assert "does it require another client certificate" in stranger


@pytest.mark.parametrize(
    ("names", "expired", "trusted", "message"),
    [
        ((), False, False, r"signed by an unknown CA .* set STREAMREC_KAFKA_TLS_CA_FILE to its CA's certificate"),
        ((), True, True, r"out of date \(certificate has expired\): renew it"),
        (("kafka.example",), False, True, r"for another name \(.*127\.0\.0\.1.*\): use a name that the cert"),
    ],
    ids=["another CA", "expired", "another name"],
)
async def test_a_broker_with_a_wrong_certificate_is_refused(
    own: LocalServers,
    certificates: Certificates,
    other_certificates: Certificates,
    names: tuple[str, ...],
    expired: bool,
    trusted: bool,
    message: str,
) -> None:
    known = certificates if trusted else other_certificates
    tls: dict[str, Any] = {"kafka_security_protocol": "SSL", "kafka_tls_ca_file": known.ca_file}
    async with KafkaFront(own.kafka.port, certificates.server(*names, expired=expired)).listening() as front:
        assert re.search(message, await refusal_of(front.address, **tls))


async def test_a_mix_up_of_tls_and_plain_ports_is_explained(own: LocalServers, certificates: Certificates) -> None:
    tls: dict[str, Any] = {"kafka_security_protocol": "SSL", "kafka_tls_ca_file": certificates.ca_file}
    async with KafkaFront(own.kafka.port, certificates.server()).listening() as front:
        plain = await refusal_of(front.address)
    assert (
        "it closes the connection; does it require TLS on this port, or SASL? See STREAMREC_KAFKA_SECURITY_PROTOCOL"
        in plain
    )
    assert "does it speak TLS on this port" in await refusal_of(own.kafka_bootstrap_servers, **tls)


# --- logins


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_a_login_is_accepted_or_refused_in_one_line(own: LocalServers, mechanism: str) -> None:
    sasl = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": mechanism} | LOGIN
    async with KafkaFront(own.kafka.port, None, mechanism, {USER: PASSWORD}).listening() as front:
        await connects(front.address, **sasl)
        for wrong in ({"kafka_sasl_password": "s3cr3t-wrong"}, {"kafka_sasl_username": "nobody"}):
            message = await refusal_of(front.address, **sasl | wrong)
            assert re.search(
                rf"it refuses user .* or the password, by {mechanism}: set STREAMREC_KAFKA_SASL_USER", message
            )
        other = "PLAIN" if mechanism != "PLAIN" else "SCRAM-SHA-256"
        message = await refusal_of(front.address, **sasl | {"kafka_sasl_mechanism": other})
        assert f"it does not support SASL mechanism {other}: set STREAMREC_KAFKA_SASL_MECHANISM" in message
        assert "or SASL? See STREAMREC_KAFKA_SECURITY_PROTOCOL" in await refusal_of(front.address)
    async with KafkaFront(own.kafka.port).listening() as front:
        assert "it uses no SASL on this port" in await refusal_of(front.address, **sasl)


@contextlib.asynccontextmanager
async def daemon_of(settings: Settings) -> AsyncIterator[Daemon]:
    daemon = Daemon(settings)
    try:
        yield daemon
    finally:
        daemon.kill()


@pytest.fixture
def settings_of(own: LocalServers, model_dir: Path, tmp_path: Path) -> Callable[..., Settings]:
    name = re.sub(r"\W", "-", tmp_path.name)

    def make(address: str = own.kafka_bootstrap_servers, **more: Any) -> Settings:
        flags = {
            "kafka_bootstrap_servers": address,
            "redis_url": own.redis_url,
            "model_dir": model_dir,
            "http_port": 0,
            "kafka_topic": name,
            "kafka_group": name,
            "redis_key_prefix": name,
        }
        return load_settings(flags=flags | more)

    return make


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_a_daemon_serves_over_tls_and_login_and_logs_no_secret_even_at_debug_level(
    own: LocalServers, certificates: Certificates, settings_of: Callable[..., Settings], mechanism: str
) -> None:
    secured: dict[str, Any] = {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_mechanism": mechanism,
        "log_level": "DEBUG",
        "kafka_tls_ca_file": certificates.ca_file,
        "http_token": "s3cr3t-s3cr3t-s3cr3t",
        **LOGIN,
    }
    users = {USER: PASSWORD}
    async with KafkaFront(own.kafka.port, certificates.server(), mechanism, users).listening() as front:
        async with daemon_of(settings_of(front.address, **secured)) as daemon:
            await eventually(lambda: daemon.has_logged("partitions assigned"))
            await feed(settings_of(), [Record(b"ann", click("ann", "i1", 1_700_000_000_000))])
            await eventually(lambda: daemon.has_logged("OffsetCommitRequest"))
            assert "SaslAuthenticateRequest" in daemon.output, "at debug level aiokafka no longer logs every request"
            assert "s3cr3t" not in daemon.output
        wrong = settings_of(front.address, **secured | {"kafka_sasl_password": "s3cr3t-wrong"})
        async with daemon_of(wrong) as daemon:
            assert await daemon.wait_exit() == 1
            assert f"it refuses user {USER} or the password, by {mechanism}" in daemon.output.splitlines()[-1]
            assert "s3cr3t" not in daemon.output
            assert "Traceback" not in daemon.output


async def test_a_password_that_changes_at_the_broker_is_logged_while_the_daemon_waits(
    own: LocalServers, settings_of: Callable[..., Settings]
) -> None:
    front = KafkaFront(own.kafka.port, None, "SCRAM-SHA-256", {USER: PASSWORD})
    sasl = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "SCRAM-SHA-256"} | LOGIN
    async with front.listening(), daemon_of(settings_of(front.address, **sasl)) as daemon:
        await daemon.wait_ready()
        front.users = {USER: "another"}
        front.hang_up()
        await eventually(lambda: daemon.has_logged(f"it refuses user {USER} or the password"))
        front.users = {USER: PASSWORD}
        await eventually(lambda: daemon.has_logged("Kafka is reachable again"), timeout_s=60)
        await daemon.wait_ready()
        assert "s3cr3t" not in daemon.output


# --- rights


def test_the_error_of_a_missing_right_names_the_page_that_lists_rights() -> None:
    for error in (TopicAuthorizationFailedError("clicks"), GroupAuthorizationFailedError("streamrec")):
        message = str(kafka_error(Settings.of().kafka, error))
        assert re.search(r"AuthorizationFailedError: (clicks|streamrec) \(the rights .* deploy/SECURITY\.md\)", message)


async def test_existing_topics_need_no_right_to_create_and_missing_ones_are_named(
    own: LocalServers, settings_of: Callable[..., Settings]
) -> None:
    settings = settings_of()
    async with KafkaFront(own.kafka.port, may_create=False).listening() as front:
        strict = settings_of(front.address)
        with pytest.raises(KafkaUnavailable) as raised:
            await ensure_topics(strict.kafka, (strict.kafka.topic,))
        assert re.match(
            rf"topic {strict.kafka.topic} does not exist or may not be seen, and may not be created: create it,",
            str(raised.value),
        )
        assert "deploy/SECURITY.md" in str(raised.value)
        await feed(settings, [Record(b"ann", click("ann", "i1", 1_700_000_000_000)), Record(b"ann", b"bad")])
        async with daemon_of(strict) as daemon:
            await daemon.wait_handled(1)
            await eventually(lambda: counted(daemon))


async def test_a_daemon_without_a_right_ends_with_a_line_that_names_it(
    own: LocalServers, settings_of: Callable[..., Settings]
) -> None:
    async with KafkaFront(own.kafka.port, may_join=False).listening() as front:
        settings = settings_of(front.address)
        async with daemon_of(settings) as daemon:
            assert await daemon.wait_exit() == 1
            last = daemon.output.splitlines()[-1]
            assert re.match(
                rf"streamrec: Kafka at .* GroupAuthorizationFailedError: {settings.kafka.group} \(the", last
            )
            assert "Traceback" not in daemon.output


async def counted(daemon: Daemon) -> bool:
    return await daemon.metric("streamrec_dead_letters_total") == 1


# The rights that Apache Kafka requires for the requests sent here; see "Protocols" in its documentation on security.
READ, WRITE, DESCRIBE, NONE = ("topic", "Read"), ("topic", "Write"), ("topic", "Describe"), ()
OF_GROUP, SEE_GROUP = ("group", "Read"), ("group", "Describe")
NEEDED: dict[int, tuple[Any, ...]] = {
    0: (WRITE,),  # Produce
    1: (READ,),  # Fetch
    2: (DESCRIBE,),  # ListOffsets
    3: (DESCRIBE,),  # Metadata
    8: (READ, OF_GROUP),  # OffsetCommit
    9: (DESCRIBE, SEE_GROUP),  # OffsetFetch
    10: (SEE_GROUP,),  # FindCoordinator
    11: (OF_GROUP,),  # JoinGroup
    12: (OF_GROUP,),  # Heartbeat
    13: (OF_GROUP,),  # LeaveGroup
    14: (OF_GROUP,),  # SyncGroup
    15: (SEE_GROUP,),  # DescribeGroups
    18: NONE,  # ApiVersions
    22: (WRITE,),  # InitProducerId, of an idempotent producer; since 2.8
}


def granted(user: str) -> set[tuple[str, str]]:
    """Return the rights that the page grants to a user, as resource and operation."""
    lines = re.findall(
        rf"^    \$acl --allow-principal User:{user} --operation (\w+) --(topic|group) ", PAGE, re.MULTILINE
    )
    return {(resource, operation) for operation, resource in lines}


def least(requests: set[int]) -> set[tuple[str, str]]:
    """Return the rights that requests need; Read and Write imply Describe."""
    needed = {right for key in requests for right in NEEDED[key]}
    implied = {(kind, "Describe") for kind, operation in needed if operation in ("Read", "Write")}
    return needed - implied


async def command(settings: Settings, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", program(), *arguments, env=environment(settings), stdout=subprocess.DEVNULL
    )
    assert await process.wait() == 0


async def test_the_requests_of_each_part_need_exactly_the_rights_of_the_page(
    own: LocalServers, model_dir: Path, settings_of: Callable[..., Settings], tmp_path: Path
) -> None:
    parts = ("streamrec-serve", "streamrec-retrain", "producer", "streamrec-check")
    fronts = {part: KafkaFront(own.kafka.port, may_create=False) for part in parts}
    settings = settings_of()
    saved, registry = load_model(model_dir), Registry(tmp_path / "registry")
    registry.promote(registry.publish(saved.model, saved.vocab, {}), "first")
    where = {"archive_dir": tmp_path / "archive", "registry_dir": registry.place, "model_dir": None}
    await feed(settings, [Record(b"ann", click("ann", f"i{n}", 1_700_000_000_000 + n)) for n in range(9)])
    await feed(settings, [Record(b"ann", b"bad")])
    (tmp_path / "clicks.csv").write_text("user_id,item_id,timestamp\nbob,i1,1700000000000\n")
    async with contextlib.AsyncExitStack() as stack:
        for front in fronts.values():
            await stack.enter_async_context(front.listening())
        daemon = await stack.enter_async_context(daemon_of(settings_of(fronts["streamrec-serve"].address)))
        await asyncio.gather(
            command(settings_of(fronts["producer"].address), "replay", str(tmp_path / "clicks.csv")),
            command(settings_of(fronts["streamrec-check"].address), "check"),
        )
        await daemon.wait_handled(10)
        await eventually(lambda: counted(daemon))
        retrain = Retrain(
            settings_of(
                fronts["streamrec-retrain"].address,
                retrain_every_s=10**6,
                retrain_http_port=0,
                archive_flush_s=0.1,
                **where,
            )
        )
        await retrain.says("segments written")
        daemon.process.terminate()
        retrain.process.terminate()
        await retrain.ends()
        assert await daemon.wait_exit() == 0
    for part, front in fronts.items():
        assert least(front.requested) == granted(part), (part, sorted(front.requested))
    # it leaves its group, and removes members that the embedded server would never remove
    assert ({13, 15} if adapted() else {13}) <= fronts["streamrec-serve"].requested
