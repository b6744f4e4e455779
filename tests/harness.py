"""Servers and processes that the tests drive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from streamrec.embedded import EmbeddedServers
from streamrec.errors import EmbeddedError
from streamrec.settings import Settings

R = TypeVar("R")


@dataclass(frozen=True)
class Servers:
    """Addresses, and where they come from."""

    origin: str
    redis_url: str
    kafka_bootstrap_servers: str


@contextlib.contextmanager
def find_servers(environ: Mapping[str, str]) -> Iterator[Servers]:
    redis_url, kafka = environ.get("STREAMREC_REDIS_URL"), environ.get("STREAMREC_KAFKA_BOOTSTRAP_SERVERS")
    if redis_url and kafka:
        yield Servers("given in the environment", redis_url, kafka)
        return
    if docker_answers():
        with container_servers() as found:
            yield found
        return
    try:
        embedded = EmbeddedServers().start()
    except EmbeddedError as error:
        pytest.exit(f"no servers to test against: none given, no Docker engine, and {error}", returncode=3)
    with contextlib.ExitStack() as stack:
        stack.callback(embedded.stop)
        yield Servers("embedded", embedded.redis_url, embedded.kafka_bootstrap_servers)


def docker_answers() -> bool:
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").is_socket():
        return False  # the client would leak a socket on its way to saying so
    import docker
    from docker.errors import DockerException

    try:
        with contextlib.closing(docker.from_env(timeout=3)) as client:
            return bool(client.ping())
    except (DockerException, OSError):
        return False


@contextlib.contextmanager
def container_servers() -> Iterator[Servers]:
    from testcontainers.kafka import KafkaContainer
    from testcontainers.redis import RedisContainer

    with RedisContainer("valkey/valkey:8") as redis, KafkaContainer().with_kraft() as kafka:
        url = f"redis://{redis.get_container_host_ip()}:{redis.get_exposed_port(6379)}/0"
        yield Servers("containers", url, kafka.get_bootstrap_server())


async def eventually(check: Callable[[], Awaitable[R]], timeout_s: float = 30.0, every_s: float = 0.05) -> R:
    """Await a condition: the first truthy answer of ``check``."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = await check()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"did not become true within {timeout_s} s; last answer: {answer!r}")
        await asyncio.sleep(every_s)


class Daemon:
    """A `streamrec serve` process under given settings."""

    def __init__(self, settings: Settings, arguments: tuple[str, ...] = ()) -> None:
        self.settings = settings
        self._log = tempfile.NamedTemporaryFile(prefix="daemon-", suffix=".log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamrec", "serve", *arguments],
            stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**environment_of(settings), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._log.close()

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    @property
    def http(self) -> str:
        found = re.search(r"http=(http://\S+)", self.output)
        assert found, self.output
        return found.group(1)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        await eventually(self._ready, timeout_s)

    async def _ready(self) -> bool:
        assert self.process.poll() is None, f"exit {self.process.returncode}: {self.output}"
        return "http=" in self.output and (await self.get("/readyz"))[0] == 200

    async def get(self, path: str) -> tuple[int, str]:
        """HTTP status and text."""
        return await asyncio.to_thread(_get, self.http + path)

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that have these labels."""
        _, text = await self.get("/metrics")
        total = 0.0
        for line in text.splitlines():
            if re.match(rf"{name}(\{{|\s)", line) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    async def wait_exit(self, timeout_s: float = 60.0) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and gone when it returns."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if not os.environ.get("KEEP_DAEMON_LOGS"):
            Path(self._log.name).unlink(missing_ok=True)


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment that gives these settings to a process."""
    values = {
        f"STREAMREC_{name.upper()}": str(value.get_secret_value() if hasattr(value, "get_secret_value") else value)
        for name in settings.model_fields_set
        if (value := getattr(settings, name)) is not None and not isinstance(value, tuple)
    }
    tuples = {
        f"STREAMREC_{name.upper()}": ",".join(value)
        for name in settings.model_fields_set
        if isinstance(value := getattr(settings, name), tuple)
    }
    return {**os.environ, **values, **tuples}


@contextlib.asynccontextmanager
async def raw_producer(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap_servers, enable_idempotence=True, max_request_size=20_000_000
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


def click(user: str | int, item: str | int, timestamp_ms: int | None = None, **more: Any) -> bytes:
    timed = {} if timestamp_ms is None else {"timestamp": timestamp_ms}
    return json.dumps({"user_id": user, "item_id": item, **timed, **more}).encode()


async def produce_clicks(settings: Settings, clicks: list[tuple[str, str]], base_ms: int = 1_700_000_000_000) -> None:
    """Produce (user, item) clicks, keyed by user, a second apart; acknowledged when it returns."""
    async with raw_producer(settings) as producer:
        sent = [
            await producer.send(settings.kafka_topic, click(user, item, base_ms + 1000 * i), key=user.encode())
            for i, (user, item) in enumerate(clicks)
        ]
        await producer.flush()
        for acknowledgement in sent:
            await acknowledgement


async def read_topic(settings: Settings, topic: str) -> list[Any]:
    """Every record of a topic, in partition and offset order."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers, enable_auto_commit=False, auto_offset_reset="earliest",
        fetch_max_wait_ms=50,
    )  # fmt: skip
    await consumer.start()
    try:
        await consumer._client.force_metadata_update()
        numbers = await eventually(lambda: _partitions(consumer, topic))
        partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        records: list[Any] = []
        while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
            for found in (await consumer.getmany(timeout_ms=200)).values():
                records += found
        return sorted(records, key=lambda record: (record.partition, record.offset))
    finally:
        await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
    await consumer.topics()
    return consumer.partitions_for_topic(topic) or set()


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""
