"""[Recommendation] -> Redis, in one round trip to each node. A list from fewer events never replaces one from more."""

from __future__ import annotations

import time

import msgspec

from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script
from streamrec.schemas import PublishedList, Recommendation

PUBLISH = Script(__package__, "publish", replicated=True)


class Publisher:
    """Writes the lists that applications read."""

    def __init__(self, redis: RedisClient, ttl_s: int, metrics: Metrics) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._encoder = msgspec.json.Encoder()

    async def publish(self, recommendations: list[Recommendation]) -> list[bytes | None]:
        """Publish lists, compare-and-set; return the previous value of each, None if there was none.

        Raises:
            RedisUnavailable: try again; publishing twice is harmless.
        """
        if not recommendations:
            return []
        published_ts_ms = int(time.time() * 1000)
        calls: list[tuple[list[str], list[RedisArg]]] = []
        for r in recommendations:
            value = PublishedList(r.items, r.scores, r.model, r.event_ts_ms, published_ts_ms, r.n)
            keys = [self._keys.recommendation(r.user_id), self._keys.sequence(r.user_id)]
            calls.append((keys, [r.n, self._encoder.encode(value).decode()]))
        replies = await self._redis.run_each(PUBLISH, [self._ttl_s], calls)
        written = sum(done for done, _ in replies)
        self._metrics.published.labels("published").inc(written)
        self._metrics.published.labels("superseded").inc(len(recommendations) - written)
        now_ms = time.time() * 1000
        for r in recommendations:
            for record_ts_ms in r.record_ts_ms:
                self._metrics.click_to_published.observe(max(0.0, (now_ms - record_ts_ms) / 1000))
        return [value or None for _, value in replies]
