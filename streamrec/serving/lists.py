"""What all users share: the popular list, kept fresh from the clicks, and the operator's blocklist.

Popularity is a ZSET of clicks that halve every ``lists_popular_half_life_s``. It is counted in memory and flushed
every ``lists_refresh_s``, so a crash can lose that long of counts: enough for a fallback, and free on the path of
a click. Where nothing has been counted yet, the clicks of the training data count as if they came just
before the first one of the stream.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from itertools import islice

import msgspec

from sasrec import ItemVocab, Ranking
from streamrec.redis.client import RedisClient
from streamrec.redis.script import Script
from streamrec.schemas import PublishedList, UserSequence
from streamrec.setting_groups import ListSettings

log = logging.getLogger(__name__)

POPULARITY = Script(__package__, "popularity")
POPULAR = "popular"  # stands where a model version stands
KEPT_ITEMS = 10_000
ADDED_AT_ONCE = 250  # items: 1 ms of Redis, in which it does nothing else
RESCALE_HALF_LIVES = 60
LOST = 0.9  # of what was counted so much must be there, or it was lost


class SharedLists:
    """Popular list and blocklist.

    Args:
        counts_ttl_s: the click counts expire after this time without a click.
        max_len: how many seen items a user may have, so that enough popular ones remain for each.
        vocab: of the model, with the training data's counts.
    """

    def __init__(
        self, redis: RedisClient, settings: ListSettings, counts_ttl_s: int, max_len: int, vocab: ItemVocab
    ) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._settings = settings
        self._counts_ttl_s = counts_ttl_s
        self._wanted = settings.top_k + max_len
        counts = sorted(zip(vocab.ids, vocab.counts.tolist(), strict=True), key=lambda pair: -pair[1])
        self._prior = {item: float(count) for item, count in counts[:KEPT_ITEMS]}
        self._prior_given = False
        self._weights: dict[str, float] = {}
        self._reference_ms = 0  # the time as of which the weights are: forward decay, so that none need rescaling
        self._newest_ms = 0
        self._popular = _marked(list(self._prior), list(self._prior.values()))
        self._candidates: frozenset[str] = frozenset(self._prior)
        self.blocked: frozenset[str] = frozenset()

    def count(self, sequences: Collection[UserSequence]) -> None:
        """Count the events that were newly applied; as of the time of each user's newest one."""
        for sequence in sequences:
            if not sequence.applied:
                continue
            self._newest_ms = max(self._newest_ms, sequence.last_event_ts_ms)
            if not self._weights or self._half_lives(sequence.last_event_ts_ms) > RESCALE_HALF_LIVES:
                self._refer_to(sequence.last_event_ts_ms)
            weight = 2.0 ** self._half_lives(sequence.last_event_ts_ms)
            for item in sequence.clicks:
                self._weights[item] = self._weights.get(item, 0.0) + weight

    async def refresh(self) -> None:
        """Flush the counts, read the blocklist, publish the popular list.

        Raises:
            RedisUnavailable: Redis does not answer; the counts are kept for the next time.
        """
        self.blocked = frozenset(await self._redis.members(self._keys.blocklist))
        self._refer_to(self._newest_ms)
        weights, self._weights = self._weights, {}
        reference_ms = self._reference_ms
        try:
            if weights and not self._prior_given:
                await self._exchange(self._prior, reference_ms, only_if_missing=True)
                self._prior_given = True
            while len(weights) > ADDED_AT_ONCE:
                part = dict(islice(weights.items(), ADDED_AT_ONCE))
                await self._exchange(part, reference_ms, wanted=0)
                for item in part:
                    del weights[item]
            await self._exchange(weights, reference_ms)
        except BaseException:
            newer, newer_ms = self._weights, self._reference_ms  # of clicks that came meanwhile
            self._weights, self._reference_ms = weights, reference_ms
            self._refer_to(max(newer_ms, reference_ms))
            scale = 2.0 ** self._half_lives(newer_ms)
            for item, weight in newer.items():
                self._weights[item] = self._weights.get(item, 0.0) + weight * scale
            raise
        top = self.popular_for(b"", self._settings.top_k)
        value = PublishedList(top.items, top.scores, POPULAR, self._newest_ms, int(time.time() * 1000), 0)
        await self._redis.set(self._keys.popular, msgspec.json.encode(value), self._settings.ttl_s)

    async def restore(self, counts: Mapping[str, float], counted_ms: int, began_ms: int | None) -> bool:
        """Put counts in the place of those that Redis holds if it has lost some; True if so.

        What the daemons flush meanwhile may be lost: as much as in a crash.

        Args:
            counts: clicks of each item, as of ``counted_ms``.
            began_ms: when the training data's clicks counted in full; None where they are among ``counts``.

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        stored = await self._exchange({}, counted_ms)
        if sum(stored.scores) >= LOST * sum(heapq.nlargest(len(stored.scores), counts.values())) > 0:
            return False
        await self._redis.delete(self._keys.popularity)
        if began_ms is not None:
            await self._exchange(self._prior, began_ms)
        kept = heapq.nlargest(KEPT_ITEMS, counts, key=lambda item: counts[item])
        await self._exchange({item: counts[item] for item in kept}, counted_ms)
        self._newest_ms = max(self._newest_ms, counted_ms)
        return True

    def popular_for(self, stored: bytes, k: int) -> Ranking:
        """The k most popular items that are neither blocked nor among a user's stored ones, a NUL behind each."""
        seen, (popular, marked) = b"\0" + stored, self._popular
        free = (p for p, item in enumerate(popular.items) if marked[p] not in seen and item not in self.blocked)
        kept = list(islice(free, k))
        return Ranking([popular.items[place] for place in kept], [popular.scores[place] for place in kept])

    def popular_hits(self, clicks: Sequence[str], stored: bytes, k: int) -> int:
        """How many of the clicks are among ``popular_for``: most are of items that are not popular at all."""
        if self._candidates.isdisjoint(clicks):
            return 0
        listed = self.popular_for(stored, k).items
        return sum(click in listed for click in clicks)

    def _half_lives(self, timestamp_ms: int) -> float:
        return (timestamp_ms - self._reference_ms) / 1000 / self._settings.popular_half_life_s

    def _refer_to(self, timestamp_ms: int) -> None:
        """Give the weights as of a later time, of which they are a smaller part."""
        scale = 2.0 ** -self._half_lives(timestamp_ms) if self._weights else 0.0
        self._weights = {item: weight * scale for item, weight in self._weights.items()}
        self._reference_ms = timestamp_ms

    async def _exchange(
        self, weights: dict[str, float], reference_ms: int, only_if_missing: bool = False, wanted: int | None = None
    ) -> Ranking:
        """Add to the counts in Redis; returns the top of them, as many as are wanted: by default, as serving needs."""
        args: list[str | int | float] = [
            self._settings.popular_half_life_s * 1000,
            self._counts_ttl_s,
            self._wanted + len(self.blocked) if wanted is None else wanted,
            KEPT_ITEMS,
            int(only_if_missing),
            reference_ms,
        ]
        for item, weight in weights.items():
            args += (item, weight)
        reply = await self._redis.run(POPULARITY, [self._keys.popularity], args)
        top = [item.decode() for item in reply[::2]], [float(weight) for weight in reply[1::2]]
        if reply:
            self._popular, self._candidates = _marked(*top), frozenset(top[0])
        return Ranking(*top)


def _marked(items: list[str], scores: list[float]) -> tuple[Ranking, list[bytes]]:
    """A list, and its items as they stand in a user's bytes: to look there for the first few costs less than a set."""
    return Ranking(items, scores), [b"\0%b\0" % item.encode(errors="replace") for item in items]
