"""Servers and processes that the tests drive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streamrec.errors import EmbeddedError
from streamrec.kafka.topics import ensure_topics
from streamrec.local.daemon import EMBEDDED, environment
from streamrec.local.embedded_kafka import adapt
from streamrec.local.servers import EmbeddedServers
from streamrec.redis.client import RedisClient
from streamrec.schemas import StoredItems
from streamrec.serving.inspection import published
from streamrec.settings import Settings

R = TypeVar("R")

EVENTS = "streamrec_events_total"
# A header that producers here put on records which are no events; the daemon knows nothing of it.
BAD = "test.bad"


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
        adapt()
        yield Servers("embedded", embedded.redis_url, embedded.kafka_bootstrap_servers)


@contextlib.contextmanager
def own_servers() -> Iterator[EmbeddedServers]:
    """Servers that one test may stop, kill and pause; it is skipped where they are not installed."""
    try:
        servers = EmbeddedServers().start()
    except EmbeddedError as error:
        pytest.skip(f"needs servers of its own to stop and to kill: {error}")
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(servers.stop)
        adapt()
        yield servers


async def written_down(servers: EmbeddedServers) -> None:
    """Until the broker has on disk whatever it has acknowledged.

    The embedded one writes a snapshot every second and loses what came after it, even when it is asked to stop.
    """
    marker = f"marker-{time.monotonic_ns()}"
    admin = AIOKafkaAdminClient(bootstrap_servers=servers.kafka_bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(marker, 1, 1)])
    await admin.close()

    async def written() -> bool:
        return marker in (servers._folder / "kafka" / "kafka.json").read_text()

    await eventually(written)


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

    def __init__(
        self, settings: Settings, arguments: tuple[str, ...] = (), program: tuple[str, ...] = (*EMBEDDED, "serve")
    ) -> None:
        self.settings = settings
        self._log = tempfile.NamedTemporaryFile(prefix="daemon-", suffix=".log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", *program, *arguments],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment(settings), "OMP_NUM_THREADS": "1"},
        )
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
        return await asyncio.to_thread(get, self.http + path)

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that have these labels."""
        _, text = await self.get("/metrics")
        total = 0.0
        for line in text.splitlines():
            if re.match(rf"{name}(\{{|\s)", line) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    async def wait_handled(self, events: int = 1, timeout_s: float = 60.0) -> None:
        """Until so many events were applied, or found to be applied already."""

        async def enough() -> bool:
            if "http=" not in self.output:
                assert self.process.poll() is None, self.output
                return False
            applied, replayed = [await self.metric(EVENTS, outcome=outcome) for outcome in ("applied", "replayed")]
            return applied + replayed >= events

        await eventually(enough, timeout_s, every_s=0.02)

    async def has_logged(self, text: str) -> bool:
        assert self.process.poll() is None, f"exit {self.process.returncode}: {self.output}"
        return text in self.output

    def lines(self, *levels: str) -> list[str]:
        """Log lines of these levels."""
        return [line for line in self.output.splitlines() if line[25:32].strip() in levels]

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


class Retrain:
    """A `streamrec retrain` process."""

    def __init__(self, settings: Settings, *arguments: str, program: tuple[str, ...] = ("-m", *EMBEDDED)) -> None:
        with tempfile.NamedTemporaryFile(prefix="retrain-", suffix=".log", delete=False) as log:
            self._log = Path(log.name)
            self.process = subprocess.Popen(
                [sys.executable, *program, "retrain", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(settings), "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    async def says(self, text: str) -> None:
        async def said() -> bool:
            assert self.process.poll() is None or text in self.output, self.output
            return text in self.output

        await eventually(said, every_s=0.01)

    async def ends(self, status: int = 0) -> str:
        found = await asyncio.to_thread(self.process.wait, 100)
        assert found == status, self.output
        assert "Traceback" not in self.output
        return self.output

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def models(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`streamrec models ...` as an operator runs it."""
    command = [sys.executable, "-m", *EMBEDDED, "models", *arguments]
    return subprocess.run(command, env=environment(settings), capture_output=True, text=True, timeout=60, check=False)


async def versions_published(settings: Settings) -> dict[str, str]:
    async with RedisClient(settings.redis) as redis:
        lists = published(redis, None)
        return {user: value.model async for user, value in lists if value}


async def serves(daemon: Daemon, version: str) -> bool:
    return await daemon.metric("streamrec_model_info", version=version) == 1


@contextlib.asynccontextmanager
async def raw_producer(settings: Settings, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    # not idempotent: such a producer does not survive the restart of a broker that forgets producers
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, acks="all", max_request_size=20_000_000, **options
    )
    await producer.start()
    try:
        yield producer
    finally:
        # bounded: when a test fails with the broker away, what is queued can go nowhere
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(producer.stop(), 30)


def stored(items: Iterable[str]) -> StoredItems:
    """Return item ids as a sequence in Redis stores them."""
    return StoredItems.of(items)


def click(user: str | int, item: str | int, timestamp_ms: int | None = None, **more: Any) -> bytes:
    timed = {} if timestamp_ms is None else {"timestamp": timestamp_ms}
    return json.dumps({"user_id": user, "item_id": item, **timed, **more}).encode()


async def produce_clicks(settings: Settings, clicks: list[tuple[str, str]], base_ms: int = 1_700_000_000_000) -> None:
    """Produce (user, item) clicks, keyed by user, a second apart; acknowledged when it returns."""
    async with raw_producer(settings) as producer:
        sent = [
            await producer.send(settings.kafka.topic, click(user, item, base_ms + 1000 * i), key=user.encode())
            for i, (user, item) in enumerate(clicks)
        ]
        await producer.flush()
        for acknowledgement in sent:
            await acknowledgement


@dataclass(frozen=True)
class Record:
    """One record to be produced."""

    key: bytes
    value: bytes | None
    bad: bool = False

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        return [(BAD, b"")] if self.bad else []


FAR_FUTURE_MS = 4_000_000_000_000
NO_EVENTS: dict[str, bytes | None] = {
    "not JSON": b"{not json",
    "not UTF-8": b'{"user_id": "\xff\xfe", "item_id": "i1"}',
    "not an object": b'["u1", "i1"]',
    "no item": b'{"user_id": "u1"}',
    "a user that is no id": b'{"user_id": null, "item_id": "i1"}',
    "an empty id": click("", "i1"),
    "an over-long id": click("u1", "i" * 257),
    "NUL in an id": click("u1", "i\0"),
    "half a surrogate pair": b'{"user_id": "\\ud800", "item_id": "i1"}',
    "a time that is no number": b'{"user_id": "u1", "item_id": "i1", "timestamp": "noon"}',
    "a time before 1970": click("u1", "i1", -1),
    "a time in the far future": click("u1", "i1", FAR_FUTURE_MS),
    "a tombstone": None,
    "no bytes": b"",
}


KNOWN_ITEMS: list[str | int] = [f"i{n}" for n in range(50)]


def workload(seed: int, bad_share: float = 0.02) -> Iterator[Record]:
    """Endless clicks of hot and rare users on known and unknown items, ids as strings and integers, some bad."""
    rng = random.Random(seed)
    users: list[str | int] = [*(f"u{n}" for n in range(40)), *range(1000, 1020), *(f"stranger {n}" for n in range(5))]
    rng.shuffle(users)
    weights = [1 / (place + 3) for place in range(len(users))]
    ts_ms = 1_700_000_000_000
    while True:
        user = rng.choices(users, weights)[0]
        key = str(user).encode()
        if rng.random() < bad_share:
            yield Record(key, rng.choice(list(NO_EVENTS.values())), bad=True)
            continue
        unknown = str(user).startswith("stranger") or rng.random() < 0.15
        item: str | int = rng.choice([f"x{rng.randrange(30)}", rng.randrange(30)] if unknown else KNOWN_ITEMS)
        ts_ms += rng.randrange(2_000)
        # out of order at times; at others the record's own timestamp counts
        stamp = None if rng.random() < 0.02 else ts_ms - rng.choice((0, 0, 0, 500))
        yield Record(key, click(user, item, stamp))


async def feed(settings: Settings, records: Iterable[Record]) -> None:
    """Produce records; all are acknowledged when it returns."""
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    async with raw_producer(settings) as producer:
        sent = [await _send(producer, settings, record) for record in records]
        await producer.flush()
        for acknowledgement in sent:
            await acknowledgement


@contextlib.asynccontextmanager
async def feeding(settings: Settings, seed: int, per_s: float, at_least: int = 0) -> AsyncIterator[None]:
    """Produce the workload of a seed while the block runs, and until so many records were sent."""
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    left = asyncio.Event()

    async def stream(producer: AIOKafkaProducer) -> None:
        started, sent = time.monotonic(), []
        for place, record in enumerate(workload(seed)):
            if left.is_set() and place >= at_least:
                break
            await asyncio.sleep(max(0.0, started + place / per_s - time.monotonic()))
            sent.append(await _send(producer, settings, record))
        await producer.flush()
        for acknowledgement in sent:
            await acknowledgement

    async with raw_producer(settings) as producer, asyncio.TaskGroup() as group:
        group.create_task(stream(producer))
        yield
        left.set()


async def _send(producer: AIOKafkaProducer, settings: Settings, record: Record) -> asyncio.Future[Any]:
    return await producer.send(settings.kafka.topic, record.value, key=record.key, headers=record.headers)


@contextlib.asynccontextmanager
async def member(settings: Settings, listener: ConsumerRebalanceListener | None = None) -> AsyncIterator[None]:
    """Another member of the group, with partitions of its own while the block runs; it commits nothing."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        group_id=settings.kafka.group,
        enable_auto_commit=False,
        heartbeat_interval_ms=200,
    )
    await consumer.start()
    try:
        consumer.subscribe([settings.kafka.topic], listener=listener)
        await eventually(lambda: _has_partitions(consumer))
        yield
    finally:
        await consumer.stop()


async def _has_partitions(consumer: AIOKafkaConsumer) -> bool:
    await consumer.getmany(timeout_ms=10)
    return bool(consumer.assignment())


async def wait_caught_up(settings: Settings, timeout_s: float = 60.0) -> None:
    """Until the group has committed every partition to its end."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers, group_id=settings.kafka.group, enable_auto_commit=False
    )
    await consumer.start()
    try:
        numbers = await eventually(lambda: _partitions(consumer, settings.kafka.topic))
        partitions = [TopicPartition(settings.kafka.topic, number) for number in numbers]

        async def caught_up() -> bool:
            ends = await consumer.end_offsets(partitions)
            return all([(await consumer.committed(p) or 0) >= ends[p] for p in partitions])

        await eventually(caught_up, timeout_s, every_s=0.1)
    finally:
        await consumer.stop()


async def read_topic(settings: Settings, topic: str) -> list[Any]:
    """Every record of a topic, in partition and offset order."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=50,
    )
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


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""
