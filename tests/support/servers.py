"""Find the servers that the tests run against, and start servers that a test may stop."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamrec.errors import EmbeddedError
from streamrec.local.apache_kafka import kafka_home
from streamrec.local.embedded_kafka import adapt
from streamrec.local.process import ServerProcess
from streamrec.local.servers import LocalServers, redis_server, redis_url

# Kafka's brokers accept no shorter session unless configured to.
SHORTEST_SESSION_S = 6


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
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").is_socket():
        return False  # without a server the client would leak a socket
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
