"""Freshness through faults: how long clicks wait for their list while something dies, moves or changes.

Two daemons read one topic; users click in turn at a fixed rate, and 24 s later the fault strikes. A reader in this
process follows one user in five, and reads the lists of those who wait. The time runs from the moment at which a click
was due (its record's timestamp) to the moment at which a GET has returned a list that contains the click: the reader
polls every 4 ms, every 20 ms while more than 50 users wait. At the end every user has every click once.

`make freshness KAFKA_HOME=...` runs all faults in about 10 minutes, or some: ARGS='-k broker'. It writes
build/freshness.json and .md, and draws .github/freshness.png. FRESHNESS_PER_S is the rate [1500], FRESHNESS_AFTER_S the
length after the fault [40].
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis.asyncio as redis
from redis.asyncio.sentinel import Sentinel

from sasrec import SASRec
from streamrec.bench.engine import SHAPES, Subject, random_model
from streamrec.bench.run import machine, versions
from streamrec.bench.users import fill_windows
from streamrec.kafka.topics import ensure_topics
from streamrec.local.apache_kafka import apache_kafka, release
from streamrec.local.daemon import DaemonProcess, environment
from streamrec.local.process import ServerProcess, die_with_parent, free_port
from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings
from streamrec.source import git

from support.due_clicks import ListReader, Schedule, producing
from support.freshness import draw, figures, table
from support.kafka_cluster import kafka_cluster
from support.redis_sentinels import NAME, WatchedServers, watched
from support.servers import apache_kafka_home, own_redis_server
from support.waiting import eventually

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.study, pytest.mark.timeout(400)]

PER_S = float(os.environ.get("FRESHNESS_PER_S", "1500"))
AFTER_S = float(os.environ.get("FRESHNESS_AFTER_S", "40"))
WARM_UP_S, BEFORE_S = 12.0, 12.0  # at first each user is encoded whole
PATIENCE_S = 90.0
USERS = 2_000
DOWN_AFTER_MS = 5_000  # as deploy/REDIS.md recommends


@dataclass
class Stage:
    """Everything that runs, and what happened."""

    settings: Settings
    brokers: list[ServerProcess]
    registry: Registry
    versions: list[str]
    redis: RedisClient
    sentinels: WatchedServers | None
    folder: Path
    http: aiohttp.ClientSession
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    addresses: dict[int, DaemonProcess] = field(default_factory=dict)  # by process id
    marks: list[tuple[float, str]] = field(default_factory=list)  # the first one is the fault

    def mark(self, text: str) -> None:
        self.marks.append((time.time(), text))
        log.info("%s", text)

    def start_daemon(self) -> subprocess.Popen[bytes]:
        """Start a daemon as an operator does: a Python process that imports everything first."""
        settings = load_settings(flags=self.settings.given | {"http_port": free_port()})
        with (self.folder / "daemons.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "streamrec", "serve"],
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        self.daemons.append(process)
        self.addresses[process.pid] = DaemonProcess(settings, process)
        return process

    async def wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        await self.addresses[process.pid].wait_ready(self.http)


async def kill_a_daemon(stage: Stage) -> None:
    stage.mark("killed")
    stage.daemons[0].kill()


async def kill_a_daemon_that_is_started_again(stage: Stage) -> None:
    await kill_a_daemon(stage)
    await stage.wait_ready(stage.start_daemon())
    stage.mark("ready again")


async def start_another_daemon(stage: Stage) -> None:
    stage.mark("started")
    await stage.wait_ready(stage.start_daemon())
    stage.mark("ready")


async def stop_a_daemon(stage: Stage) -> None:
    stage.mark("SIGTERM")
    stage.daemons[0].send_signal(signal.SIGTERM)
    await asyncio.to_thread(stage.daemons[0].wait)
    stage.mark("has left")


async def kill_the_broker(stage: Stage) -> None:
    stage.mark("killed")
    broker = stage.brokers[0]
    broker.kill()
    await asyncio.to_thread(broker.start)
    stage.mark("answers again")


async def kill_one_broker_of_three(stage: Stage) -> None:
    stage.mark("killed")
    stage.brokers[0].kill()


async def kill_the_primary(stage: Stage) -> None:
    assert stage.sentinels is not None
    former = await stage.sentinels.primary()
    stage.mark("killed")
    former.kill()
    await stage.sentinels.wait_failed_over(former)
    stage.mark("replica promoted")


async def swap_the_model(stage: Stage) -> None:
    stage.mark("promoted")
    stage.registry.promote(stage.versions[1], "the study")
    await stage.redis.notify(stage.redis.keys.models_channel, stage.versions[1])

    async def is_served_by_all() -> bool:
        readings = [await stage.addresses[daemon.pid].read(stage.http) for daemon in stage.daemons]
        return all(reading is not None and reading.version == stage.versions[1] for reading in readings)

    await eventually(is_served_by_all, every_s=0.2)
    stage.mark("both serve it")


@dataclass(frozen=True)
class Fault:
    """What strikes, and on what."""

    title: str
    strike: Callable[[Stage], Awaitable[None]]
    daemons: int = 2
    brokers: int = 1
    sentinels: bool = False


FAULTS = {
    "daemon-killed": Fault("SIGKILL of one of two daemons", kill_a_daemon),
    "daemon-restarted": Fault("SIGKILL of a daemon, started again at once", kill_a_daemon_that_is_started_again),
    "daemon-joins": Fault("a second daemon joins", start_another_daemon, daemons=1),
    "daemon-leaves": Fault("one of two daemons is stopped (SIGTERM)", stop_a_daemon),
    "broker-killed": Fault("SIGKILL of the only broker, started again at once", kill_the_broker),
    "broker-of-three": Fault("SIGKILL of one of three brokers", kill_one_broker_of_three, brokers=3),
    "redis-failover": Fault("SIGKILL of the Redis primary, failover by Sentinel", kill_the_primary, sentinels=True),
    "model-swap": Fault("a new model becomes champion", swap_the_model),
}


@contextlib.asynccontextmanager
async def stage_for(fault: Fault, subject: Subject, folder: Path) -> AsyncIterator[Stage]:
    """Run servers and daemons for a fault."""
    home = apache_kafka_home()
    flags: dict[str, Any] = {"registry_dir": folder / "models", "kafka_replication_factor": fault.brokers}
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        running = kafka_cluster if fault.brokers > 1 else one_broker
        brokers = stack.enter_context(running(home, folder / "kafka"))
        flags["kafka_bootstrap_servers"] = ",".join(f"127.0.0.1:{broker.port}" for broker in brokers)
        sentinels = None
        if fault.sentinels:
            sentinels = await stack.enter_async_context(watched(replicas=2, down_after_ms=DOWN_AFTER_MS))
            flags |= {"redis_url": sentinels.redis_url, "redis_wait_replicas": 1}
        else:
            flags["redis_url"] = stack.enter_context(own_redis_server()).redis_url
        settings = load_settings(flags=flags)
        registry = Registry(folder / "models")
        other = SASRec(subject.model.config).eval()  # of other random weights, so of another version
        models = [registry.publish(model, subject.vocab) for model in (subject.model, other)]
        assert models[0] != models[1]
        registry.promote(models[0], "the study")
        client = await stack.enter_async_context(RedisClient(settings.redis))
        stage = Stage(settings, brokers, registry, models, client, sentinels, folder, http)
        stack.callback(end_all, stage.daemons)
        await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
        yield stage


@contextlib.contextmanager
def one_broker(home: Path, folder: Path) -> Iterator[list[ServerProcess]]:
    broker = apache_kafka(home, folder)
    broker.start()
    try:
        yield [broker]
    finally:
        broker.kill()


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def reader_client(stage: Stage) -> AsyncIterator[redis.Redis]:
    """Connect to Redis as an application does."""
    async with contextlib.AsyncExitStack() as stack:
        if stage.sentinels is None:
            client = redis.Redis.from_url(stage.settings.redis.url.get_secret_value())
        else:
            addresses = [("127.0.0.1", sentinel.port) for sentinel in stage.sentinels.sentinels]
            sentinel = Sentinel(addresses, socket_timeout=0.5)
            stack.push_async_callback(close_sentinel, sentinel)
            client = sentinel.master_for(NAME, socket_timeout=0.5)
        stack.push_async_callback(client.aclose)
        yield client


async def close_sentinel(sentinel: Sentinel) -> None:
    for client in sentinel.sentinels:
        await client.aclose()


async def measure(fault: Fault, subject: Subject, folder: Path) -> dict[str, Any]:
    """Run a fault under clicks; return its figures and all followed clicks."""
    items = folder / "items.json"
    items.write_text(json.dumps(list(subject.vocab.ids)), "utf-8")
    async with stage_for(fault, subject, folder) as stage, reader_client(stage) as client:
        users = await fill_windows(stage.redis, stage.settings, subject, USERS)
        n_before = [user.n for user in sorted(users, key=lambda user: int(user.user_id.removeprefix("user")))]
        for daemon in [stage.start_daemon() for _ in range(fault.daemons)]:
            await stage.wait_ready(daemon)
        clicks = round((WARM_UP_S + BEFORE_S + AFTER_S) * PER_S)
        schedule = Schedule(time.time() + 3.0, PER_S, clicks, USERS)
        keys = stage.redis.keys
        reader = ListReader(schedule, client, lambda user: keys.recommendation(f"user{user}"), n_before)
        kafka = stage.settings.kafka
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(reader.run(PATIENCE_S))
            async with producing(schedule, kafka.bootstrap_servers, kafka.topic, items):
                await asyncio.sleep(schedule.start_s + WARM_UP_S + BEFORE_S - time.time())
                await fault.strike(stage)
        seen = [click for click in reading.result() if click.due_s >= schedule.start_s + WARM_UP_S]
        load = os.getloadavg()
        info = await client.info("server")
        values = await client.mget([keys.recommendation(f"user{user}") for user in range(USERS)])
    wrong = sum(
        json.loads(value)["n"] != n_before[user] + schedule.clicks_of(user) if value else 1
        for user, value in enumerate(values)
    )
    struck_s = stage.marks[0][0]
    return {
        "title": fault.title,
        "redis": f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}",
        "load_1_min": load[0],
        "marks": [(at_s - struck_s, text) for at_s, text in stage.marks],
        "users_with_lost_or_doubled_clicks": wrong,
        **figures(seen, struck_s, stage.marks[-1][0]),
    }


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """The figures of the faults so far, by name."""
    return {}


@pytest.mark.parametrize("name", FAULTS)
async def test_clicks_are_in_lists_again_after_a_fault(
    name: str, measured: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    found = measured[name] = await measure(FAULTS[name], random_model(SHAPES[1]), tmp_path)
    write(measured)
    log.info("%s", " ".join(f"{key}={value}" for key, value in found.items() if key not in ("course", "title")))
    assert found["users_with_lost_or_doubled_clicks"] == 0
    assert found["recovered_s"] < AFTER_S


def write(measured: dict[str, dict[str, Any]]) -> None:
    """Write figures, table and picture."""
    if path := os.environ.get("FRESHNESS_JSON"):
        report = {
            "machine": machine(),
            "versions": versions(),
            "commit": git("describe", "--always", "--dirty"),
            "kafka": f"Apache Kafka {release(apache_kafka_home())}",
            "clicks_per_s": PER_S,
            "users": USERS,
            "after_s": AFTER_S,
            "faults": measured,
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        target.with_suffix(".md").write_text(table(report), "utf-8")
    if path := os.environ.get("FRESHNESS_PLOT"):
        draw(measured, path, AFTER_S)
