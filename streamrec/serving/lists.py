"""The popular list, which all users share and clicks update; and the operator's blocklist, read from Redis.

Popularity is a ZSET of click counts that halve every ``lists_popular_half_life_s``. The daemon counts in memory and
flushes every ``lists_refresh_s``, so a click costs no round trip; a crash loses the counts since the last flush. While
Redis has no counts, the clicks of the training data count as if they came just before the first click of the stream.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Collection, Mapping
from itertools import islice

import msgspec

from sasrec import ItemVocab, Ranking
from streamrec.errors import RedisRejected, RedisUnavailable
from streamrec.items.refusals import Refusals
from streamrec.redis.client import RedisClient
from streamrec.redis.script import Script
from streamrec.schemas import NO_ITEMS, PublishedList, StoredItems, UserSequence
from streamrec.serving.sequences import MAX_EXCLUDED
from streamrec.setting_groups import ListSettings

log = logging.getLogger(__name__)

POPULARITY = Script(__package__, "popularity")
POPULAR = "popular"  # the model version of lists that no model made
MAX_COUNTED_ITEMS = 10_000
MAX_ITEMS_PER_CALL = 250  # about 1 ms, in which Redis does nothing else
RESCALE_HALF_LIVES = 60
INTACT_SHARE = 0.9  # Redis has lost counts if it holds less than this share of the true sum


def most_unwanted(max_len: int, exclude_ttl_s: int) -> int:
    """Return how many items a user's list may have to leave out: those of the sequence, and exclusions."""
    return max_len + (MAX_EXCLUDED if exclude_ttl_s else 0)


class SharedLists:
    """The popular list, and the blocklist as Redis has it.

    Args:
        counts_ttl_s: the click counts expire after this time without a click.
        max_len: items that a user's list may not contain; the popular list is this much longer than top_k.
        vocab: the model's, with the counts of the training data.
        refusals: the items that no list may contain [the blocklist alone].
    """

    def __init__(
        self,
        redis: RedisClient,
        settings: ListSettings,
        counts_ttl_s: int,
        max_len: int,
        vocab: ItemVocab,
        refusals: Refusals | None = None,
    ) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._settings = settings
        self._counts_ttl_s = counts_ttl_s
        self._popular_len = settings.top_k + max_len
        self.refusals = Refusals() if refusals is None else refusals
        counts = sorted(zip(vocab.ids, vocab.counts.tolist(), strict=True), key=lambda pair: -pair[1])
        self._training_counts = {item: float(count) for item, count in counts[:MAX_COUNTED_ITEMS]}
        self._training_counts_sent = False
        self._weights: dict[str, float] = {}
        self._reference_ms = 0  # the weights are as of this time: with forward decay a click rescales no other weight
        self._newest_ms = 0
        self._set_popular(list(self._training_counts), list(self._training_counts.values()))

    def count(self, sequences: Collection[UserSequence]) -> None:
        """Count the newly applied events, as of the time of each user's newest event."""
        for sequence in sequences:
            if not sequence.applied:
                continue
            self._newest_ms = max(self._newest_ms, sequence.last_event_ts_ms)
            if not self._weights or self._half_lives(sequence.last_event_ts_ms) > RESCALE_HALF_LIVES:
                self._rescale_to(sequence.last_event_ts_ms)
            weight = 2.0 ** self._half_lives(sequence.last_event_ts_ms)
            for item in sequence.clicks:
                self._weights[item] = self._weights.get(item, 0.0) + weight

    async def read_blocklist(self) -> None:
        """Read the blocklist.

        Raises:
            RedisUnavailable: Redis does not answer.
            RedisRejected: the key has another type.
        """
        self.refusals.block(frozenset(await self._redis.members(self._keys.blocklist)))

    async def refresh(self) -> None:
        """Read the blocklist, flush the counts, publish the popular list; a step that cannot be done stops no other.

        Raises:
            RedisUnavailable: Redis does not answer; the counts are flushed next time.
            RedisRejected: a key has another type; the same.
        """
        errors = []
        for step in (self.read_blocklist, self._flush_counts, self._publish_popular):
            try:
                await step()
            except (RedisUnavailable, RedisRejected) as error:
                errors.append(error)
                if type(error) is RedisUnavailable:  # each step would wait for a server that does not answer
                    break
        if errors:
            raise errors[0]

    async def _flush_counts(self) -> None:
        self._rescale_to(self._newest_ms)
        weights, self._weights = self._weights, {}
        reference_ms = self._reference_ms
        try:
            await self._flush(weights, reference_ms)
        except BaseException:
            self._put_back(weights, reference_ms)
            raise

    async def _publish_popular(self) -> None:
        top = self.popular_for(NO_ITEMS, self._settings.top_k)
        value = PublishedList(top.items, top.scores, POPULAR, self._newest_ms, int(time.time() * 1000), 0)
        await self._redis.set(self._keys.popular, msgspec.json.encode(value), self._settings.ttl_s)

    async def restore(self, counts: Mapping[str, float], counted_ms: int, first_ms: int | None) -> bool:
        """Replace the counts in Redis if Redis has lost some; return whether they were replaced.

        Counts that daemons flush at this moment may be lost, as in a crash.

        Args:
            counts: clicks of each item, as of ``counted_ms``.
            first_ms: time of the first click, at which the training data counts in full; None if ``counts`` include it.

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        stored = await self._add_counts({}, counted_ms)
        if sum(stored.scores) >= INTACT_SHARE * sum(heapq.nlargest(len(stored.scores), counts.values())) > 0:
            return False
        await self._redis.delete(self._keys.popularity)
        if first_ms is not None:
            await self._add_counts(self._training_counts, first_ms)
        top = heapq.nlargest(MAX_COUNTED_ITEMS, counts, key=lambda item: counts[item])
        await self._add_counts({item: counts[item] for item in top}, counted_ms)
        self._newest_ms = max(self._newest_ms, counted_ms)
        return True

    def popular_for(self, seen: StoredItems, k: int) -> Ranking:
        """Return the k most popular items that are neither refused nor seen."""
        self._leave_out_refused()
        items, scores = self._popular.items, self._popular.scores
        places = list(islice(seen.missing(self._needles), k))
        return Ranking([items[place] for place in places], [scores[place] for place in places])

    def popular_hits(self, sequence: UserSequence, k: int, filter_seen: bool) -> int:
        """Return the number of clicks whose item was in the popular list that the user could see before them."""
        self._leave_out_refused()
        if self._popular_items.isdisjoint(sequence.clicks):  # most clicks are of items that are not popular at all
            return 0
        listed = self.popular_for(sequence.before if filter_seen else NO_ITEMS, k).items
        return sum(click in listed for click in sequence.clicks)

    def _set_popular(self, items: list[str], scores: list[float]) -> None:
        self._all_popular = Ranking(items, scores)
        self._popular_changes = -1
        self._leave_out_refused()

    def _leave_out_refused(self) -> None:
        """Leave out the items that are refused now, if that has changed."""
        if self._popular_changes == self.refusals.changes:
            return
        self._popular_changes = self.refusals.changes
        items, scores = self._all_popular
        if self.refusals.refuses_any:
            places = [place for place, item in enumerate(items) if not self.refusals.refuses(item)]
            items, scores = [items[place] for place in places], [scores[place] for place in places]
        self._popular = Ranking(items, scores)
        self._popular_items = frozenset(items)
        self._needles = StoredItems.needles_of(items)

    @property
    def _top(self) -> int:
        """The number of items to read, so that enough are left if as many are refused as the last time."""
        return min(self._popular_len + len(self._all_popular.items) - len(self._popular.items), MAX_COUNTED_ITEMS)

    def _half_lives(self, timestamp_ms: int) -> float:
        return (timestamp_ms - self._reference_ms) / 1000 / self._settings.popular_half_life_s

    def _rescale_to(self, timestamp_ms: int) -> None:
        """Make a later time the reference of the weights."""
        scale = 2.0 ** -self._half_lives(timestamp_ms) if self._weights else 0.0
        self._weights = {item: weight * scale for item, weight in self._weights.items()}
        self._reference_ms = timestamp_ms

    async def _flush(self, weights: dict[str, float], reference_ms: int) -> None:
        """Add the weights to Redis, and remove from ``weights`` those that were added."""
        if weights and not self._training_counts_sent:
            await self._add_counts(self._training_counts, reference_ms, only_if_missing=True)
            self._training_counts_sent = True
        while len(weights) > MAX_ITEMS_PER_CALL:
            part = dict(islice(weights.items(), MAX_ITEMS_PER_CALL))
            await self._add_counts(part, reference_ms, top=0)
            for item in part:
                del weights[item]
        top = self._top
        found = await self._add_counts(weights, reference_ms, top=top)
        weights.clear()
        while len(self._popular.items) < self._popular_len and len(found.items) == top < MAX_COUNTED_ITEMS:
            top = min(2 * top, MAX_COUNTED_ITEMS)  # too many of them are refused
            found = await self._add_counts({}, reference_ms, top=top)

    def _put_back(self, weights: dict[str, float], reference_ms: int) -> None:
        """Add weights that could not be flushed to those counted meanwhile."""
        newer, newer_ms = self._weights, self._reference_ms
        self._weights, self._reference_ms = weights, reference_ms
        self._rescale_to(max(newer_ms, reference_ms))
        scale = 2.0 ** self._half_lives(newer_ms)
        for item, weight in newer.items():
            self._weights[item] = self._weights.get(item, 0.0) + weight * scale
        if len(self._weights) > 2 * MAX_COUNTED_ITEMS:  # the flush may have failed for days
            largest = heapq.nlargest(MAX_COUNTED_ITEMS, self._weights.items(), key=lambda pair: pair[1])
            self._weights = dict(largest)

    async def _add_counts(
        self, weights: dict[str, float], reference_ms: int, only_if_missing: bool = False, top: int | None = None
    ) -> Ranking:
        """Add weights to the counts in Redis; return the ``top`` items [as many as serving needs]."""
        args: list[str | int | float] = [
            self._settings.popular_half_life_s * 1000,
            self._counts_ttl_s,
            self._top if top is None else top,
            MAX_COUNTED_ITEMS,
            int(only_if_missing),
            reference_ms,
        ]
        for item, weight in weights.items():
            args += (item, weight)
        reply = await self._redis.run(POPULARITY, [self._keys.popularity], args)
        items, scores = (
            [item.decode(errors="replace") for item in reply[::2]],
            [float(weight) for weight in reply[1::2]],
        )
        if reply:
            self._set_popular(items, scores)
        return Ranking(items, scores)
