"""Run commands as child processes, and fill Redis with the users that they show."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

from streamrec.local.daemon import environment
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.schemas import Recommendation
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.preloaded import program
from support.redis_access import BASE_MS, clicks


class Result(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


async def write_users(settings: Settings, users: dict[str, list[str]]) -> None:
    """Store clicks of users, and publish a list for each user."""
    async with RedisClient(settings.redis) as redis:
        store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 50, Metrics())
        for user, items in users.items():
            await store.append(clicks(user, items))
        lists = [
            Recommendation(user, ["é 1", "2"], [2.5, -1.0], "m1", BASE_MS, len(items)) for user, items in users.items()
        ]
        await Publisher(redis, settings.lists.ttl_s, Metrics()).publish(lists)


def start_command(settings: Settings, *arguments: str) -> subprocess.Popen[str]:
    """Start a command as a child process."""
    return subprocess.Popen(
        [sys.executable, "-m", program(), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(settings), "PYTHONUNBUFFERED": ""},
    )
