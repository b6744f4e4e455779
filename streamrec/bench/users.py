"""Users of a benchmark: full windows in Redis, as if the users had clicked."""

from __future__ import annotations

import random
import time

from streamrec.bench.engine import Subject
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.schemas import ClickEvent, EventBatch, UserSequence
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

UNUSED_PARTITION = 1_000_000  # its offsets never collide with those of real clicks
USERS_PER_BATCH = 200


async def fill_windows(redis: RedisClient, settings: Settings, subject: Subject, users: int) -> list[UserSequence]:
    """Store and return the sequences of ``users`` users.

    Each has max_len to 2 max_len - 1 events, so that the windows of the users jump at different clicks.
    """
    max_len, ids = subject.model.config.max_len, subject.vocab.ids
    generator = random.Random(0)
    store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, max_len, Metrics())
    sequences = []
    for start in range(0, users, USERS_PER_BATCH):
        events = [
            ClickEvent(f"user{user}", generator.choice(ids), _now_ms(), UNUSED_PARTITION, step, _now_ms())
            for user in range(start, min(users, start + USERS_PER_BATCH))
            for step in range(max_len + generator.randrange(max_len))
        ]
        sequences += await store.append(EventBatch(events))
    return sequences


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
