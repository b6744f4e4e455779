"""Topics: create them, count their partitions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, for_code

from streamrec.errors import RIGHTS_ARE_LISTED, KafkaRefused, KafkaUnavailable
from streamrec.kafka.connection import check_brokers, connection_options, diagnose
from streamrec.setting_groups import KafkaSettings

TOPIC_ALREADY_EXISTS, TOPIC_AUTHORIZATION_FAILED, CLUSTER_AUTHORIZATION_FAILED = 36, 29, 31
INVALID_REPLICATION_FACTOR = 38  # more replicas than brokers, perhaps because the others still start


async def ensure_topics(kafka: KafkaSettings, topics: Iterable[str]) -> list[str]:
    """Create the topics that do not exist; return their names.

    Raises:
        KafkaUnavailable: the brokers cannot be reached; KafkaRefused: they refuse.
    """
    async with _admin(kafka) as admin:
        existing = set(await admin.list_topics())
        missing = [topic for topic in topics if topic not in existing]
        if not missing:
            return []
        response = await admin.create_topics(
            [NewTopic(topic, kafka.partitions, kafka.replication_factor) for topic in missing]
        )
        for topic, code, message in response.topic_errors:
            if code in (TOPIC_AUTHORIZATION_FAILED, CLUSTER_AUTHORIZATION_FAILED):
                raise KafkaRefused(
                    f"topic {topic} does not exist or may not be seen, and may not be created: create it, and allow "
                    f"Describe on it ({RIGHTS_ARE_LISTED})"
                )
            if code not in (0, TOPIC_ALREADY_EXISTS):
                passes = code == INVALID_REPLICATION_FACTOR or for_code(code).retriable
                kind = KafkaUnavailable if passes else KafkaRefused
                raise kind(f"Kafka refuses to create topic {topic}: {message} (error {code})")
        return missing


async def topic_partitions(kafka: KafkaSettings, topics: Iterable[str]) -> dict[str, int]:
    """Return the number of partitions of each topic, 0 for one that does not exist.

    Raises:
        KafkaUnavailable: the brokers cannot be reached, or refuse.
    """
    async with _admin(kafka) as admin:
        # a request for a topic by name may create it, so only existing ones are described
        existing = set(await admin.list_topics())
        known = [topic for topic in topics if topic in existing]
        described = await admin.describe_topics(known) if known else []
        counts = {topic["topic"]: len(topic["partitions"]) for topic in described}
        return {topic: counts.get(topic, 0) for topic in topics}


@contextlib.asynccontextmanager
async def _admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**connection_options(kafka))
    try:
        await admin.start()
        check_brokers(kafka, admin)
        yield admin
    except (KafkaError, OSError) as error:
        raise await diagnose(kafka, error) from error
    finally:
        await admin.close()
