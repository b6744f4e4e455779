"""The daemon while Redis or Kafka is down, with bad records, and at a signal to stop."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from streamrec.errors import KafkaUnavailable
from streamrec.local.process import ServerProcess
from streamrec.local.servers import LocalServers
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings
from streamrec.startup import _stop_in_time

from support.daemon_process import Daemon
from support.kafka_client import feed, feeding, member, wait_caught_up
from support.oracle import assert_delivered
from support.servers import SHORTEST_SESSION_S
from support.waiting import eventually
from support.workload import workload

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]


@pytest.fixture
def where(own: LocalServers, model_dir: Path) -> dict[str, Any]:
    """Return settings of a daemon on servers that the test may stop."""
    return {
        "model_dir": model_dir,
        "kafka_bootstrap_servers": own.kafka_bootstrap_servers,
        "redis_url": own.redis_url,
        "kafka_session_timeout_s": SHORTEST_SESSION_S,
    }


@contextlib.contextmanager
def away(server: ServerProcess, how: str) -> Iterator[None]:
    """Stop, kill or pause the server while the block runs."""
    {"stopped": server.stop, "killed": server.kill, "paused": server.pause}[how]()
    try:
        yield
    finally:
        (server.resume if how == "paused" else server.start)()


async def has_status(daemon: Daemon, path: str, wanted: int) -> bool:
    assert (await daemon.get("/livez"))[0] == 200, "a restart would not help"
    return (await daemon.get(path))[0] == wanted


async def assert_alive_but_not_ready(daemon: Daemon, seconds: float) -> None:
    """Assert that /livez remains green and /readyz red for some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert await daemon.get("/livez") == (200, "ok\n")
        assert (await daemon.get("/readyz"))[0] == 503
        await asyncio.sleep(0.2)


def assert_logged_once(daemon: Daemon, server: str) -> None:
    """Assert that worker and probe each log at most one line when an outage begins, and one when it ends."""
    lines = [line for line in daemon.lines("INFO", "WARNING", "ERROR") if "dead letter" not in line]
    away = [line for line in lines if server in line and "WARNING" in line]
    back = [line for line in lines if "reachable again" in line]
    assert 1 <= len(away) <= 2 and 1 <= len(back) <= 2, daemon.output
    assert "Traceback" not in daemon.output


@pytest.mark.parametrize(("how", "seconds"), [("stopped", 0), ("killed", 0), ("paused", SHORTEST_SESSION_S + 2)])
async def test_an_outage_of_redis_loses_nothing(
    how: str,
    seconds: float,
    own: LocalServers,
    where: dict[str, Any],
    start_daemon: StartDaemon,
    make_settings: MakeSettings,
) -> None:
    where |= {"serving_liveness_timeout_s": 5}
    settings = make_settings(**where)
    async with RedisClient(settings.redis) as redis:
        # so that Redis loses no acknowledged write at SIGKILL; the default loses up to a second
        await redis._call("CONFIG", "SET", "appendfsync", "always")
    async with feeding(settings, seed=4, per_s=150):
        daemon = start_daemon(**where)
        await daemon.wait_handled(200)
        with away(own.redis, how):
            await eventually(lambda: has_status(daemon, "/readyz", 503))
            await assert_alive_but_not_ready(daemon, seconds)
        await eventually(lambda: has_status(daemon, "/readyz", 200))
        await daemon.wait_more(200)
    await wait_caught_up(settings)
    await assert_delivered(settings)
    assert await daemon.metric("streamrec_rebalances_total") == 1, "it remained in its group during the whole outage"
    assert_logged_once(daemon, "Redis")


@pytest.mark.parametrize("how", ["stopped", "killed", "paused"])
async def test_an_outage_of_kafka_loses_nothing(
    how: str, own: LocalServers, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    where |= {
        "serving_liveness_timeout_s": 8,
        "kafka_max_batch": 16,
    }  # the daemon needs 7 s to notice that Kafka is down
    settings = make_settings(**where)
    clicks = workload(5)
    await feed(settings, islice(clicks, 1_500))
    daemon = start_daemon(**where)
    await daemon.wait_handled(100)
    daemon.signal(signal.SIGSTOP)
    with away(own.kafka, how):
        daemon.signal(signal.SIGCONT)
        await eventually(lambda: has_status(daemon, "/readyz", 503))
        await assert_alive_but_not_ready(daemon, 3)
    await eventually(lambda: has_status(daemon, "/readyz", 200))
    await feed(settings, islice(clicks, 500))
    await wait_caught_up(settings)
    await assert_delivered(settings)
    assert_logged_once(daemon, "Kafka")


@pytest.mark.parametrize("how", ["stopped", "paused"])
async def test_a_daemon_that_gets_sigterm_while_kafka_is_down_ends_in_time(
    how: str, own: LocalServers, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    where |= {"kafka_max_batch": 16, "serving_shutdown_timeout_s": 2}
    settings = make_settings(**where)
    await feed(settings, islice(workload(6, bad_share=0.3), 1_500))  # dead letters wait for Kafka too
    daemon = start_daemon(**where)
    await daemon.wait_handled(100)
    daemon.signal(signal.SIGSTOP)
    with away(own.kafka, how):
        daemon.signal(signal.SIGCONT)
        await eventually(lambda: has_status(daemon, "/readyz", 503))
        daemon.signal(signal.SIGTERM)
        assert await daemon.wait_exit(15) == 1
        assert "Traceback" not in daemon.output
    assert await start_daemon("--burst", **where).wait_exit() == 0
    await assert_delivered(settings)


async def test_a_batch_that_waits_for_redis_does_not_delay_a_rebalance(
    own: LocalServers, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(**where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    with away(own.redis, "stopped"):
        await feed(settings, islice(workload(7), 100))
        await eventually(lambda: daemon.has_logged("the batch waits"))
        started = time.monotonic()
        async with member(settings):
            assert time.monotonic() - started < settings.kafka.rebalance_timeout_s / 2
            await eventually(lambda: daemon.has_logged("batch abandoned"))
    await wait_caught_up(settings)
    await assert_delivered(settings)


async def close_as_a_client_that_cancels_its_own_requests() -> None:
    request = asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    request.cancel()
    await request


async def close_as_a_client_that_waits_for_a_broker() -> None:
    await asyncio.sleep(60)


async def close_as_a_client_that_ignores_being_cancelled() -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    await asyncio.sleep(3)


async def close_as_a_client_that_fails() -> None:
    raise KafkaUnavailable("no")


@pytest.mark.parametrize(
    "close",
    [
        close_as_a_client_that_cancels_its_own_requests,
        close_as_a_client_that_waits_for_a_broker,
        close_as_a_client_that_ignores_being_cancelled,
    ],
)
async def test_no_client_delays_the_end_of_the_daemon(
    close: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamrec.startup.CLOSE_TIMEOUT_S", 0.1)
    async with asyncio.timeout(2):
        await _stop_in_time(close)


async def test_a_client_that_cannot_be_closed_says_so() -> None:
    with pytest.raises(KafkaUnavailable):
        await _stop_in_time(close_as_a_client_that_fails)
