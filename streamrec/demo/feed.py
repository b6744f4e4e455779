"""Send the live clicks to Kafka, and score each against the list that its user has at that moment."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from sasrec import Event, Interactions
from streamrec.demo.hits import HitCounter, K, ScoredClick
from streamrec.demo.snapshot import Snapshot
from streamrec.kafka.replay import Pacer, click_producer
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings

FOLLOW_S = 3.0  # the screen shows a user for this time, or longer while the user clicks
RETRAIN_AFTER = 0.5  # of the live clicks
STORED_ITEMS = 200  # per user in Redis: more than the model's window, so that more seen items are left out


class Feeder:
    """Stands where a team's own systems stand: writes clicks to Kafka, and reads lists from Redis.

    Args:
        on_retrain: called once, after RETRAIN_AFTER of the clicks.
    """

    def __init__(
        self,
        settings: Settings,
        live: Interactions,
        hits: HitCounter,
        now: Snapshot,
        on_retrain: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._live = live
        self._hits = hits
        self._now = now
        self._on_retrain = on_retrain
        self._followed_since_s = 0.0
        self.followed_user = ""
        self.clicks: defaultdict[str, list[str]] = defaultdict(list)  # of each user, oldest first
        self.after_swap: list[ScoredClick] = []

    async def run(self, redis: RedisClient, rate_per_s: float, started_s: float) -> None:
        """Send all clicks at a rate; 0 is as fast as possible."""
        now, pacer = self._now, Pacer(rate_per_s)
        async with click_producer(self._settings.kafka, self._settings.events) as producer:
            for event in self._events():
                await pacer.wait()
                await self._score(redis, event)
                await producer.send(event)
                self.clicks[event.user_id].append(event.item_id)
                self._follow(event.user_id)
                now.sent += 1
                now.seconds = time.monotonic() - started_s
                now.events_per_s = now.sent / now.seconds
                if now.sent == int(now.total * RETRAIN_AFTER):
                    self._on_retrain()

    def _events(self) -> Iterator[Event]:
        live = self._live
        rows = zip(live.user_ids, live.item_ids, live.timestamps_ms.tolist(), strict=True)
        return (Event(*row) for row in rows)

    async def _score(self, redis: RedisClient, event: Event) -> None:
        listed, n = await _list_of(redis, event.user_id)
        self._hits.add(event, listed)
        if self._now.swap:
            history = self.clicks[event.user_id][:n][-STORED_ITEMS:]
            self.after_swap.append(ScoredClick(history, event.item_id, event.item_id in listed[:K]))

    def _follow(self, user: str) -> None:
        """Choose the user on the screen: the one of this click, but another user only every FOLLOW_S."""
        at_s = time.monotonic()
        if user == self.followed_user or at_s - self._followed_since_s > FOLLOW_S:
            self.followed_user, self._followed_since_s = user, at_s


async def _list_of(redis: RedisClient, user: str) -> tuple[list[str], int]:
    """Return the items that a page would show, and the number of events behind them; 0 for the popular list."""
    own, popular = await redis.get_many([redis.keys.recommendation(user), redis.keys.popular])
    value = json.loads(own or popular or b'{"items": []}')
    return value["items"], value["n"] if own else 0
