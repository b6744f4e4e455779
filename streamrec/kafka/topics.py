"""Topics: create them, count their partitions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError, for_code

from streamrec.errors import RIGHTS_ARE_LISTED, KafkaForbidden, KafkaRefused, KafkaUnavailable
from streamrec.kafka.connection import (
    Client,
    check_brokers,
    connection_options,
    diagnose,
    fetch_metadata,
    kafka_error,
    teach_brokers,
)
from streamrec.setting_groups import KafkaSettings

TOPIC_ALREADY_EXISTS, TOPIC_AUTHORIZATION_FAILED, CLUSTER_AUTHORIZATION_FAILED = 36, 29, 31
INVALID_REPLICATION_FACTOR = 38  # more replicas than brokers, perhaps because the others still start
COMPACTED = {"cleanup.policy": "compact"}  # of a topic that is a table


async def ensure_topics(
    kafka: KafkaSettings, topics: Iterable[str], options: Mapping[str, str] | None = None
) -> list[str]:
    """Create the topics that do not exist; return their names.

    Args:
        options: of the new topics [the broker's].

    Raises:
        KafkaUnavailable: the brokers cannot be reached; KafkaRefused: they refuse.
        KafkaForbidden: the right to describe or to create a topic is missing.
    """
    partitions = await topic_partitions(kafka, topics)
    missing = [topic for topic, count in partitions.items() if not count]
    if not missing:
        return []
    async with _admin(kafka) as admin:
        response = await admin.create_topics(
            [
                NewTopic(topic, kafka.partitions, kafka.replication_factor, topic_configs=dict(options or {}))
                for topic in missing
            ]
        )
    for topic, code, message in response.topic_errors:
        if code in (TOPIC_AUTHORIZATION_FAILED, CLUSTER_AUTHORIZATION_FAILED):
            raise KafkaForbidden(
                f"topic {topic} does not exist, and may not be created: create it, or allow Create on it "
                f"({RIGHTS_ARE_LISTED})"
            )
        if code not in (0, TOPIC_ALREADY_EXISTS):
            passes = code == INVALID_REPLICATION_FACTOR or for_code(code).retriable
            kind = KafkaUnavailable if passes else KafkaRefused
            raise kind(f"Kafka refuses to create topic {topic}: {message} (error {code})")
    return missing


async def topic_partitions(kafka: KafkaSettings, topics: Iterable[str], client: Client | None = None) -> dict[str, int]:
    """Return the number of partitions of each topic, 0 for one that does not exist.

    Args:
        client: a client of these topics, which gets the brokers of the answer.

    Raises:
        KafkaUnavailable: the brokers cannot be reached, or refuse the connection.
        KafkaForbidden: the right to describe a topic is missing.
    """
    topics = list(topics)
    try:
        metadata = await fetch_metadata(kafka, topics)
    except (KafkaError, OSError) as error:
        raise await diagnose(kafka, error) from error
    if client is not None:
        teach_brokers(client, metadata)
    described = metadata.topics
    refused = {topic for code, topic, *_ in described if code == TOPIC_AUTHORIZATION_FAILED}
    if refused:
        raise kafka_error(kafka, TopicAuthorizationFailedError(refused))
    counts = {topic: len(partitions) for _, topic, _, partitions in described}
    return {topic: counts.get(topic, 0) for topic in topics}


@contextlib.asynccontextmanager
async def _admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**connection_options(kafka))
    try:
        await admin.start()
        check_brokers(admin._client)
        yield admin
    except (KafkaError, OSError) as error:
        raise await diagnose(kafka, error) from error
    finally:
        await admin.close()
