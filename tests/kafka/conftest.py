"""A secured Kafka and a Redis for one module, and settings to reach them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from support.certificates import Certificates
from support.daemon_process import Daemon
from support.secured_kafka import PASSWORD, USER, SecuredKafka
from support.servers import OwnRedis, apache_kafka_home


@pytest.fixture(scope="module")
def secured(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """Apache Kafka with every kind of listener; its authorizer refuses what it does not allow."""
    kafka = SecuredKafka(apache_kafka_home(), tmp_path_factory.mktemp("kafka"), certificates, {USER: PASSWORD})
    try:
        kafka.start()
        yield kafka
    finally:
        kafka.stop()


@pytest.fixture
def serve() -> Iterator[Callable[[Settings], Daemon]]:
    """Start `streamrec serve` processes; the test's end kills those that still run."""
    daemons: list[Daemon] = []

    def start(settings: Settings) -> Daemon:
        daemons.append(Daemon(settings))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.kill()


@pytest.fixture
def settings_of(secured: SecuredKafka, own_redis: OwnRedis, model_dir: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Make settings for a listener; topics, group and Redis keys are the test's own."""
    name = re.sub(r"\W", "-", tmp_path.name)

    def make(listener: str = "PLAINTEXT", **more: Any) -> Settings:
        flags = {
            "kafka_bootstrap_servers": secured.address(listener),
            "redis_url": own_redis.redis_url,
            "model_dir": model_dir,
            "http_port": 0,
            "kafka_topic": name,
            "kafka_group": name,
            "redis_key_prefix": name,
        }
        return load_settings(flags=flags | secured.flags(listener) | more)

    return make
