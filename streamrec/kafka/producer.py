"""The producer of dead letters and replayed events."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any

from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.errors import KafkaError

from streamrec.kafka.connection import connection_options, kafka_error, start_client
from streamrec.schemas import DeadLetter
from streamrec.setting_groups import KafkaSettings

# Kafka's default limit of a record is 1 MiB; only the original topic has the rest of a longer dead letter.
MAX_DEAD_LETTER_BYTES = 900_000
MAX_CUT_KEY_BYTES = 1024
MAX_HEADER_CHARACTERS = 1000


def dead_letter(record: ConsumerRecord, reason: str) -> DeadLetter:
    """Return the dead letter of a record."""
    return DeadLetter(record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, reason)


class Producer:
    """Writes records, acknowledged by all replicas.

    Args:
        idempotent: a retry inside the client never duplicates a record. Without it, a producer survives brokers
            that lose their producer state, after which an idempotent one of aiokafka fails for good.
    """

    def __init__(self, kafka: KafkaSettings, idempotent: bool = True) -> None:
        self._kafka = kafka
        self._producer = AIOKafkaProducer(
            **connection_options(kafka),
            acks="all",
            enable_idempotence=idempotent,
            max_request_size=2**20,
            linger_ms=2,
        )

    async def start(self) -> None:
        """Connect. Raises KafkaUnavailable if no broker answers."""
        await start_client(self._kafka, self._producer)

    async def stop(self) -> None:
        """Wait until all records are sent, and close."""
        await self._producer.stop()

    async def send(self, topic: str, key: bytes, value: bytes) -> Any:
        """Queue a record; return the future of its acknowledgement."""
        try:
            return await self._producer.send(topic, value, key=key)
        except (KafkaError, OSError) as error:
            raise kafka_error(self._kafka, error) from error

    async def settle(self, sent: Iterable[Any]) -> None:
        """Wait until all queued records are acknowledged.

        Args:
            sent: the futures that ``send`` returned.

        Raises:
            KafkaUnavailable: a record was not acknowledged.
        """
        try:
            await self._producer.flush()
            for acknowledgement in sent:
                await acknowledgement
        except (KafkaError, OSError) as error:
            raise kafka_error(self._kafka, error) from error

    async def send_dead_letters(self, letters: Collection[DeadLetter]) -> None:
        """Write dead letters with origin and reason in headers; return once all are acknowledged.

        Raises:
            KafkaUnavailable: a dead letter was not acknowledged; send all again (some may then be duplicated).
        """
        try:
            await asyncio.gather(*[await self._send_dead_letter(letter) for letter in letters])
        except (KafkaError, OSError) as error:
            raise kafka_error(self._kafka, error) from error

    async def _send_dead_letter(self, letter: DeadLetter) -> Any:
        headers = {
            "streamrec.reason": letter.reason,
            "streamrec.topic": letter.topic,
            "streamrec.partition": str(letter.partition),
            "streamrec.offset": str(letter.offset),
            "streamrec.timestamp_ms": str(letter.timestamp_ms),
        }
        value, key = letter.value, letter.key
        if len(value or b"") + len(key or b"") > MAX_DEAD_LETTER_BYTES:
            headers["streamrec.cut_from_bytes"] = str(len(value or b""))
            key = key[:MAX_CUT_KEY_BYTES] if key else key
            value = value[: MAX_DEAD_LETTER_BYTES - MAX_CUT_KEY_BYTES] if value else value
        return await self._producer.send(
            self._kafka.dead_letters,
            value,
            key=key,
            headers=[(name, text[:MAX_HEADER_CHARACTERS].encode(errors="replace")) for name, text in headers.items()],
        )
