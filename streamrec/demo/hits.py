"""Prequential hit rates: was a click in the list that its user had before the click?"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice

from sasrec import Engine, Event, Interactions
from streamrec.registry import Registry
from streamrec.settings import Settings

K = 10
RANK_EVERY = 25  # clicks between two rankings of the popularity baseline
USERS_PER_BATCH = 256

Counts = tuple[int, int, int]  # clicks, hits of the published lists, hits of the popularity baseline


@dataclass(frozen=True)
class HitRates:
    """Shares of the same clicks that were in the first 10 items of the published list and of the popular items."""

    clicks: int
    model: float
    popularity: float


@dataclass(frozen=True)
class ScoredClick:
    """A click, the events that its list was computed from (none for the popular list), and whether it was a hit."""

    history: list[str]
    item_id: str
    hit: bool


class HitCounter:
    """Counts the hits of the published lists and of a popularity baseline on the same clicks.

    The baseline is stronger than the daemon's popular list: it ranks the most clicked items of the past and of the
    stream so far, and leaves out the user's seen items if the published lists do.
    """

    def __init__(self, past: Interactions, filter_seen: bool) -> None:
        self._filter_seen = filter_seen
        self._clicks_by_item = Counter(past.item_ids)
        self._seen: defaultdict[str, set[str]] = defaultdict(set)
        for user, item in zip(past.user_ids, past.item_ids, strict=True):
            self._seen[user].add(item)
        self._ranked: list[str] = []
        self.clicks = self.hits = self.popularity_hits = 0

    def add(self, event: Event, listed: list[str]) -> None:
        """Count a click against the items that its user's page would list, then add it to the baseline."""
        if self.clicks % RANK_EVERY == 0:
            self._ranked = [item for item, _ in self._clicks_by_item.most_common()]
        seen = self._seen[event.user_id]
        popular = islice((item for item in self._ranked if not self._filter_seen or item not in seen), K)
        self.clicks += 1
        self.hits += event.item_id in listed[:K]
        self.popularity_hits += event.item_id in popular
        self._clicks_by_item[event.item_id] += 1
        seen.add(event.item_id)

    def counts(self) -> Counts:
        """Return the counts so far."""
        return self.clicks, self.hits, self.popularity_hits

    def rates(self, since: Counts = (0, 0, 0)) -> HitRates | None:
        """Return the rates of the clicks after earlier counts; None if no click came."""
        clicks, hits, popularity_hits = (now - then for now, then in zip(self.counts(), since, strict=True))
        return HitRates(clicks, hits / clicks, popularity_hits / clicks) if clicks else None


def hit_rate_of(settings: Settings, version: str, clicks: list[ScoredClick]) -> float:
    """Return the hit rate that another model would have had on these clicks, from the same events.

    Tastes drift: two models compare better on the same clicks than before and after a swap. A click on the popular
    list counts as it was.
    """
    assert settings.registry.dir is not None
    saved = Registry(settings.registry.dir).load(version)
    engine = Engine(saved.model, saved.vocab, cache_bytes=0, index="exact")
    hits = 0
    for start in range(0, len(clicks), USERS_PER_BATCH):
        batch = clicks[start : start + USERS_PER_BATCH]
        rankings = engine.recommend([click.history for click in batch], K, filter_seen=settings.lists.filter_seen)
        for click, ranking in zip(batch, rankings, strict=True):
            hits += click.item_id in ranking.items if ranking else click.hit
    return hits / len(clicks)
