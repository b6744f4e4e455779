"""The producer of dead letters and replayed events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, UnknownTopicOrPartitionError

from streamrec.errors import KafkaForbidden, StreamrecError
from streamrec.kafka.connection import (
    InvalidRecordError,
    connection_options,
    kafka_error,
    learn_brokers_again,
    start_client,
)
from streamrec.kafka.topics import ensure_topics
from streamrec.schemas import DeadLetter
from streamrec.setting_groups import KafkaSettings

# Kafka's default limit of a record is 1 MiB; only the original topic has the rest of a longer dead letter.
MAX_DEAD_LETTER_BYTES = 900_000
SMALLER_DEAD_LETTER_BYTES = (300_000, 100_000, 30_000, 10_000, 3_000, 0)
MAX_CUT_KEY_BYTES = 1024
MAX_HEADER_CHARACTERS, MAX_CUT_HEADER_CHARACTERS = 1000, 100
DEAD_LETTERS_TIMEOUT_S = 15.0


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

        A letter that its topic refuses as too large is cut, at last to its headers.

        Raises:
            KafkaUnavailable: a dead letter was not acknowledged; send all again (some may then be duplicated).
            KafkaForbidden: the topic takes no dead letter; waiting would not help.
        """
        try:
            async with asyncio.timeout(DEAD_LETTERS_TIMEOUT_S):
                sent = [self._send_dead_letter(letter, MAX_DEAD_LETTER_BYTES) for letter in letters]
                answers = await asyncio.gather(*sent, return_exceptions=True)
            for letter, answer in zip(letters, answers, strict=True):
                if isinstance(answer, (MessageSizeTooLargeError, InvalidRecordError)):
                    async with asyncio.timeout(DEAD_LETTERS_TIMEOUT_S):
                        await self._send_smaller(letter)  # alone: the limit is that of a batch of records
                elif isinstance(answer, BaseException):
                    raise answer
        except (KafkaError, OSError) as error:
            with contextlib.suppress(KafkaError, OSError, StreamrecError):
                async with asyncio.timeout(DEAD_LETTERS_TIMEOUT_S):
                    if isinstance(error, UnknownTopicOrPartitionError):
                        await ensure_topics(self._kafka, (self._kafka.dead_letters,))
                    await learn_brokers_again(self._kafka, self._producer)
            raise kafka_error(self._kafka, error) from error

    async def _send_smaller(self, letter: DeadLetter) -> None:
        if letter.key is None:  # a compacted topic takes no record without a key
            letter = replace(letter, key=f"{letter.topic}/{letter.partition}/{letter.offset}".encode())
        for max_bytes in (MAX_DEAD_LETTER_BYTES, *SMALLER_DEAD_LETTER_BYTES):
            with contextlib.suppress(MessageSizeTooLargeError):
                await self._send_dead_letter(letter, max_bytes)
                return
        raise KafkaForbidden(
            f"topic {self._kafka.dead_letters} refuses even a dead letter without its value: raise max.message.bytes "
            "of the topic to 2000 at least"
        )

    async def _send_dead_letter(self, letter: DeadLetter, max_bytes: int) -> None:
        headers = {
            "streamrec.reason": letter.reason,
            "streamrec.topic": letter.topic,
            "streamrec.partition": str(letter.partition),
            "streamrec.offset": str(letter.offset),
            "streamrec.timestamp_ms": str(letter.timestamp_ms),
        }
        value, key = letter.value, letter.key
        if len(value or b"") + len(key or b"") > max_bytes:
            headers["streamrec.cut_from_bytes"] = str(len(value or b""))
            max_key_bytes = min(MAX_CUT_KEY_BYTES, max_bytes)
            key = key[:max_key_bytes] if key else key
            value = value[: max_bytes - max_key_bytes] if value else value
        characters = MAX_HEADER_CHARACTERS if max_bytes else MAX_CUT_HEADER_CHARACTERS
        await self._producer.send_and_wait(
            self._kafka.dead_letters,
            value,
            key=key,
            headers=[(name, text[:characters].encode(errors="replace")) for name, text in headers.items()],
        )
