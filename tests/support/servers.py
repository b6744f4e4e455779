"""Find the servers that the tests run against, and start servers that a test may stop."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from streamrec.errors import EmbeddedError
from streamrec.local.apache_kafka import kafka_home, names_a_broker
from streamrec.local.embedded_kafka import adapt
from streamrec.local.process import ServerProcess, free_port
from streamrec.local.servers import LocalServers, answers_ping, redis_server, redis_url

# Kafka's brokers accept no shorter session unless configured to.
SHORTEST_SESSION_S = 6

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
    if kafka_home(environ) is None and not environ.get("REDIS_SERVER") and docker_answers():
        with container_servers() as found:
            yield found
        return
    try:
        local = LocalServers(kafka_home(environ)).start()
    except EmbeddedError as error:
        pytest.exit(f"no servers to test against: none given, no Docker engine, and {error}", returncode=3)
    with contextlib.ExitStack() as stack:
        stack.callback(local.stop)
        if local.embedded_kafka:  # the clients of this process and its children
            adapt()
        yield Servers(local.kafka_name, local.redis_url, local.kafka_bootstrap_servers)


@dataclass(frozen=True)
class OwnRedis:
    """A Redis server that tests may stop, kill and pause."""

    redis: ServerProcess

    @property
    def redis_url(self) -> str:
        return redis_url(self.redis)


@contextlib.contextmanager
def own_redis_server() -> Iterator[OwnRedis]:
    """Start a Redis server for tests; skip them if none is installed."""
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
        server = redis_server(Path(folder))
        try:
            server.start()
        except EmbeddedError as error:
            pytest.skip(f"needs a Redis server of its own: {error}")
        try:
            yield OwnRedis(server)
        finally:
            server.stop()


@contextlib.contextmanager
def own_servers() -> Iterator[LocalServers]:
    """Start Redis and a node of Apache Kafka for tests that stop, kill or pause the broker; skip them without one.

    The embedded Kafka server does not do: it loses acknowledged records, and never removes a dead group member.
    """
    with LocalServers(apache_kafka_home()) as servers:
        yield servers


def apache_kafka_home() -> Path:
    """Return the folder of Apache Kafka; skip the test if there is none."""
    home = kafka_home(os.environ)
    if home is None:
        pytest.skip("needs Apache Kafka: set KAFKA_HOME to an unpacked one")
    return home


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
