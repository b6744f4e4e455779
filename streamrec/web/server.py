"""The HTTP port: /metrics for Prometheus, /livez and /readyz for supervisors, and further routes."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Protocol

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from streamrec.errors import SettingsError
from streamrec.health import Loops
from streamrec.setting_groups import HttpSettings
from streamrec.web.access import Access, is_loopback

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0  # for open requests
MAX_BODY_BYTES = 16 * 1024


class Exposed(Protocol):
    """The metrics of a process."""

    def exposition(self) -> bytes:
        """Return the response to /metrics."""


class Probes(Protocol):
    """The health of a process: a text is a problem."""

    loops: Loops

    def not_alive(self) -> str | None:
        """Return why a restart would help."""

    def not_ready(self) -> str | None:
        """Return why the process does not do its work now."""


class Routes(Protocol):
    """Further routes of a process."""

    def register(self, app: web.Application) -> None:
        """Add the routes to an application."""


class WebServer:
    """The HTTP server of a process; access.py says who may read what.

    Args:
        health: decides /livez and /readyz.
        chosen: whether the port was set by hand; a default port that is taken is replaced by a free one.
        variable: name of the environment variable that sets the port.
    """

    def __init__(
        self,
        settings: HttpSettings,
        metrics: Exposed,
        health: Probes,
        chosen: bool = True,
        variable: str = "STREAMREC_HTTP_PORT",
    ) -> None:
        self._settings = settings
        self._chosen = chosen
        self._variable = variable
        self._metrics = metrics
        self._health = health
        self._runner = self._runner_of(None)
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen, and return the address.

        Raises:
            SettingsError: the process cannot listen on the host and port of the settings.
        """
        await self._runner.setup()
        host, port = self._settings.host, self._settings.port
        try:
            await self._listen(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or self._chosen:
                await self._runner.cleanup()
                remedy = f"set {self._variable} (0: any free port)"
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    remedy = "set STREAMREC_HTTP_HOST to an address of this machine"
                raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
            log.info("port is taken, using a free one; set %s to choose", self._variable, extra={"port": port})
            await self._listen(host, 0)
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def show(self, routes: Routes) -> None:
        """Serve further routes too, which show data of users."""
        host, port = self._settings.host, self._settings.port
        if not self._settings.token and not is_loopback(host):
            log.warning(
                "everyone who can reach this port can read what users click: set STREAMREC_HTTP_TOKEN",
                extra={"host": host, "port": port},
            )
        runner = self._runner_of(routes)
        await runner.setup()
        before, self._runner = self._runner, runner
        await before.cleanup()

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()

    def _runner_of(self, routes: Routes | None) -> web.AppRunner:
        """Return the runner of a new application: the routes of a running one cannot change."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        Access(self._settings).register(app)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/livez", self._get_livez)
        app.router.add_get("/readyz", self._get_readyz)
        if routes is not None:
            routes.register(app)
        else:
            app.router.add_get("/", self._get_readyz)  # why there is no page yet
        return web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_TIMEOUT_S)

    async def _listen(self, host: str, port: int) -> None:
        def connected() -> asyncio.BaseProtocol:
            assert self._runner.server is not None
            return self._runner.server()

        self._server = await asyncio.get_running_loop().create_server(connected, host, port, reuse_address=True)

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _get_livez(self, _: web.Request) -> web.Response:
        return _response(self._health.not_alive(), None)

    async def _get_readyz(self, _: web.Request) -> web.Response:
        return _response(self._health.not_ready(), self._health.loops.remark())


def _response(problem: str | None, remark: str | None) -> web.Response:
    text = problem or (f"ok; {remark}" if remark else "ok")
    return web.Response(text=f"{text}\n", status=503 if problem else 200)
