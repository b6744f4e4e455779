"""[Recommendation] -> Redis, in one round trip to each node. A list from fewer events never replaces one from more."""

from __future__ import annotations

import time

import msgspec

from streamrec.errors import RedisRejected
from streamrec.items.refusals import Refusals
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script
from streamrec.schemas import PublishedList, Recommendation
from streamrec.serving.sequences import OnRefused, raise_refused

PUBLISH = Script(__package__, "publish", replicated=True, control=(60, 2, 0, "{}"))
PUBLISH_EXCLUDING = Script(__package__, "publish", replicated=True, control=(60, 3, 0, "{}", 0))


class Publisher:
    """Writes the lists that applications read.

    Args:
        refusals: items that were refused after a list was computed are left out of it.
        excludes: whether users may have exclusions; a list from before they changed is not published.
    """

    def __init__(
        self,
        redis: RedisClient,
        ttl_s: int,
        metrics: Metrics,
        refusals: Refusals | None = None,
        excludes: bool = False,
    ) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._excludes = excludes
        self._refusals = Refusals() if refusals is None else refusals
        self._encoder = msgspec.json.Encoder()

    async def publish(
        self, recommendations: list[Recommendation], on_refused: OnRefused = raise_refused
    ) -> list[bytes | None]:
        """Publish lists, compare-and-set; return the previous value of each, None if there was none.

        Args:
            on_refused: called with each user whose list can never be published, and the reason [raise it].

        Raises:
            RedisUnavailable: try again; publishing twice is harmless.
        """
        if not recommendations:
            return []
        published_ts_ms = int(time.time() * 1000)
        calls: list[tuple[list[str], list[RedisArg]]] = []
        for r in recommendations:
            if r.changes != self._refusals.changes:  # since the list was computed
                r = r.without(self._refusals.refuses)
            value = PublishedList(r.items, r.scores, r.model, r.event_ts_ms, published_ts_ms, r.n)
            keys = [self._keys.recommendation(r.user_id), self._keys.sequence(r.user_id)]
            args: list[RedisArg] = [r.n, self._encoder.encode(value).decode()]
            if self._excludes:
                keys.append(self._keys.exclusions(r.user_id))
                args.append(r.exclusions)
            calls.append((keys, args))
        script, keys_of_user = (PUBLISH_EXCLUDING, 3) if self._excludes else (PUBLISH, 2)
        replies = await self._redis.run_each(script, [self._ttl_s, keys_of_user], calls)
        written, now_ms = 0, time.time() * 1000
        previous: list[bytes | None] = []
        for r, reply in zip(recommendations, replies, strict=True):
            if isinstance(reply, RedisRejected):
                on_refused(r.user_id, reply)
                previous.append(None)
                continue
            done, value = reply
            written += done
            previous.append(value or None)
            for record_ts_ms in r.record_ts_ms:
                self._metrics.click_to_published.observe(max(0.0, (now_ms - record_ts_ms) / 1000))
        self._metrics.published.labels("published").inc(written)
        self._metrics.published.labels("superseded").inc(
            sum(not isinstance(r, RedisRejected) for r in replies) - written
        )
        return previous
