"""An outcomes study: views weigh less than purchases. What do purchases gain, and what does it cost on views?

A simulated shop with event types as in Rees46's data. After each item nine events of ten view one of 12 others, all
alike, and one buys one of three others, by 60, 25 and 15 %. So the best possible list for each weighting is known.
Events go through the archive with their outcomes, as the daemon's do, and a model is trained from it.

`make outcomes` runs it in a few minutes.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sasrec import Engine, Event, ItemVocab, SASRecConfig, Sequences, TrainConfig
from sasrec.training.train import train
from streamrec.archive.segments import EventArchive
from streamrec.event_roles import Roles

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.study, pytest.mark.timeout(1800)]

ITEMS, USERS, STEPS, NEW_USERS = 200, 1_500, 20, 400
VIEWED, BOUGHT = 12, (0.6, 0.25, 0.15)
PURCHASE_SHARE = 0.1
K = 10
SEEDS = (1, 2, 3)
BEGIN_MS = 1_700_000_000_000
OUTCOMES = {"all alike": {}, "view .2, purchase 1": {"view": 0.2, "purchase": 1.0}}


class Shop:
    """What follows each item."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        others = [self.rng.permutation(np.delete(np.arange(ITEMS), item)) for item in range(ITEMS)]
        self.viewed = [order[:VIEWED] for order in others]
        self.bought = [order[VIEWED : VIEWED + len(BOUGHT)] for order in others]

    def walk(self, user: str, steps: int) -> Iterator[Event]:
        item = int(self.rng.integers(ITEMS))
        for step in range(steps):
            if self.rng.random() < PURCHASE_SHARE:
                item, kind = int(self.rng.choice(self.bought[item], p=BOUGHT)), "purchase"
            else:
                item, kind = int(self.rng.choice(self.viewed[item])), "view"
            yield Event(user, f"i{item}", BEGIN_MS + step * 1000, None, kind)

    def best(self, item: int, outcomes: dict[str, float]) -> set[str]:
        """Return the K items that weigh most after an item."""
        views, purchases = outcomes.get("view", 1.0), outcomes.get("purchase", 1.0)
        weights = {int(i): views * (1 - PURCHASE_SHARE) / VIEWED for i in self.viewed[item]}
        weights |= {int(i): purchases * PURCHASE_SHARE * p for i, p in zip(self.bought[item], BOUGHT, strict=True)}
        return {f"i{i}" for i in sorted(weights, key=weights.__getitem__, reverse=True)[:K]}


class Rates(NamedTuple):
    """Hit rates@K of the next event, by its type."""

    view: float
    purchase: float


def rates(shop: Shop, lists: dict[int, set[str]], events: list[Event]) -> Rates:
    hits: dict[str, list[bool]] = defaultdict(list)
    for last, now in pairwise(events):
        if last.user_id == now.user_id:
            hits[str(now.event_type)].append(now.item_id in lists[int(last.item_id[1:])])
    return Rates(float(np.mean(hits["view"])), float(np.mean(hits["purchase"])))


def learned(events: list[Event], outcomes: dict[str, float], folder: Path, seed: int) -> dict[int, set[str]]:
    """Return the list after each item of a model that was trained from the archive."""
    archive = EventArchive(folder)
    archive.import_events(events, role_of=Roles({}, outcomes).of)
    past = archive.read()
    vocab = ItemVocab.from_items(past.item_ids)
    config = SASRecConfig(len(vocab), max_len=20, hidden_units=32, dropout_rate=0.1)
    options = TrainConfig(epochs=40, learning_rate=3e-3, loss="cross_entropy", patience=0, seed=seed)
    model, _ = train(config, Sequences.build(past, vocab), options)
    rankings = Engine(model, vocab).recommend([[f"i{item}"] for item in range(ITEMS)], K, filter_seen=False)
    return {item: set(ranking.items) if ranking else set() for item, ranking in enumerate(rankings)}


def test_outcomes_raise_the_hit_rate_of_purchases_at_a_cost_on_views(tmp_path: Path) -> None:
    found: dict[str, list[Rates]] = defaultdict(list)
    for seed in SEEDS:
        shop = Shop(seed)
        events = [event for user in range(USERS) for event in shop.walk(f"u{user}", STEPS)]
        new = [event for user in range(NEW_USERS) for event in shop.walk(f"n{user}", STEPS)]
        for name, outcomes in OUTCOMES.items():
            lists = learned(events, outcomes, tmp_path / f"{seed}-{name}", seed)
            found[name].append(rates(shop, lists, new))
            best = {item: shop.best(item, outcomes) for item in range(ITEMS)}
            found[f"{name}, best possible"].append(rates(shop, best, new))
            log.info("seed %d, %s: %s of %s", seed, name, found[name][-1], found[f"{name}, best possible"][-1])
    log.info("| outcomes | HR@%d of views | of purchases |", K)
    for name, runs in found.items():
        views, purchases = np.mean(runs, axis=0)
        log.info("| %s | %.3f | %.3f |", name, views, purchases)
    alike, weighed = (np.mean(found[name], axis=0) for name in OUTCOMES)
    assert weighed[1] > alike[1] + 0.3, "purchases"
    assert weighed[0] < alike[0], "views"
