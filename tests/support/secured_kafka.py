"""A node of Apache Kafka with TLS, logins, rights and quotas: its own listeners, authorizer and SASL servers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aiokafka.conn import create_conn
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest
from aiokafka.protocol.api import RequestStruct, Response
from aiokafka.protocol.types import (
    Array,
    Boolean,
    CompactArray,
    CompactBytes,
    CompactString,
    Float64,
    Int8,
    Int16,
    Int32,
    Schema,
    String,
    TaggedFields,
)

from streamrec.local.apache_kafka import apache_kafka
from streamrec.local.process import free_port

from support.certificates import HOST, Certificates

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
SESSION_S = 3  # a login at SESSIONS lasts this long
LISTENERS = {
    "PLAINTEXT": "PLAINTEXT",  # without login and TLS: its clients may do everything
    "CONTROLLER": "PLAINTEXT",
    "TLS": "SSL",
    "CLIENT_CERTIFICATE": "SSL",  # requires one
    "EXPIRED": "SSL",
    "OTHER_NAME": "SSL",
    "LOGIN": "SASL_PLAINTEXT",
    "SESSIONS": "SASL_PLAINTEXT",  # logins end; no PLAIN
    "LOGIN_TLS": "SASL_SSL",
}
USER, PASSWORD = "str=eam,rec", "s3cr3t-right"  # characters that SCRAM and Java's configuration quote
RESOURCES, OPERATIONS = {"topic": 2, "group": 3, "cluster": 4}, {"Read": 3, "Write": 4, "Create": 5, "Describe": 8}
LITERAL, ALLOW = 3, 3
ITERATIONS = 4096  # of SCRAM's hash; the least that Kafka takes


def login(mechanism: str, user: str = USER, password: str = PASSWORD) -> dict[str, str]:
    """Return the settings of a login."""
    return {"kafka_sasl_mechanism": mechanism, "kafka_sasl_username": user, "kafka_sasl_password": password}


class AlterScramResponse(Response):
    API_KEY = 51
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "results",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("error_code", Int16),
                ("error_message", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class AlterScramRequest(RequestStruct):
    """AlterUserScramCredentials, which aiokafka lacks."""

    FLEXIBLE_VERSION = True
    API_KEY = 51
    API_VERSION = 0
    RESPONSE_TYPE = AlterScramResponse
    SCHEMA = Schema(
        (
            "deletions",
            CompactArray(("user", CompactString("utf-8")), ("mechanism", Int8), ("tags", TaggedFields)),
        ),
        (
            "upsertions",
            CompactArray(
                ("user", CompactString("utf-8")),
                ("mechanism", Int8),
                ("iterations", Int32),
                ("salt", CompactBytes),
                ("salted_password", CompactBytes),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class AlterQuotasResponse(Response):
    API_KEY = 49
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "entries",
            Array(
                ("error_code", Int16),
                ("error_message", String("utf-8")),
                ("entity", Array(("type", String("utf-8")), ("name", String("utf-8")))),
            ),
        ),
    )


class AlterQuotasRequest(RequestStruct):
    """AlterClientQuotas, which aiokafka lacks."""

    API_KEY = 49
    API_VERSION = 0
    RESPONSE_TYPE = AlterQuotasResponse
    SCHEMA = Schema(
        (
            "entries",
            Array(
                ("entity", Array(("type", String("utf-8")), ("name", String("utf-8")))),
                ("limits", Array(("name", String("utf-8")), ("value", Float64), ("remove", Boolean))),
            ),
        ),
        ("validate_only", Boolean),
    )


class Ready(NamedTuple):
    """A request of one version, as a connection takes it."""

    request: RequestStruct

    def prepare(self, versions: object) -> RequestStruct:
        return self.request


class Right(NamedTuple):
    """A right, as kafka-acls.sh takes it."""

    user: str
    operation: str
    resource: str
    name: str


class SecuredKafka:
    """One node.

    Args:
        passwords: users of PLAIN. Users of SCRAM are added by ``add_scram_user``; a token of OAUTHBEARER names its own.
    """

    def __init__(self, home: Path, folder: Path, certificates: Certificates, passwords: dict[str, str]) -> None:
        self._home = home
        self._ports = {listener: free_port() for listener in LISTENERS}
        self._certificates = certificates
        self._node = apache_kafka(home, folder, self._properties(folder, certificates, passwords))
        self._node.port = self._ports["PLAINTEXT"]

    def start(self) -> None:
        self._node.start()

    def stop(self) -> None:
        self._node.stop()

    def address(self, listener: str = "PLAINTEXT") -> str:
        return f"{HOST}:{self._ports[listener]}"

    def flags(self, listener: str) -> dict[str, Any]:
        """Return the settings that a client of a listener needs, besides its login."""
        flags: dict[str, Any] = {"kafka_security_protocol": LISTENERS[listener]}
        return flags | ({"kafka_tls_ca_file": self._certificates.ca_file} if "SSL" in LISTENERS[listener] else {})

    async def grant(self, *rights: Right) -> None:
        for right in rights:
            response = await self._send(CreateAclsRequest(*_acl(right)))
            assert [code for code, _ in response.creation_responses] == [0], response

    async def revoke(self, *rights: Right) -> None:
        for right in rights:
            response = await self._send(DeleteAclsRequest(*_acl(right)))
            assert [len(matching) for _, _, matching in response.filter_responses] == [1], response

    async def set_password(self, user: str, password: str) -> None:
        """Give a user this password with SCRAM."""
        for mechanism, kind in ((1, "sha256"), (2, "sha512")):
            salted = hashlib.pbkdf2_hmac(kind, password.encode(), b"salt", ITERATIONS)
            entry = (user, mechanism, ITERATIONS, b"salt", salted, {})
            response = await self._send(Ready(AlterScramRequest([], [entry], {})))
            assert [code for _, code, *_ in response.results] == [0], response

    async def set_quotas(self, user: str, bytes_per_s: Mapping[str, float]) -> None:
        """Limit a user: consumer_byte_rate, producer_byte_rate."""
        limits = [(name, limit, False) for name, limit in bytes_per_s.items()]
        response = await self._send(Ready(AlterQuotasRequest([([("user", user)], limits)], False)))
        assert [code for code, *_ in response.entries] == [0], response

    async def _send(self, request: Any) -> Any:
        connection = await create_conn(HOST, self._ports["PLAINTEXT"])
        try:
            return await connection.send(request)
        finally:
            await connection.close()

    def _properties(self, folder: Path, certificates: Certificates, passwords: dict[str, str]) -> dict[str, str]:
        listeners = ",".join(f"{name}://{HOST}:{port}" for name, port in self._ports.items())
        users = " ".join(f'"user_{name}"="{password}"' for name, password in passwords.items())
        module = "org.apache.kafka.common.security"
        properties = {
            "listeners": listeners,
            "advertised.listeners": listeners.replace(f"CONTROLLER://{self.address('CONTROLLER')},", ""),
            "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in LISTENERS.items()),
            "controller.quorum.voters": f"1@{self.address('CONTROLLER')}",
            "inter.broker.listener.name": "PLAINTEXT",
            "num.network.threads": "1",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "auto.create.topics.enable": "false",
            "sasl.enabled.mechanisms": ",".join(MECHANISMS),
            "ssl.keystore.type": "PEM",
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(certificates.ca_file),
            "ssl.keystore.location": str(certificates.key_store()),
            "listener.name.client_certificate.ssl.client.auth": "required",
            "listener.name.expired.ssl.keystore.location": str(certificates.key_store(expired=True)),
            "listener.name.other_name.ssl.keystore.location": str(certificates.key_store("kafka.example")),
        }
        for listener in (name.lower() for name, protocol in LISTENERS.items() if protocol.startswith("SASL")):
            logins = {
                "plain": f"{module}.plain.PlainLoginModule required {users};",
                "scram-sha-256": f"{module}.scram.ScramLoginModule required;",
                "scram-sha-512": f"{module}.scram.ScramLoginModule required;",
                # a token that nobody signed is believed; the claim is the broker's own, which it never uses
                "oauthbearer": f"{module}.oauthbearer.OAuthBearerLoginModule required "
                'unsecuredLoginStringClaim_sub="broker";',
            }
            for mechanism, login in logins.items():
                properties[f"listener.name.{listener}.{mechanism}.sasl.jaas.config"] = login
        for mechanism in MECHANISMS:
            properties[f"listener.name.sessions.{mechanism.lower()}.connections.max.reauth.ms"] = str(1000 * SESSION_S)
        properties["listener.name.sessions.sasl.enabled.mechanisms"] = ",".join(MECHANISMS[1:])
        return properties


def _acl(right: Right) -> tuple[int, str, int, str, str, int, int]:
    resource, operation = RESOURCES[right.resource], OPERATIONS[right.operation]
    return resource, right.name, LITERAL, f"User:{right.user}", "*", operation, ALLOW
