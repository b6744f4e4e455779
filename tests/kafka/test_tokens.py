"""Tokens of an identity provider and of AWS: requested, renewed, and explained where there is none."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aws_msk_iam_sasl_signer import MSKAuthTokenProvider

from streamrec.errors import SettingsError
from streamrec.kafka.connection import connection_options
from streamrec.kafka.tokens import NoToken, Tokens, token_provider
from streamrec.local.process import free_port
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.certificates import Certificates
from support.token_endpoint import TokenEndpoint

MSK = {"kafka_security_protocol": "SASL_SSL", "kafka_sasl_mechanism": "AWS_MSK_IAM"}


def settings_of(endpoint: TokenEndpoint, **more: Any) -> Settings:
    # whether there is a broker does not matter: the token comes first
    return load_settings(flags={"kafka_security_protocol": "SASL_PLAINTEXT"} | endpoint.login("ann") | more)


async def problem_of(endpoint: TokenEndpoint, **more: Any) -> str:
    with pytest.raises(NoToken) as raised:
        await token_provider(settings_of(endpoint, **more).kafka).token()
    message = str(raised.value)
    assert message.startswith(f"no token from {settings_of(endpoint, **more).kafka.oauth.token_url}: ")
    assert "\n" not in message
    assert "s3cr3t" not in f"{raised.value!r}"
    return message


# --- the token endpoint


async def test_a_token_is_requested_once_for_all_connections_of_a_client_and_renewed_before_its_end() -> None:
    endpoint = TokenEndpoint(life_s=1.0)
    async with endpoint.listening():
        tokens = token_provider(settings_of(endpoint, kafka_oauth_scope="read write").kafka)
        assert len(set(await asyncio.gather(*(tokens.token() for _ in range(20))))) == 1
        assert endpoint.issued == [("ann", "read write")]
        begun = time.monotonic()
        while len(endpoint.issued) < 2:
            await tokens.token()
            await asyncio.sleep(0.01)
        assert time.monotonic() - begun < 1.0


async def test_a_token_without_a_life_is_used_once() -> None:
    endpoint = TokenEndpoint()
    async with endpoint.listening():
        tokens = token_provider(settings_of(endpoint).kafka)
        for number in range(2):
            endpoint.answer = (200, f'{{"access_token": "t{number}"}}')
            assert await tokens.token() == f"t{number}"


async def test_while_the_endpoint_fails_the_last_token_is_used_until_its_end() -> None:
    endpoint = TokenEndpoint(life_s=1.0)
    async with endpoint.listening():
        tokens = token_provider(settings_of(endpoint).kafka)
        first = await tokens.token()
        endpoint.answer = (503, "down")
        begun = time.monotonic()
        with pytest.raises(NoToken, match="it answers 503"):
            while True:
                assert await tokens.token() == first
                await asyncio.sleep(0.01)
        assert 0.9 < time.monotonic() - begun < 5


async def test_a_wrong_secret_is_named_and_not_shown() -> None:
    endpoint = TokenEndpoint()
    async with endpoint.listening():
        assert (
            "it refuses client ann or its secret (401 invalid_client): set STREAMREC_KAFKA_OAUTH_CLIENT_ID and "
            "STREAMREC_KAFKA_OAUTH_CLIENT_SECRET, or ..._CLIENT_SECRET_FILE"
        ) in await problem_of(endpoint, kafka_oauth_client_secret="s3cr3t-wrong")


@pytest.mark.parametrize(
    ("status", "text", "problem"),
    [
        (400, '{"error": "invalid_scope"}', "it answers 400 invalid_scope; see STREAMREC_KAFKA_OAUTH_TOKEN_URL and"),
        (400, '{"error": "invalid_client"}', "it refuses client ann or its secret (400 invalid_client)"),
        (400, '{"error": "s3cr3t\\ns3cr3t"}', "it answers 400; see"),
        (401, "s3cr3t", "it refuses client ann or its secret (401)"),
        (404, "not here", "it answers 404; see STREAMREC_KAFKA_OAUTH_TOKEN_URL"),
        (500, "[]", "it answers 500; see"),
        (302, "", "it answers 302; see"),
        (200, "<html>", "its answer has no access_token; is STREAMREC_KAFKA_OAUTH_TOKEN_URL the token endpoint?"),
        (200, '{"token": "s3cr3t"}', "its answer has no access_token"),
        (200, '{"access_token": 5}', "its answer has no access_token"),
        (200, '{"access_token": "two\\u0001auth=words"}', "its answer has no access_token"),
    ],
)
async def test_an_answer_without_a_token_is_explained(status: int, text: str, problem: str) -> None:
    endpoint = TokenEndpoint(answer=(status, text))
    async with endpoint.listening():
        assert problem in await problem_of(endpoint)


async def test_an_endpoint_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = TokenEndpoint(url=f"http://127.0.0.1:{free_port()}/token")
    assert "it cannot be reached (" in await problem_of(endpoint)
    assert "is STREAMREC_KAFKA_OAUTH_TOKEN_URL right?" in await problem_of(endpoint)
    monkeypatch.setattr("streamrec.kafka.tokens.REQUEST_TIMEOUT_S", 0.2)

    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        gone.set()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/token"
        assert "it does not answer within 0.2 s" in await problem_of(endpoint)
        await gone.wait()


async def test_the_certificate_of_the_endpoint_is_verified(
    certificates: Certificates, other_certificates: Certificates
) -> None:
    endpoint = TokenEndpoint()
    async with endpoint.listening(certificates.server()):
        right = settings_of(endpoint, kafka_oauth_tls_ca_file=certificates.ca_file)
        assert await token_provider(right.kafka).token()
        assert (
            "signed by an unknown CA (unable to get local issuer certificate): set STREAMREC_KAFKA_OAUTH_TLS_CA_FILE"
        ) in await problem_of(endpoint, kafka_oauth_tls_ca_file=other_certificates.ca_file)
    async with endpoint.listening(certificates.server("idp.example")):
        assert "for another name" in await problem_of(endpoint, kafka_oauth_tls_ca_file=certificates.ca_file)
    async with endpoint.listening():
        url = endpoint.url.replace("http:", "https:")
        assert "it speaks no TLS on this port" in await problem_of(endpoint, kafka_oauth_token_url=url)


async def test_a_missing_ca_file_is_named() -> None:
    settings = settings_of(TokenEndpoint(url="https://h/"), kafka_oauth_tls_ca_file=Path("/no/ca.pem"))
    with pytest.raises(SettingsError, match=r"^kafka_oauth_tls_ca_file: cannot read /no/ca\.pem"):
        connection_options(settings.kafka)


# --- AWS MSK: the signer is AWS's own, with made-up credentials; no MSK cluster was available to log in to


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An environment in which AWS's library finds these credentials only."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    yield monkeypatch


def msk(**more: Any) -> Settings:
    return load_settings(flags=MSK | more)


def signed_url(token: str) -> tuple[str, dict[str, list[str]]]:
    url = urlsplit(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode())
    return url.netloc, parse_qs(url.query)


@pytest.mark.parametrize(
    ("flags", "variables", "region"),
    [
        ({"kafka_aws_region": "eu-west-1"}, {"AWS_REGION": "us-east-1"}, "eu-west-1"),
        ({}, {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-2"}, "us-east-1"),
        ({}, {"AWS_DEFAULT_REGION": "us-east-2"}, "us-east-2"),
    ],
)
async def test_a_token_is_signed_for_the_region(
    aws: pytest.MonkeyPatch, flags: dict[str, str], variables: dict[str, str], region: str
) -> None:
    for name, value in variables.items():
        aws.setenv(name, value)
    options = connection_options(msk(**flags).kafka)
    assert options["sasl_mechanism"] == "OAUTHBEARER"
    host, query = signed_url(await options["sasl_oauth_token_provider"].token())
    assert host == f"kafka.{region}.amazonaws.com"
    assert query["Action"] == ["kafka-cluster:Connect"]
    assert query["X-Amz-Credential"][0].startswith("AKIDEXAMPLE/")
    assert f"/{region}/kafka-cluster/" in query["X-Amz-Credential"][0]


async def test_aws_tokens_are_signed_off_the_event_loop_and_renewed_before_their_end(
    aws: pytest.MonkeyPatch,
) -> None:
    signed: list[str] = []

    def sign(region: str) -> tuple[str, int]:
        signed.append(threading.current_thread().name)
        return f"token-{len(signed)}", int((time.time() + 1.0) * 1000)

    aws.setattr(MSKAuthTokenProvider, "generate_auth_token", sign)
    tokens = token_provider(msk(kafka_aws_region="eu-west-1").kafka)
    assert {await tokens.token() for _ in range(5)} == {"token-1"}
    begun = time.monotonic()
    while await tokens.token() == "token-1":
        await asyncio.sleep(0.01)
    assert time.monotonic() - begun < 1.0
    assert threading.main_thread().name not in signed


async def test_missing_aws_credentials_are_explained(aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    settings = msk(kafka_aws_region="eu-west-1", kafka_bootstrap_servers=f"127.0.0.1:{free_port()}")
    with pytest.raises(NoToken) as raised:
        await token_provider(settings.kafka).token()
    assert str(raised.value) == (
        "no token for AWS MSK: no AWS credentials in the environment, a profile, or the role of this machine"
    )
    aws.setenv("AWS_PROFILE", "missing")
    with pytest.raises(NoToken, match=r"^no token for AWS MSK: The config profile \(missing\) could not be found$"):
        await token_provider(settings.kafka).token()


def test_a_missing_region_or_package_is_explained(aws: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^AWS_MSK_IAM needs kafka_aws_region, or AWS_REGION in the environment$"):
        connection_options(msk().kafka)
    found = importlib.util.find_spec
    aws.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("aws_msk") else found(name))
    with pytest.raises(SettingsError, match=r"aws-msk-iam-sasl-signer-python: .*pip install 'streamrec\[msk\]'$"):
        connection_options(msk(kafka_aws_region="eu-west-1").kafka)


async def test_a_cancelled_request_leaves_the_tokens_usable() -> None:
    release = asyncio.Event()

    async def request() -> tuple[str, float]:
        await release.wait()
        return "token", 60.0

    tokens = Tokens(request)
    waiting = asyncio.create_task(tokens.token())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    release.set()
    assert await tokens.token() == "token"
