"""Produce the records of a soak: numbered, each derived from seed and number, so that another process continues.

The producer is idempotent, and retries until a record is acknowledged. Some records have header names that are no text:
no library writes them, so they are sent byte by byte, and a retry may write one twice. Transactions come beside the
numbered records; some are aborted, and some are ended by a SIGKILL of the broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError, KafkaError

from studies.soak.plant import Plant
from studies.soak.state import PARTITIONS, State
from support.kafka_client import raw_producer
from support.raw_batches import RawBatch, RawRecord, produce_raw
from support.topic_files import read_topic_files
from support.workload import BAD, KNOWN_ITEMS, NO_EVENTS, click

NUMBER = "soak.number"  # header
BAD_SHARE, RAW_SHARE, LATE_SHARE = 0.02, 0.005, 0.05
DAY_MS = 86_400_000
NOT_UTF8 = (b"\xff", b"\xfe")
PATIENT_MS = 600_000  # a record is retried this long
MOST_WAITING = 5_000
TRANSACTION_EVERY_S, TRANSACTION_RECORDS, TRANSACTION_TIMEOUT_MS = 15.0, 5, 5_000


@dataclass(frozen=True)
class Numbered:
    """One record. ``raw``: with header names that are no text."""

    number: int
    user: str
    value: bytes | None
    bad: bool
    raw: bool

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        return [(NUMBER, str(self.number).encode()), *([(BAD, b"")] if self.bad else [])]


def made(state: State, number: int) -> Numbered:
    """Return the record of this number."""
    rng = random.Random(f"{state.seed} {number}")
    raw = rng.random() < RAW_SHARE
    # users of raw records are others: each user's records are in one partition
    user = f"odd {rng.randrange(40)}" if raw else user_of(rng, state.users)
    if rng.random() < BAD_SHARE:
        return Numbered(number, user, rng.choice(list(NO_EVENTS.values())), True, raw)
    item = rng.choice(KNOWN_ITEMS) if rng.random() < 0.85 else f"x{rng.randrange(30)}"
    late_ms = rng.choice((500, 5_000, 2 * DAY_MS)) if rng.random() < LATE_SHARE else 0
    return Numbered(number, user, click(user, item, state.begin_ms + number * 1000 - late_ms), False, raw)


def user_of(rng: random.Random, users: int) -> str:
    """Return a user: the first ones click most, and strangers click unknown items too."""
    return f"u{int(users * rng.random() ** 2)}"


class Feed:
    """Sends records until ``enough``, and goes on where the topic ends."""

    def __init__(self, plant: Plant, enough: Callable[[], bool]) -> None:
        self._plant, self._enough = plant, enough
        self._state, self._settings = plant.state, plant.settings
        self._acknowledged = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            transactions = group.create_task(self._transact())
            while True:
                numbers = await asyncio.to_thread(self._missing)
                try:
                    await self._send(numbers)
                    break
                except KafkaError as error:  # begin again with what the topic lacks
                    if not isinstance(error, KafkaConnectionError):  # it starts while the broker is killed
                        self._plant.fault(f"the producer of the soak failed: {error!r}")
                    await asyncio.sleep(2)
            transactions.cancel()

    def _missing(self) -> Iterator[int]:
        """Yield the numbers that the topic lacks, those before its newest one first; without an end."""
        topic = self._settings.kafka.topic
        found = numbers_in(read_topic_files(self._plant.folder / "kafka" / "data", topic))
        self._state.produced = len(found)
        newest = max(found, default=-1)
        return chain((number for number in range(newest) if number not in found), count(newest + 1))

    async def _send(self, numbers: Iterable[int]) -> None:
        begun, waiting = time.monotonic(), deque[asyncio.Future[Any]]()
        async with raw_producer(self._settings, request_timeout_ms=PATIENT_MS) as producer:
            for place, number in enumerate(numbers):
                if self._enough():
                    break
                await asyncio.sleep(max(0.0, begun + place / self._state.rate - time.monotonic()))
                waiting.append(await self._send_one(producer, made(self._state, number)))
                while waiting and (waiting[0].done() or len(waiting) > MOST_WAITING):
                    await waiting.popleft()
                    self._state.produced += 1
            while waiting:
                await waiting.popleft()
                self._state.produced += 1

    async def _send_one(self, producer: AIOKafkaProducer, record: Numbered) -> asyncio.Future[Any]:
        if record.raw:
            return asyncio.ensure_future(self._send_raw(record))
        topic, key = self._settings.kafka.topic, record.user.encode()
        return await producer.send(topic, record.value, key=key, headers=record.headers)

    async def _send_raw(self, record: Numbered) -> None:
        headers = [(name.encode(), value) for name, value in record.headers]
        batch = RawBatch([RawRecord(record.value, record.user.encode(), [*((n, b"") for n in NOT_UTF8), *headers])])
        partition = int(record.user.split()[1]) % PARTITIONS
        deadline = time.monotonic() + PATIENT_MS / 1000
        while True:
            try:
                return await produce_raw(self._settings, batch, partition)
            except (KafkaError, OSError, TypeError):  # the broker starts, or has no leader yet
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)

    async def _transact(self) -> None:
        while True:
            await asyncio.sleep(TRANSACTION_EVERY_S)
            rng = random.Random(f"transaction {self._state.seed} {self._state.transactions}")
            with contextlib.suppress(KafkaError, TimeoutError):  # the broker was killed: it ends the transaction
                await asyncio.wait_for(self._one_transaction(rng), 60)
            self._state.transactions += 1

    async def _one_transaction(self, rng: random.Random) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._settings.kafka.bootstrap_servers,
            transactional_id="soak",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )
        try:
            await producer.start()
            await producer.begin_transaction()
            for _ in range(TRANSACTION_RECORDS):
                user, item = user_of(rng, self._state.users), rng.choice(KNOWN_ITEMS)
                value = click(user, item, self._state.begin_ms + self._state.produced * 1000)
                await producer.send_and_wait(self._settings.kafka.topic, value, key=user.encode())
            await (producer.commit_transaction() if rng.random() < 0.5 else producer.abort_transaction())
        finally:
            with contextlib.suppress(KafkaError, TimeoutError):
                await asyncio.wait_for(producer.stop(), 10)


def numbers_in(records: Iterable[Any]) -> dict[int, int]:
    """Return how often each number is in the topic; records of transactions have none."""
    found: dict[int, int] = {}
    for record in records:
        for name, value in record.headers:
            if name == NUMBER:
                found[int(value)] = found.get(int(value), 0) + 1
    return found
