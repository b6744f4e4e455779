"""The parts that score and publish: the worker and the champion follower share them."""

from __future__ import annotations

from dataclasses import dataclass

from streamrec.health import Health
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.watch import RedisWatch
from streamrec.serving.lists import SharedLists
from streamrec.serving.online import OnlineCounts
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.serving.shadow import Shadow


@dataclass(frozen=True)
class ServingParts:
    """What a daemon needs to turn events into published lists."""

    metrics: Metrics
    health: Health
    redis: RedisClient
    watch: RedisWatch
    lists: SharedLists
    predictor: Predictor
    store: SequenceStore
    publisher: Publisher
    counts: OnlineCounts
    shadow: Shadow
