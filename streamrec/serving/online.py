"""Online figures: how often clicks hit the lists of each model version, over all daemons and restarts.

The daemon counts in memory and flushes to Redis every ``lists_refresh_s``, so a click costs no round trip. A crash
loses the counts since the last flush; a lost reply of Redis makes the flushed counts count twice.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from prometheus_client import Counter

from streamrec.errors import RedisRejected, StreamrecError
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.script import Script
from streamrec.serving.lists import POPULAR
from streamrec.setting_groups import DAY_S

ONLINE = Script(__package__, "online")
TTL_S = 90 * DAY_S
MAX_LABELS = 8  # model versions with metrics of their own
MAX_VERSION_CHARS = 64
OTHER = "other"  # the label of all other versions
MAX_PENDING = 1_000  # versions, between two flushes


@dataclass(frozen=True)
class OnlineFigures:
    """The fields of a version's hash.

    The last three count clicks while the version was the shadow: the shadow's hits, the clicks evaluated, and the
    hits of the published lists on these clicks.
    """

    judged: float = 0.0
    hits: float = 0.0
    reciprocal_ranks: float = 0.0
    popularity_hits: float = 0.0
    shadow_hits: float = 0.0
    champion_judged: float = 0.0
    champion_hits: float = 0.0

    def rates(self) -> dict[str, float]:
        """Return rates and counts by name; those without evaluated clicks are left out."""
        rates: dict[str, float] = {"judged": round(self.judged)}
        if self.judged:
            rates |= {
                "hr@10": self.hits / self.judged,
                "mrr@10": self.reciprocal_ranks / self.judged,
                "popularity_hr@10": self.popularity_hits / self.judged,
            }
        if self.champion_judged:
            rates |= {
                "shadow_hr@10": self.shadow_hits / self.champion_judged,
                "champion_hr@10": self.champion_hits / self.champion_judged,
                "champion_judged": round(self.champion_judged),
            }
        return rates


class ModelCounters:
    """The counters of the last ``MAX_LABELS`` model versions, of the popular list, and of all other versions together.

    The version of a list is what Redis says. A version that this daemon serves, or scores as the shadow, replaces the
    one that was served and counted longest ago; one that only Redis names gets a free place or none.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = {
            "judged": metrics.judged,
            "hits": metrics.hits,
            "reciprocal_ranks": metrics.reciprocal_ranks,
            "popularity_hits": metrics.popularity_hits,
        }
        # a label is looked up once, not four times a click
        self._named: OrderedDict[str, dict[str, Counter]] = OrderedDict()  # the version to replace next comes first
        self._fixed: dict[str, dict[str, Counter]] = {}

    def serve(self, version: str) -> None:
        """Count a version under its own name from now on."""
        if version not in self._named:
            while len(self._named) >= MAX_LABELS:
                replaced, _ = self._named.popitem(last=False)
                for counter in self._metrics.values():
                    counter.remove(replaced)
            self._named[version] = self._counters(version)
        self._named.move_to_end(version)

    def add(self, version: str, counted: Mapping[str, float]) -> None:
        """Add to the counters of a version."""
        for name, counter in self._of(version).items():
            counter.inc(counted[name])

    def _of(self, version: str) -> dict[str, Counter]:
        found = self._named.get(version)
        if found is not None:
            self._named.move_to_end(version)
            return found
        if version != POPULAR and is_version(version) and len(self._named) < MAX_LABELS:
            self._named[version] = self._counters(version)
            self._named.move_to_end(version, last=False)
            return self._named[version]
        label = POPULAR if version == POPULAR else OTHER
        if label not in self._fixed:
            self._fixed[label] = self._counters(label)
        return self._fixed[label]

    def _counters(self, label: str) -> dict[str, Counter]:
        return {name: counter.labels(label) for name, counter in self._metrics.items()}


class OnlineCounts:
    """Counts by model version: for Prometheus at once, for Redis at every flush."""

    def __init__(self, redis: RedisClient, metrics: Metrics) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._counters = ModelCounters(metrics)
        self._pending: dict[str, dict[str, float]] = {}
        self._flushing = asyncio.Lock()

    def serve(self, version: str) -> None:
        """Give a version that is served, or scored as the shadow, metrics of its own."""
        self._counters.serve(version)

    def count(self, version: str, clicks: Sequence[str], items: Sequence[str], popular_hits: int) -> None:
        """Count clicks of a user who saw ``items``, listed by that version; ``popular_hits`` hit the popular list."""
        counted = {
            "judged": len(clicks),
            "hits": sum(click in items for click in clicks),
            "reciprocal_ranks": sum(1 / (items.index(click) + 1) for click in clicks if click in items),
            "popularity_hits": popular_hits,
        }
        self._counters.add(version, counted)
        self._add(version, counted)

    def compare(self, shadow: str, clicks: Sequence[str], items: Sequence[str], published: Sequence[str]) -> None:
        """Count clicks of a user who saw ``published``, and for whom the shadow had listed ``items``."""
        counted = {
            "shadow_hits": sum(click in items for click in clicks),
            "champion_judged": len(clicks),
            "champion_hits": sum(click in published for click in clicks),
        }
        self._add(shadow, counted)

    async def flush(self) -> None:
        """Add the counts since the last flush to the figures in Redis; a version that is refused stops no other.

        Raises:
            RedisUnavailable: Redis does not answer; the next flush includes these counts.
            RedisRejected: a version's key has another type; the same.
        """
        rejected = None
        async with self._flushing:  # the last flush, at shutdown, waits for the current one
            for version in list(self._pending):
                counted = self._pending.pop(version)
                args: list[str | int | float] = [TTL_S]
                for name, amount in counted.items():
                    args += (name, amount)
                try:
                    await self._redis.run(ONLINE, [self._keys.online(version)], args)
                except RedisRejected as error:
                    self._add(version, counted)
                    rejected = error
                except BaseException:
                    self._add(version, counted)
                    raise
        if rejected is not None:
            raise rejected

    def _add(self, version: str, counted: Mapping[str, float]) -> None:
        if version not in self._pending and (len(self._pending) >= MAX_PENDING or not is_version(version)):
            return  # no daemon made so many versions, or this one
        pending = self._pending.setdefault(version, {})
        for name, amount in counted.items():
            pending[name] = pending.get(name, 0.0) + amount


def is_version(text: str) -> bool:
    """Return whether a text may be the name of a model version: others can break metrics and Redis keys."""
    return 0 < len(text) <= MAX_VERSION_CHARS and text.isascii() and text.isprintable()


async def read_figures(redis: RedisClient, versions: Sequence[str]) -> dict[str, OnlineFigures]:
    """Return the figures of those versions that have any.

    Raises:
        RedisUnavailable: Redis does not answer.
        StreamrecError: a value is not a number.
    """
    names = {field.name for field in fields(OnlineFigures)}
    figures = {}
    for version in versions:
        stored = await redis.hash(redis.keys.online(version))
        try:
            values = {name: float(value) for name, value in stored.items() if name in names}
        except ValueError as error:
            raise StreamrecError(f"the online figures of version {version} cannot be read: {error}") from None
        if values:
            figures[version] = OnlineFigures(**values)
    return figures
