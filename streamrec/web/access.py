"""Access control of the HTTP port.

With ``http_token`` set, every path but the health checks and the login form requires the token. Programs send it as
``Authorization: Bearer TOKEN``; people type it once and get a cookie. An address that sends many wrong ones must wait.
Without a token a daemon on a loopback address
answers only requests for a loopback host name: otherwise a web site whose own name resolves to this machine (DNS
rebinding) could read the page through its visitors' browsers. The headers of every response forbid scripts, styles
and connections from elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import math
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from streamrec.setting_groups import HttpSettings
from streamrec.web.tries import Tries

log = logging.getLogger(__name__)

STATIC_FOLDER = Path(__file__).parent / "static"
COOKIE = "streamrec"
COOKIE_MAX_AGE_S = 30 * 86_400
MAX_LOGINS, MAX_BEARERS = 10, 100  # wrong tokens of an address in a minute, in the form and in headers
PUBLIC_PATHS = ("/livez", "/readyz", "/login", "/page/page.css", "/page/icon.svg")
ANY_HOST_PATHS = ("/metrics", *PUBLIC_PATHS)  # for programs, under any host name; they reveal nothing about users

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Access:
    """The check that every request must pass."""

    def __init__(self, settings: HttpSettings) -> None:
        token = settings.token
        self._token = token.get_secret_value().encode() if token else b""
        self._logins, self._bearers = Tries(MAX_LOGINS), Tries(MAX_BEARERS)
        self._loopback_only = not self._token and is_loopback(settings.host)

    def register(self, app: web.Application) -> None:
        """Check the requests of an application, and secure its responses."""
        app.middlewares.append(self._check)
        app.on_response_prepare.append(_add_security_headers)
        if self._token:
            app.router.add_post("/login", self._log_in)

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token and request.path not in PUBLIC_PATHS and not self._has_token(request):
            if "Authorization" in request.headers:
                self._bearers.failed(request.remote)
            if request.method == "GET" and request.path == "/":
                return web.FileResponse(STATIC_FOLDER / "login.html", status=401)
            raise web.HTTPUnauthorized(
                text="this daemon requires its http_token: send Authorization: Bearer TOKEN\n",
                headers={"WWW-Authenticate": 'Bearer realm="streamrec"'},
            )
        if self._loopback_only and request.path not in ANY_HOST_PATHS and not is_loopback(request.url.host or ""):
            raise web.HTTPForbidden(
                text="without STREAMREC_HTTP_TOKEN the page answers under localhost and 127.0.0.1 only\n"
            )
        return await handler(request)

    def _has_token(self, request: web.Request) -> bool:
        if _equal(request.cookies.get(COOKIE, ""), self._cookie()):
            return True
        if "Authorization" not in request.headers:
            return False
        _limit(self._bearers, request)
        scheme, _, credentials = request.headers["Authorization"].partition(" ")
        return scheme.lower() == "bearer" and _equal(credentials.strip(), self._token)

    async def _log_in(self, request: web.Request) -> web.StreamResponse:
        _limit(self._logins, request)
        token = (await request.post()).get("token", "")
        if not isinstance(token, str) or not _equal(token.strip(), self._token):
            self._logins.failed(request.remote)
            log.warning("login refused: wrong token", extra={"from": request.remote})
            return _redirect("./#wrong")
        response = _redirect("./")
        response.set_cookie(
            COOKIE,
            self._cookie().decode(),
            max_age=COOKIE_MAX_AGE_S,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=request.secure,
        )
        return response

    def _cookie(self) -> bytes:
        """Return the value that proves knowledge of the token without revealing it."""
        return hmac.new(self._token, b"streamrec page", hashlib.sha256).hexdigest().encode()


def _limit(tries: Tries, request: web.Request) -> None:
    """Refuse a request whose address has sent too many wrong tokens, without looking at this one."""
    wait_s = math.ceil(tries.wait_s(request.remote))
    if wait_s:
        raise web.HTTPTooManyRequests(
            text=f"too many wrong tokens from this address: try again in {wait_s} s\n",
            headers={"Retry-After": str(wait_s)},
        )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is a loopback one; names are not resolved."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _equal(text: str, secret: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(text.encode(errors="replace"), secret)


def _redirect(location: str) -> web.Response:
    return web.Response(status=303, headers={"Location": location})


async def _add_security_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY_HEADERS)
    response.headers.setdefault("Cache-Control", "no-cache")  # browsers may store it, but must revalidate it
