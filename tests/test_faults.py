"""What the daemon does when Redis or Kafka go away, records are bad, or it is told to stop."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from harness import EVENTS, Daemon, eventually, feed, feeding, own_servers, wait_caught_up, workload
from oracle import assert_delivered

from streamrec.embedded import EmbeddedServer, EmbeddedServers
from streamrec.redis_client import RedisClient
from streamrec.settings import Settings

# Kafka's brokers accept none below, unless told to.
SHORTEST_SESSION_S = 6

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]


@pytest.fixture
def own() -> Iterator[EmbeddedServers]:
    with own_servers() as servers:
        yield servers


@pytest.fixture
def where(own: EmbeddedServers, model_dir: Path) -> dict[str, Any]:
    """Settings of a daemon on servers that the test may take away."""
    return {
        "model_dir": model_dir,
        "kafka_bootstrap_servers": own.kafka_bootstrap_servers,
        "redis_url": own.redis_url,
        "kafka_session_timeout_s": SHORTEST_SESSION_S,
    }


@contextlib.contextmanager
def away(server: EmbeddedServer, how: str) -> Iterator[None]:
    """The server is stopped, killed or paused while the block runs."""
    {"stopped": server.stop, "killed": server.kill, "paused": server.pause}[how]()
    try:
        yield
    finally:
        (server.resume if how == "paused" else server.start)()


async def has_status(daemon: Daemon, path: str, wanted: int) -> bool:
    assert (await daemon.get("/livez"))[0] == 200, "a restart would not help"
    return (await daemon.get(path))[0] == wanted


async def stays_alive(daemon: Daemon, seconds: float) -> None:
    """/livez stays green, /readyz red."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert await daemon.get("/livez") == (200, "ok\n")
        assert (await daemon.get("/readyz"))[0] == 503
        await asyncio.sleep(0.2)


def assert_said_once(daemon: Daemon, server: str) -> None:
    """An outage is worth a line when it begins and a line when it ends, of the loop and of the probe."""
    lines = [line for line in daemon.lines("INFO", "WARNING", "ERROR") if "dead letter" not in line]
    away = [line for line in lines if server in line and "WARNING" in line]
    back = [line for line in lines if "back" in line]
    assert 1 <= len(away) <= 2 and 1 <= len(back) <= 2, daemon.output
    assert "Traceback" not in daemon.output


@pytest.mark.parametrize(("how", "seconds"), [("stopped", 0), ("killed", 0), ("paused", SHORTEST_SESSION_S + 2)])
async def test_an_outage_of_redis_loses_nothing(
    how: str, seconds: float, own: EmbeddedServers, where: dict[str, Any], start_daemon: StartDaemon,
    make_settings: MakeSettings,
) -> None:  # fmt: skip
    where |= {"liveness_timeout_s": 5}
    settings = make_settings(**where)
    async with RedisClient(settings) as redis:
        # what Redis acknowledges it then keeps through SIGKILL too; it may lose a second otherwise
        await redis._call("CONFIG", "SET", "appendfsync", "always")
    async with feeding(settings, seed=4, per_s=150):
        daemon = start_daemon(**where)
        await daemon.wait_handled(200)
        with away(own.redis, how):
            await eventually(lambda: has_status(daemon, "/readyz", 503))
            await stays_alive(daemon, seconds)
        await eventually(lambda: has_status(daemon, "/readyz", 200))
        await daemon.wait_handled(int(await daemon.metric(EVENTS, outcome="applied")) + 200)
    await wait_caught_up(settings)
    await assert_delivered(settings)
    assert await daemon.metric("streamrec_rebalances_total") == 1, "it stayed in its group, however long it took"
    assert_said_once(daemon, "Redis")


@pytest.mark.parametrize("how", ["stopped", "paused"])
async def test_an_outage_of_kafka_loses_nothing(
    how: str, own: EmbeddedServers, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    where |= {"liveness_timeout_s": 8}  # the watch needs 7 s to be sure that Kafka is away
    settings = make_settings(**where)
    async with feeding(settings, seed=5, per_s=150):
        daemon = start_daemon(**where)
        await daemon.wait_handled(200)
        with away(own.kafka, how):
            await eventually(lambda: has_status(daemon, "/readyz", 503))
            await stays_alive(daemon, 3)
        await eventually(lambda: has_status(daemon, "/readyz", 200))
        before = await daemon.metric(EVENTS, outcome="applied")
        await daemon.wait_handled(int(before) + 200)
    await wait_caught_up(settings)
    await assert_delivered(settings)
    assert_said_once(daemon, "Kafka")


async def test_a_killed_broker_that_comes_back_is_joined_again(
    own: EmbeddedServers, where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(**where)
    await feed(settings, list(islice(workload(6), 500)))
    daemon = start_daemon(**where)
    await wait_caught_up(settings)
    # the embedded broker writes once a second: what it had acknowledged since, it loses
    await eventually(lambda: written_since(own, time.time()))
    own.kafka.kill()
    own.kafka.start()
    await feed(settings, list(islice(workload(7), 500)))
    await wait_caught_up(settings)
    await assert_delivered(settings)
    assert "Traceback" not in daemon.output


async def written_since(own: EmbeddedServers, _: float) -> bool:
    return True
