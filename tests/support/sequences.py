"""Make sequence stores with unused keys, and ids that are hard to store."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.redis_access import under

MakeSettings = Callable[..., Settings]
numbers = itertools.count()
against_redis = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

AWKWARD = [
    "ann",
    "a b",
    "1 2 3",
    "{a}",
    "{",
    "}",
    "a:b",
    "0:5,1:7",
    "a\nb",
    "50%",
    "%d %s",
    "\\",
    "'\"",
    "é",
    "日本",
    "😀",
    "*",
    " ",
    "\r",
    "\x01",
    "-1",
    "1",
    "x" * 256,
    "popular",
]
ids = st.sampled_from(AWKWARD) | st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=5)


def store_of(
    redis: RedisClient, settings: Settings, max_len: int = 5, exclude_ttl_s: int = 0, metrics: Metrics | None = None
) -> SequenceStore:
    return SequenceStore(
        under(redis, settings),
        settings.sequences,
        settings.kafka.topic_epoch,
        max_len,
        metrics or Metrics(),
        exclude_ttl_s,
    )


def fresh(make_settings: MakeSettings, **changes: Any) -> Settings:
    """Return settings with a key prefix that no other example uses."""
    settings = make_settings(**changes)
    return settings.but(redis_key_prefix=f"{settings.redis.key_prefix}-{next(numbers)}")
