"""Send the items of a file to the items topic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamrec.errors import SettingsError, StreamrecError
from streamrec.items.file import items_of
from streamrec.kafka.producer import Producer
from streamrec.kafka.topics import COMPACTED, ensure_topics
from streamrec.setting_groups import KafkaSettings

MAX_IN_FLIGHT = 5_000  # records; sending waits while more are unacknowledged


async def send_items(kafka: KafkaSettings, topic: str, path: Path) -> int:
    """Produce the items of a file; return their number.

    Raises:
        KafkaUnavailable: no broker answers.
        StreamrecError: the file cannot be read; the items before the bad line were sent.
    """
    await ensure_topics(kafka, (topic,), COMPACTED)
    producer, sent, in_flight = Producer(kafka), 0, list[Any]()
    await producer.start()
    try:
        for _, item_id, value in items_of(path):
            in_flight.append(await producer.send(topic, item_id.encode(), value))
            sent += 1
            if len(in_flight) >= MAX_IN_FLIGHT:
                await producer.settle(in_flight)
                in_flight.clear()
        await producer.settle(in_flight)
    except SettingsError as error:
        await producer.settle(in_flight)
        raise StreamrecError(f"{error} ({sent:,} items before it were sent)") from error
    finally:
        await producer.stop()
    return sent
