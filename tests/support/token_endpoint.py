"""The token endpoint of an identity provider. Its tokens have no signature; Kafka's unsecured logins believe them."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import BasicAuth, web

from support.certificates import HOST


@dataclass
class TokenEndpoint:
    """Issues tokens; the client's id is the principal at Kafka.

    Args:
        life_s: life of its tokens.
        answer: status and text to answer instead of a token.
    """

    secret: str = "s3cr3t-right"
    life_s: float = 60.0
    answer: tuple[int, str] | None = None
    url: str = ""
    issued: list[tuple[str, str]] = field(default_factory=list)  # client and scope

    @contextlib.asynccontextmanager
    async def listening(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[TokenEndpoint]:
        application = web.Application()
        application.router.add_post("/token", self._issue)
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            await web.TCPSite(runner, HOST, 0, ssl_context=tls).start()
            port = runner.addresses[0][1]
            self.url = f"{'https' if tls else 'http'}://{HOST}:{port}/token"
            yield self
        finally:
            await runner.cleanup()

    def login(self, client_id: str, **more: Any) -> dict[str, Any]:
        """Return the settings of a client's login."""
        oauth = {"token_url": self.url, "client_id": client_id, "client_secret": self.secret}
        names = {f"kafka_oauth_{name}": value for name, value in oauth.items()}
        return {"kafka_sasl_mechanism": "OAUTHBEARER"} | names | more

    async def _issue(self, request: web.Request) -> web.Response:
        if self.answer is not None:
            return web.Response(status=self.answer[0], text=self.answer[1], content_type="application/json")
        form = await request.post()
        client = BasicAuth.decode(request.headers["Authorization"])
        if client.password != self.secret:
            return web.json_response({"error": "invalid_client", "error_description": self.secret}, status=401)
        if form["grant_type"] != "client_credentials":
            return web.json_response({"error": "unsupported_grant_type"}, status=400)
        self.issued.append((client.login, str(form.get("scope", ""))))
        token = self._token(client.login)
        return web.json_response({"access_token": token, "token_type": "Bearer", "expires_in": self.life_s})

    def _token(self, client_id: str) -> str:
        now_s = time.time()
        claims = {"sub": client_id, "iat": now_s, "exp": now_s + self.life_s}
        return f"{_encoded({'alg': 'none'})}.{_encoded(claims)}."


def _encoded(part: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
