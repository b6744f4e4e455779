"""Tokens for SASL OAUTHBEARER: from the token endpoint of an identity provider, or signed with AWS credentials.

A client asks for a token whenever it connects. A broker ends a connection whose token has expired, and the client
connects again: so each token is renewed before its end.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import logging
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaError

from streamrec.errors import SettingsError
from streamrec.setting_groups import KafkaSettings, OAuthSettings, TlsSettings
from streamrec.tls import TOKEN_ENDPOINT, tls_context, tls_problem

log = logging.getLogger(__name__)

RENEWED_AFTER = 0.8  # share of a token's life
REQUEST_TIMEOUT_S = 5.0
INSTALL_HINT = "install it with: pip install 'streamrec[msk]'"


class NoToken(KafkaError):  # type: ignore[misc]
    """There is no token; the message is for the operator. The client retries, as after other Kafka errors."""

    def __str__(self) -> str:
        return str(self.args[0])


class TokenRefused(NoToken):
    """Credentials or settings are wrong; only an operator can fix this."""


class Tokens(AbstractTokenProvider):  # type: ignore[misc]
    """Returns the current token, and renews it.

    Args:
        request: returns a new token, and how many seconds it lives.
    """

    def __init__(self, request: Callable[[], Awaitable[tuple[str, float]]]) -> None:
        self._request = request
        self._lock = asyncio.Lock()
        self._token = ""
        self._renewal_s = self._end_s = -1.0  # monotonic

    async def token(self) -> str:
        """Return a token that is valid now.

        Raises:
            NoToken: the last one is over, and no new one can be had.
        """
        async with self._lock:
            now_s = time.monotonic()
            if now_s >= self._renewal_s:
                try:
                    self._token, life_s = await self._request()
                except NoToken as error:
                    if now_s >= self._end_s:
                        raise
                    log.warning("%s; the last token is used until its end", error)
                else:
                    self._renewal_s, self._end_s = now_s + RENEWED_AFTER * life_s, now_s + life_s
            return self._token


def token_provider(kafka: KafkaSettings) -> Tokens:
    """Return the tokens of the mechanism that is set.

    Raises:
        SettingsError: the CA file cannot be read, or region or package of AWS MSK are missing.
    """
    if kafka.sasl_mechanism == "AWS_MSK_IAM":
        region = kafka.aws_region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not region:
            raise SettingsError("AWS_MSK_IAM needs kafka_aws_region, or AWS_REGION in the environment")
        if importlib.util.find_spec("aws_msk_iam_sasl_signer") is None:
            raise SettingsError(f"AWS_MSK_IAM needs the package aws-msk-iam-sasl-signer-python: {INSTALL_HINT}")
        return Tokens(lambda: asyncio.to_thread(_signed, region))
    files = TlsSettings(ca_file=kafka.oauth.tls_ca_file)
    context = tls_context(files, TOKEN_ENDPOINT)
    return Tokens(lambda: _requested(kafka.oauth, files, context))


async def _requested(oauth: OAuthSettings, files: TlsSettings, context: ssl.SSLContext) -> tuple[str, float]:
    """Request a token with the client's credentials (RFC 6749, section 4.4); return it and its life in seconds."""
    assert oauth.token_url and oauth.client_secret
    form = {"grant_type": "client_credentials"} | ({"scope": oauth.scope} if oauth.scope else {})
    secret = f"{oauth.client_id}:{oauth.client_secret.get_secret_value()}"
    headers = {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}", "Accept": "application/json"}
    limit = aiohttp.ClientTimeout(REQUEST_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=limit) as http,
            # a redirection would take the secret elsewhere
            http.post(oauth.token_url, data=form, headers=headers, ssl=context, allow_redirects=False) as answer,
        ):
            status, text = answer.status, await answer.text(errors="replace")
    except TimeoutError:
        raise NoToken(f"no token from {oauth.token_url}: it does not answer within {REQUEST_TIMEOUT_S:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        why = error.__cause__ or error  # aiohttp's own errors are TLS errors without their reason
        problem = tls_problem(why, TOKEN_ENDPOINT, files)
        if problem:
            raise TokenRefused(f"no token from {oauth.token_url}: {problem}") from None
        raise NoToken(
            f"no token from {oauth.token_url}: it cannot be reached ({why}); is STREAMREC_KAFKA_OAUTH_TOKEN_URL right?"
        ) from None
    return _token_in(oauth, status, text)


def _token_in(oauth: OAuthSettings, status: int, text: str) -> tuple[str, float]:
    """Return the token of an answer and its life in seconds; a token without one is used once.

    Raises:
        NoToken: it has none; the rest of the answer is not repeated, it may contain secrets.
    """
    try:
        answer: Any = json.loads(text)
    except ValueError:
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    token, life_s, code = answer.get("access_token"), answer.get("expires_in"), str(answer.get("error", ""))
    if status == 200 and isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token):
        try:
            return token, float(life_s or 0)
        except (TypeError, ValueError):
            return token, 0.0
    said = f"{status} {code}" if re.fullmatch(r"[a-z_]{1,40}", code) else str(status)
    if status == 401 or code in ("invalid_client", "unauthorized_client"):
        problem = (
            f"it refuses client {oauth.client_id} or its secret ({said}): set STREAMREC_KAFKA_OAUTH_CLIENT_ID and "
            "STREAMREC_KAFKA_OAUTH_CLIENT_SECRET, or ..._CLIENT_SECRET_FILE"
        )
    elif status == 200:
        problem = "its answer has no access_token; is STREAMREC_KAFKA_OAUTH_TOKEN_URL the token endpoint?"
    else:
        problem = f"it answers {said}; see STREAMREC_KAFKA_OAUTH_TOKEN_URL and STREAMREC_KAFKA_OAUTH_SCOPE"
    kind = NoToken if status >= 500 or status == 429 else TokenRefused  # too many requests
    raise kind(f"no token from {oauth.token_url}: {problem}")


def _signed(region: str) -> tuple[str, float]:
    """Sign a token with the AWS credentials of this process; return it and its life in seconds. It may block."""
    from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        token, end_ms = MSKAuthTokenProvider.generate_auth_token(region)
    except (BotoCoreError, ClientError) as error:
        raise NoToken(f"no token for AWS MSK: {error}") from None
    except (AttributeError, ValueError):  # what the signer raises where AWS's library finds no credentials
        raise TokenRefused(
            "no token for AWS MSK: no AWS credentials in the environment, a profile, or the role of this machine"
        ) from None
    return token, end_ms / 1000 - time.time()
