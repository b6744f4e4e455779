"""Wait, before a command begins, for servers that are just being started."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable

from streamrec.errors import Stopped
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings
from streamrec.waiting import until_there


async def _kafka_answers(settings: Settings) -> None:
    from streamrec.kafka.topics import topic_partitions  # recs does not need it

    await topic_partitions(settings.kafka, (settings.kafka.topic,))


async def _redis_answers(settings: Settings) -> None:
    async with RedisClient(settings.redis) as redis:
        await redis.check_format(claim=False)  # what every user of deploy/SECURITY.md may do


KAFKA, REDIS = ("Kafka", _kafka_answers), ("Redis", _redis_answers)


async def wait_for(settings: Settings, *servers: tuple[str, Callable[[Settings], Awaitable[None]]]) -> None:
    """Wait up to ``commands_wait_s`` in all until the servers answer; what then still fails is the command's error.

    Raises:
        StreamrecError: a server refuses the command; waiting would not help.
    """
    stop = asyncio.Event()
    if settings.commands.wait_s:
        deadline = asyncio.get_running_loop().call_later(settings.commands.wait_s, stop.set)
        with contextlib.suppress(Stopped):
            for name, answers in servers:
                await until_there(name, functools.partial(answers, settings), stop)
        deadline.cancel()
