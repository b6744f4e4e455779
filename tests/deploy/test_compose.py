"""Build the image, start compose.yaml on a Docker engine, and make its parts fail under a stream of clicks.

Clicks flow until the fault is over and the daemons share the partitions again. Then every sequence, list and dead
letter must be as the topic demands. The log has the seconds that the daemons needed to commit the rest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from streamrec.registry import Registry
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.compose import Compose, composed
from support.kafka_client import feeding, wait_caught_up
from support.oracle import assert_delivered
from support.waiting import eventually
from support.workload import KNOWN_ITEMS

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
log = logging.getLogger(__name__)

EVENTS, PER_S = 500, 100.0
PATIENCE_S = 600.0  # daemons and tests share the cores


def write_clicks(path: Path) -> Path:
    """Write clicks from which a model learns: item n + 1 follows item n."""
    lines = [
        f"u{user},{KNOWN_ITEMS[(user + step) % len(KNOWN_ITEMS)]},{1_600_000_000_000 + 60_000 * (20 * user + step)}"
        for user in range(100)
        for step in range(20)
    ]
    path.write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    return path


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    with composed(tmp_path, write_clicks(tmp_path / "clicks.csv")) as compose:
        yield compose


async def test_users_have_what_the_topic_demands_after_each_fault(compose: Compose, tmp_path: Path) -> None:
    await compose.run("up", "--build", "--detach")
    await eventually(lambda: healthy(compose), PATIENCE_S, every_s=1)
    await eventually(lambda: scraped(compose), PATIENCE_S, every_s=1)
    await compose.run("run", "--rm", "--no-deps", "retrain", "check")
    settings = await settings_of(compose, tmp_path)
    for seed, (name, fault) in enumerate(faults(compose, settings).items()):
        began = time.monotonic()
        async with feeding(settings, seed, PER_S, EVENTS):
            await fault()
            daemons = len(await compose.containers("serve"))
            await eventually(lambda: stable(settings, daemons), PATIENCE_S)  # noqa: B023
        ended = time.monotonic()
        await wait_caught_up(settings, PATIENCE_S)
        now = time.monotonic()
        log.info("%s: clicks for %.1f s, all committed %.1f s later", name, ended - began, now - ended)
        await assert_delivered(settings)


def faults(compose: Compose, settings: Settings) -> dict[str, Callable[[], Awaitable[object]]]:
    async def kill_daemons() -> None:
        for container in await compose.containers("serve"):
            await compose.kill_processes(container)

    async def kill(service: str) -> None:
        await compose.run("kill", service)
        await compose.run("start", service)

    async def cut_off() -> None:
        async with compose.cut_off((await compose.containers("serve"))[0]):
            await eventually(lambda: stable(settings, 1), PATIENCE_S)

    return {
        "no fault": lambda: asyncio.sleep(0),
        "both daemons killed": kill_daemons,
        "broker restarted": lambda: compose.run("restart", "kafka"),
        "broker killed": lambda: kill("kafka"),
        "a daemon cut off its network, and joined again": cut_off,
        "Redis killed": lambda: kill("redis"),
        "daemons replaced": lambda: compose.run("up", "--detach", "--force-recreate", "--no-deps", "serve"),
        "a third daemon": lambda: compose.run("up", "--detach", "--scale", "serve=3", "--no-recreate"),
    }


async def healthy(compose: Compose) -> bool:
    lines = (await compose.run("ps", "--format", "json")).splitlines()
    found = [(service["State"], service["Health"]) for service in map(json.loads, lines)]
    return bool(found) and all(state == "running" and health in ("healthy", "") for state, health in found)


async def scraped(compose: Compose) -> bool:
    """Return whether Prometheus scrapes two daemons, the retraining worker and Redis' exporter."""
    query = ("promtool", "query", "instant", "http://localhost:9090", "up")
    found = (await compose.run("exec", "--no-TTY", "prometheus", *query)).splitlines()
    return len(found) == 4 and all("=> 1 @" in line for line in found)


async def settings_of(compose: Compose, folder: Path) -> Settings:
    """Return the settings of a client, with a copy of the champion for the oracle."""
    await compose.run("cp", "serve:/registry", str(folder / "registry"))
    champion = Registry(folder / "registry").champion()
    assert champion is not None
    return load_settings(
        flags={
            "kafka_bootstrap_servers": compose.kafka_bootstrap_servers,
            "redis_url": compose.redis_url,
            "redis_password": compose.redis_password,
            "model_dir": folder / "registry" / "versions" / champion.version,
        }
    )


async def stable(settings: Settings, members: int) -> bool:
    """Return whether the group has this number of members and no rebalance."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    try:
        await admin.start()
        (answer,) = await admin.describe_consumer_groups([settings.kafka.group])
    except KafkaError:
        return False
    finally:
        await admin.close()
    ((_, _, state, _, _, found, *_),) = answer.groups
    return state == "Stable" and len(found) == members
