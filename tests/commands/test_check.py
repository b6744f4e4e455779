"""`streamrec check`: a line for each part, even if other parts fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from streamrec.commands.check import Finding, check
from streamrec.kafka.topics import ensure_topics, topic_partitions
from streamrec.settings import Settings

MakeSettings = Callable[..., Settings]


async def findings(settings: Settings) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    async for finding in check(settings):
        assert "\n" not in finding.detail
        found.setdefault(finding.part, []).append(finding)
    return found


async def test_every_part_is_ok(make_settings: MakeSettings, model_dir: Path) -> None:
    settings = make_settings(model_dir=model_dir, kafka_partitions=3)
    await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters))
    found = await findings(settings)
    assert list(found) == ["model", "Redis", "Kafka", "topic"]
    assert all(finding.ok for several in found.values() for finding in several)
    assert "50 items, max_len 8, 2 blocks of 16, rope positions" in found["model"][0].detail
    assert found["Redis"][0].detail == f"{settings.redis.address} answers"
    assert found["Kafka"][0].detail == f"{settings.kafka.bootstrap_servers} answers"
    assert [topic.detail for topic in found["topic"]] == [
        f"{settings.kafka.topic}: 3 partitions",
        f"{settings.kafka.dead_letters}: 3 partitions",
    ]


async def test_missing_topics_are_reported_and_not_created(make_settings: MakeSettings, model_dir: Path) -> None:
    settings = make_settings(model_dir=model_dir)
    for _ in range(2):
        for topic in (await findings(settings))["topic"]:
            assert topic.ok
            assert topic.detail.endswith("does not exist yet; serve creates it")
    assert await topic_partitions(settings.kafka, [settings.kafka.topic]) == {settings.kafka.topic: 0}


async def test_without_redis_the_rest_is_checked(
    make_settings: MakeSettings, model_dir: Path, unused_tcp_port: int
) -> None:
    url = f"redis://u:s3cr3t@127.0.0.1:{unused_tcp_port}/0"
    found = await findings(make_settings(model_dir=model_dir, redis_url=url))
    assert not found["Redis"][0].ok
    assert "STREAMREC_REDIS_URL" in found["Redis"][0].detail
    assert "s3cr3t" not in found["Redis"][0].detail
    assert found["model"][0].ok
    assert found["Kafka"][0].ok


async def test_a_wrong_redis_password_is_reported_without_showing_it(
    make_settings: MakeSettings, model_dir: Path
) -> None:
    url = make_settings().redis.url.get_secret_value().replace("redis://", "redis://ann:s3cr3t@")
    found = await findings(make_settings(model_dir=model_dir, redis_url=url))
    assert not found["Redis"][0].ok
    assert re.search(r"invalid username-password|WRONGPASS|AUTH", found["Redis"][0].detail)
    assert "s3cr3t" not in found["Redis"][0].detail


async def test_without_kafka_the_rest_is_checked(
    make_settings: MakeSettings, model_dir: Path, unused_tcp_port: int
) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    found = await findings(make_settings(model_dir=model_dir, kafka_bootstrap_servers=address))
    assert not found["Kafka"][0].ok
    assert f"Kafka at {address} cannot be reached" in found["Kafka"][0].detail
    assert "STREAMREC_KAFKA_BOOTSTRAP_SERVERS" in found["Kafka"][0].detail
    assert "topic" not in found
    assert found["Redis"][0].ok


@pytest.mark.parametrize("what", ["unset", "missing", "empty", "damaged"])
async def test_without_a_usable_model_the_rest_is_checked(
    make_settings: MakeSettings, model_dir: Path, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "model"
    if what != "missing":
        folder.mkdir()
    if what == "damaged":
        for file in model_dir.iterdir():
            (folder / file.name).write_bytes(file.read_bytes()[:-1])
    found = await findings(make_settings(model_dir=None if what == "unset" else folder))
    assert not found["model"][0].ok
    assert ("STREAMREC_MODEL_DIR" if what == "unset" else str(folder)) in found["model"][0].detail
    assert found["Redis"][0].ok
    assert found["Kafka"][0].ok


async def test_a_missing_tls_file_is_reported(make_settings: MakeSettings, model_dir: Path) -> None:
    changes = {"kafka_security_protocol": "SSL", "kafka_tls_ca_file": "/no/such/ca.pem"}
    found = await findings(make_settings(model_dir=model_dir, **changes))
    assert not found["Kafka"][0].ok
    assert "kafka_tls_ca_file: cannot read /no/such/ca.pem: No such file" in found["Kafka"][0].detail
