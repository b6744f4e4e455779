"""Clicks at fixed moments: the process that produces them, and the reader of the lists that they lead to.

Click number k is due at a fixed moment, which is its record's timestamp, and users click in turn. So the reader knows
every click without a word from the producer, and a producer that waits for its broker makes no click look younger.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import redis.asyncio as redis
from aiokafka import AIOKafkaProducer

from support.workload import click

TESTS = Path(__file__).parents[1]
PATIENT_MS = 200_000  # the producer waits as long for a broker
MAX_BATCH_BYTES = 1_000_000  # clicks of a broken broker wait in the producer
READ_EVERY_S, READ_MANY_EVERY_S = 0.004, 0.02  # at rest; while many users wait
MANY = 50


@dataclass(frozen=True)
class Schedule:
    """The moments of the clicks.

    Args:
        start_s: Unix time of the first click.
        sample: the reader follows one user in this number; ``users`` is a multiple.
    """

    start_s: float
    per_s: float
    clicks: int
    users: int
    sample: int = 5

    def due_s(self, number: int) -> float:
        return self.start_s + number / self.per_s

    def user(self, number: int) -> int:
        return number % self.users

    def clicks_of(self, user: int) -> int:
        """Return the number of clicks of a user when all are sent."""
        return len(range(user, self.clicks, self.users))


@dataclass(frozen=True)
class Seen:
    """A click that the reader followed: due, and found in a list that a GET returned; Unix time in s."""

    due_s: float
    seen_s: float

    @property
    def waited_s(self) -> float:
        return self.seen_s - self.due_s


@contextlib.asynccontextmanager
async def producing(schedule: Schedule, bootstrap_servers: str, topic: str, items: Path) -> AsyncIterator[None]:
    """Produce the clicks in a process of its own; at the end wait until all are acknowledged.

    Args:
        items: JSON file with the ids of items.
    """
    arguments = json.dumps([asdict(schedule), bootstrap_servers, topic, str(items)])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "support.due_clicks", arguments, cwd=TESTS, stdin=subprocess.DEVNULL
    )
    try:
        yield
        assert await process.wait() == 0, "the producer failed; its output is above"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _produce(schedule: Schedule, bootstrap_servers: str, topic: str, items: Sequence[str]) -> None:
    generator = random.Random(0)
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap_servers,
        enable_idempotence=True,
        request_timeout_ms=PATIENT_MS,
        max_batch_size=MAX_BATCH_BYTES,
    )
    await producer.start()
    sent: deque[asyncio.Future[Any]] = deque()
    try:
        for number in range(schedule.clicks):
            due_s, user = schedule.due_s(number), f"user{schedule.user(number)}"
            await asyncio.sleep(max(0.0, due_s - time.time()))
            value = click(user, generator.choice(items), round(due_s * 1000))
            sent.append(await producer.send(topic, value, user.encode(), timestamp_ms=round(due_s * 1000)))
            while sent and sent[0].done():
                sent.popleft().result()
        await producer.flush()
        for acknowledged in sent:
            acknowledged.result()
    finally:
        await producer.stop()


class PublishedList(msgspec.Struct):
    """The field of a published list that the reader needs."""

    n: int


class ListReader:
    """Reads the lists of users who wait for one, as a page would, and notes when each click is in its user's list.

    Args:
        key: returns the key of a user's list.
        n_before: events of each user before the first click.
    """

    def __init__(
        self, schedule: Schedule, client: redis.Redis, key: Callable[[int], str], n_before: Sequence[int]
    ) -> None:
        self._schedule, self._client, self._key, self._n_before = schedule, client, key, n_before
        self._waiting: dict[int, deque[tuple[int, float]]] = {}  # user: n of the list, due
        self._next = 0
        self._decode = msgspec.json.Decoder(PublishedList).decode
        self.seen: list[Seen] = []

    async def run(self, patience_s: float) -> list[Seen]:
        """Return all followed clicks.

        Raises:
            AssertionError: some are in no list long after the last click.
        """
        schedule = self._schedule
        while self._next < schedule.clicks or self._waiting:
            now_s = time.time()
            assert now_s < schedule.due_s(schedule.clicks) + patience_s, f"{len(self._waiting)} users got no list"
            self._add_due(now_s)
            with contextlib.suppress(redis.RedisError, OSError):  # a failover: the reader tries again
                await self._read()
            await asyncio.sleep(READ_MANY_EVERY_S if len(self._waiting) > MANY else READ_EVERY_S)
        return self.seen

    def _add_due(self, now_s: float) -> None:
        schedule = self._schedule
        while self._next < schedule.clicks and schedule.due_s(self._next) <= now_s:
            user = schedule.user(self._next)
            n = self._n_before[user] + self._next // schedule.users + 1
            self._waiting.setdefault(user, deque()).append((n, schedule.due_s(self._next)))
            self._next += schedule.sample

    async def _read(self) -> None:
        users = list(self._waiting)
        if not users:
            return
        lists = await self._client.mget([self._key(user) for user in users])
        now_s = time.time()
        for user, value in zip(users, lists, strict=True):
            n, waiting = self._decode(value).n if value else 0, self._waiting[user]
            while waiting and waiting[0][0] <= n:
                self.seen.append(Seen(waiting.popleft()[1], now_s))
            if not waiting:
                del self._waiting[user]


def main() -> None:
    """Run the process that produces."""
    schedule, bootstrap_servers, topic, items = json.loads(sys.argv[1])
    gc.freeze()  # a full collection would delay clicks that are due
    asyncio.run(_produce(Schedule(**schedule), bootstrap_servers, topic, json.loads(Path(items).read_text("utf-8"))))


if __name__ == "__main__":
    main()
