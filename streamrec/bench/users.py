"""Users of a benchmark, with full windows in Redis as if they had clicked."""

from __future__ import annotations

import random
import time

from streamrec.bench.engine import Subject
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.schemas import ClickEvent, EventBatch, UserSequence
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

NO_PARTITION = 1_000_000  # no click comes from there
AT_ONCE = 200


async def fill_windows(redis: RedisClient, settings: Settings, subject: Subject, users: int) -> list[UserSequence]:
    """The sequences of ``users`` users with max_len items and more, so that their windows jump at different clicks."""
    max_len, ids = subject.model.config.max_len, subject.vocab.ids
    drawn = random.Random(0)
    store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, max_len, Metrics())
    sequences = []
    for start in range(0, users, AT_ONCE):
        events = [
            ClickEvent(f"user{user}", drawn.choice(ids), _now_ms(), NO_PARTITION, step, _now_ms())
            for user in range(start, min(users, start + AT_ONCE))
            for step in range(max_len + drawn.randrange(max_len))
        ]
        sequences += await store.append(EventBatch(events))
    return sequences


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
