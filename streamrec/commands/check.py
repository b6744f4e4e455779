"""`streamrec check`: can Kafka, Redis, the topics and the model be reached and read?"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

from streamrec.errors import StreamrecError
from streamrec.kafka.connection import topic_partitions
from streamrec.redis.client import RedisClient
from streamrec.serving.model import read_model
from streamrec.settings import Settings


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    ok: bool
    detail: str


async def check(settings: Settings) -> AsyncIterator[Finding]:
    """Findings, as they are made."""
    try:
        saved = read_model(settings)
        config = saved.model.config
        yield Finding(
            "model", True,
            f"{saved.version} in {settings.registry_dir or settings.model_dir}: {len(saved.vocab):,} items, "
            f"max_len {config.max_len}, "
            f"{config.num_blocks} blocks of {config.hidden_units}, {config.position} positions",
        )  # fmt: skip
    except StreamrecError as error:
        yield Finding("model", False, str(error))
    try:
        async with RedisClient(settings) as redis:
            await redis.ping()
            await redis.check_format(claim=False)
        yield Finding("Redis", True, f"{settings.redis_address} answers")
    except StreamrecError as error:
        yield Finding("Redis", False, str(error))
    try:
        topics = await topic_partitions(settings, (settings.kafka_topic, settings.kafka_dead_letters))
    except StreamrecError as error:
        yield Finding("Kafka", False, str(error))
        return
    yield Finding("Kafka", True, f"{settings.kafka_bootstrap_servers} answers")
    for topic, partitions in topics.items():
        detail = f"{topic}: {partitions} partitions" if partitions else f"{topic} does not exist yet; serve creates it"
        yield Finding("topic", True, detail)
