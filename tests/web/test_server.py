"""The HTTP server of a process: metrics, health checks, ports."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from aiohttp import ClientSession

from streamrec.errors import SettingsError
from streamrec.health import Health
from streamrec.metrics import Metrics
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings
from streamrec.web.server import WebServer

MakeSettings = Callable[..., Settings]


def server_of(settings: Settings, health: Health | None = None) -> WebServer:
    return WebServer(settings.http, Metrics(), health or Health(60, 60), chosen="http_port" in settings.given)


@contextlib.asynccontextmanager
async def serving(settings: Settings, health: Health | None = None) -> AsyncIterator[str]:
    server = server_of(settings, health)
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop()


async def get(url: str) -> tuple[int, str, str]:
    """Return status, content type and text."""
    async with ClientSession() as session, session.get(url) as response:
        return response.status, response.headers["Content-Type"], await response.text()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Listen on a port, and yield it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port: int = other.getsockname()[1]
        yield port


async def test_metrics_are_in_prometheus_text_format(make_settings: MakeSettings) -> None:
    async with serving(make_settings()) as address:
        status, content_type, text = await get(f"{address}/metrics")
    assert (status, content_type.split(";")[0]) == (200, "text/plain")
    assert "# TYPE streamrec_events_total counter" in text


async def test_probes_follow_the_health(make_settings: MakeSettings) -> None:
    health = Health(60, 60)
    async with serving(make_settings(), health) as address:
        live = await get(f"{address}/livez")
        assert (live[0], live[2]) == (200, "ok\n")
        ready = await get(f"{address}/readyz")
        assert (ready[0], ready[2]) == (503, "the model is not warm yet\n")
        health.model_warm = health.joined = True
        assert (await get(f"{address}/readyz"))[0] == 200
        health.last_tick_s -= 100
        live = await get(f"{address}/livez")
        assert live[0] == 503
        assert "has not polled for 10" in live[2]  # seconds, and what the machine took meanwhile


async def test_other_paths_are_not_found(make_settings: MakeSettings) -> None:
    async with serving(make_settings()) as address:
        assert (await get(f"{address}/page"))[0] == 404


async def test_port_0_is_any_free_port_so_that_two_daemons_run_side_by_side(make_settings: MakeSettings) -> None:
    async with serving(make_settings()) as one, serving(make_settings()) as two:
        assert one != two
        assert {(await get(f"{address}/livez"))[0] for address in (one, two)} == {200}


async def test_a_port_is_free_again_after_stop(make_settings: MakeSettings) -> None:
    async with serving(make_settings()) as address:
        port = int(address.rsplit(":", 1)[1])
    async with serving(make_settings(http_port=port)) as again:
        assert again == f"http://127.0.0.1:{port}"


async def test_a_taken_port_that_was_set_is_an_error_that_names_the_setting(
    make_settings: MakeSettings, taken_port: int
) -> None:
    server = server_of(make_settings(http_port=taken_port))
    with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{taken_port}: .*STREAMREC_HTTP_PORT"):
        await server.start()


async def test_a_taken_default_port_is_replaced_by_a_free_one(caplog: pytest.LogCaptureFixture) -> None:
    settings = load_settings()
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.socket())
        with contextlib.suppress(OSError):  # already taken by another process, which serves as well
            other.bind((settings.http.host, settings.http.port))
            other.listen()
        with caplog.at_level(logging.INFO):
            async with serving(settings) as address:
                assert not address.endswith(f":{settings.http.port}")
                assert (await get(f"{address}/livez"))[0] == 200
    assert "STREAMREC_HTTP_PORT" in caplog.text


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
async def test_an_address_of_another_machine_is_an_error_that_names_it(make_settings: MakeSettings, host: str) -> None:
    with pytest.raises(SettingsError, match=f"cannot listen on {host}:0: .*STREAMREC_HTTP_HOST"):
        await server_of(make_settings(http_host=host)).start()


async def test_an_ipv6_address_is_written_in_brackets(make_settings: MakeSettings) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    async with serving(make_settings(http_host="::1")) as address:
        assert address.startswith("http://[::1]:")
        assert (await get(f"{address}/livez"))[0] == 200
