"""Who may look: with ``http_token`` set, all but the health checks and the form that asks for it needs the token.

Programs send it as ``Authorization: Bearer TOKEN``, people type it once and get a cookie. Without a token a daemon
on a loopback address answers only requests that name it so: else any web site that lets its own host name point
here (DNS rebinding) could read the page through its visitors' browsers. Every answer forbids scripts, styles and
connections but the daemon's own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from streamrec.setting_groups import HttpSettings

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "static"
COOKIE = "streamrec"
COOKIE_S = 30 * 86_400
OPEN = ("/livez", "/readyz", "/login", "/page/page.css", "/page/icon.svg")
FOR_PROGRAMS = ("/metrics", *OPEN)  # reached under whatever name; they tell nothing of users

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Access:
    """Lets requests through, or not."""

    def __init__(self, settings: HttpSettings) -> None:
        token = settings.token
        self._token = token.get_secret_value().encode() if token else b""
        self._local = not self._token and is_loopback(settings.host)

    def register(self, app: web.Application) -> None:
        """Stand before every handler of an application."""
        app.middlewares.append(self._guard)
        app.on_response_prepare.append(_secure)
        if self._token:
            app.router.add_post("/login", self._log_in)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token and request.path not in OPEN and not self._known(request):
            if request.method == "GET" and request.path == "/":
                return web.FileResponse(PAGE / "login.html", status=401)
            raise web.HTTPUnauthorized(
                text="this daemon wants its http_token, as Authorization: Bearer TOKEN\n",
                headers={"WWW-Authenticate": 'Bearer realm="streamrec"'},
            )
        if self._local and request.path not in FOR_PROGRAMS and not is_loopback(request.url.host or ""):
            raise web.HTTPForbidden(
                text="without STREAMREC_HTTP_TOKEN the page answers under localhost and 127.0.0.1 only\n"
            )
        return await handler(request)

    def _known(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._same(given.strip(), self._token):
            return True
        return self._same(request.cookies.get(COOKIE, ""), self._cookie())

    async def _log_in(self, request: web.Request) -> web.StreamResponse:
        given = (await request.post()).get("token", "")
        if not isinstance(given, str) or not self._same(given.strip(), self._token):
            log.warning("somebody gave a wrong token", extra={"from": request.remote})
            return _see("./#wrong")
        response = _see("./")
        response.set_cookie(
            COOKIE,
            self._cookie().decode(),
            max_age=COOKIE_S,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=request.secure,
        )
        return response

    def _cookie(self) -> bytes:
        """Proves that its bearer knew the token, and does not tell it."""
        return hmac.new(self._token, b"streamrec page", hashlib.sha256).hexdigest().encode()

    @staticmethod
    def _same(given: str, right: bytes) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), right)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, whatever anybody's name server says."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _see(location: str) -> web.Response:
    return web.Response(status=303, headers={"Location": location})


async def _secure(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY_HEADERS)
    response.headers.setdefault("Cache-Control", "no-cache")  # kept by browsers, and asked about each time
