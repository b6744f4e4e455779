"""Find the servers that the tests run against, and start servers that one test may stop."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streamrec.errors import EmbeddedError
from streamrec.local.apache_kafka import names_a_broker
from streamrec.local.embedded_kafka import adapt
from streamrec.local.process import free_port
from streamrec.local.servers import LocalServers, answers_ping

from support.waiting import eventually

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose.yaml"


@dataclass(frozen=True)
class Servers:
    """Addresses of the servers, and their origin."""

    origin: str
    redis_url: str
    kafka_bootstrap_servers: str


@contextlib.contextmanager
def find_servers(environ: Mapping[str, str]) -> Iterator[Servers]:
    redis_url, kafka = environ.get("STREAMREC_REDIS_URL"), environ.get("STREAMREC_KAFKA_BOOTSTRAP_SERVERS")
    if redis_url and kafka:
        yield Servers("given in the environment", redis_url, kafka)
        return
    if kafka_home(environ) is None and docker_answers():
        with container_servers() as found:
            yield found
        return
    try:
        local = LocalServers(kafka_home(environ)).start()
    except EmbeddedError as error:
        pytest.exit(f"no servers to test against: none given, no Docker engine, and {error}", returncode=3)
    with contextlib.ExitStack() as stack:
        stack.callback(local.stop)
        adapt_to(local)
        origin = "embedded" if local.embedded_kafka else f"Apache Kafka of {kafka_home(environ)}"
        yield Servers(origin, local.redis_url, local.kafka_bootstrap_servers)


@contextlib.contextmanager
def own_servers() -> Iterator[LocalServers]:
    """Start servers that one test may stop, kill and pause; skip it if they are not installed."""
    try:
        servers = LocalServers(kafka_home(os.environ)).start()
    except EmbeddedError as error:
        pytest.skip(f"needs its own servers to stop and kill: {error}")
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(servers.stop)
        adapt_to(servers)
        yield servers


def kafka_home(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of Apache Kafka that the environment names."""
    return Path(environ["KAFKA_HOME"]) if environ.get("KAFKA_HOME") else None


def adapt_to(servers: LocalServers) -> None:
    """Adapt the clients of this process, and its children, to the embedded Kafka server."""
    if servers.embedded_kafka:
        adapt()


async def written_down(servers: LocalServers) -> None:
    """Wait until a broker that is killed now would lose no acknowledged record.

    Apache Kafka loses none. The embedded one writes a snapshot every second, and loses later records even if it is
    stopped in an orderly way.
    """
    if not servers.embedded_kafka:
        return
    marker = f"marker-{time.monotonic_ns()}"
    admin = AIOKafkaAdminClient(bootstrap_servers=servers.kafka_bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(marker, 1, 1)])
    await admin.close()

    async def written() -> bool:
        snapshot = servers.folder / "kafka" / "kafka.json"
        return snapshot.exists() and marker in snapshot.read_text()

    await eventually(written)


def docker_answers() -> bool:
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if host.startswith("unix://"):  # without a server the client would leak a socket
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(host.removeprefix("unix://")):
                return False
    import docker
    from docker.errors import DockerException

    try:
        with contextlib.closing(docker.from_env(timeout=3)) as client:
            return bool(client.ping())
    except (DockerException, OSError):
        return False


@contextlib.contextmanager
def container_servers() -> Iterator[Servers]:
    """Run the images that compose.yaml names for Redis and Kafka, and Kafka with its settings."""
    from testcontainers.core.config import testcontainers_config
    from testcontainers.core.container import DockerContainer

    # it would remove the containers of a killed run, but is one more image to pull
    testcontainers_config.ryuk_disabled = True
    services = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]
    redis = DockerContainer(services["redis"]["image"], command="valkey-server --protected-mode no", ports=[6379])
    kafka = DockerContainer(services["kafka"]["image"], hostname="kafka")
    host, port = kafka.get_docker_client().host(), free_port()
    changes = {
        # Kafka sends clients this address, so the port of this machine is chosen before the container starts
        "KAFKA_ADVERTISED_LISTENERS": f"INSIDE://kafka:9092,OUTSIDE://{host}:{port}",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
    }
    kafka.with_bind_ports(29092, port).with_envs(**services["kafka"]["environment"] | changes)
    with redis, kafka:
        redis_port = redis.get_exposed_port(6379)
        wait_until(answers_ping, host, redis_port)
        wait_until(names_a_broker, host, port)
        yield Servers("containers", f"redis://{host}:{redis_port}/0", f"{host}:{port}")


def wait_until(ready: Callable[[socket.socket], bool], host: str, port: int, timeout_s: float = 60.0) -> None:
    """Wait until a server that is starting answers as it should."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as connection:
            if ready(connection):
                return
        assert time.monotonic() < deadline, f"the server at {host}:{port} is not ready after {timeout_s} s"
        time.sleep(0.1)
