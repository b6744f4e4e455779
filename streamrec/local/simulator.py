"""Simulate clicks for machines without real data: shoppers who walk along shelves.

Each shelf has an order in which its products are usually viewed; each user prefers a few shelves. So the next click
can be predicted from the previous ones, and only partly from popularity.
"""

from __future__ import annotations

import numpy as np

from sasrec import Event

SHELVES = ("Coffee", "Tea", "Bread", "Cheese", "Pasta", "Rice", "Spices", "Fruit", "Juice", "Honey", "Nuts", "Soap")
PRODUCTS_A_SHELF = 40
NEXT_ON_SHELF = 0.7
CHANGE_SHELF = 0.1
BASE_MS = 1_700_000_000_000


def simulate_clicks(events: int = 40_000, users: int = 600, seed: int = 0) -> tuple[list[Event], dict[str, str]]:
    """Return events in time order, and titles by item id; a seed always gives equal data."""
    rng = np.random.default_rng(seed)
    titles = {
        f"{shelf[:2].lower()}{number}": f"{shelf} no. {number + 1}"
        for shelf in SHELVES
        for number in range(PRODUCTS_A_SHELF)
    }
    items = list(titles)
    taste = rng.dirichlet(np.full(len(SHELVES), 0.3), users)  # (users, shelves)
    popularity = 1.0 / np.arange(1, PRODUCTS_A_SHELF + 1)
    popularity /= popularity.sum()
    shelf_of = np.array([rng.choice(len(SHELVES), p=taste[user]) for user in range(users)])
    place_of = rng.integers(PRODUCTS_A_SHELF, size=users)
    clicks = []
    # one visit of a few clicks after another
    user, left = 0, 0
    for number in range(events):
        if left == 0:
            user, left = int(rng.integers(users)), int(rng.geometric(0.15))
        left -= 1
        draw = rng.random()
        if draw < CHANGE_SHELF:
            shelf_of[user] = rng.choice(len(SHELVES), p=taste[user])
        if draw < NEXT_ON_SHELF:
            place_of[user] = (place_of[user] + 1) % PRODUCTS_A_SHELF
        else:
            place_of[user] = rng.choice(PRODUCTS_A_SHELF, p=popularity)
        item = items[shelf_of[user] * PRODUCTS_A_SHELF + place_of[user]]
        clicks.append(Event(f"shopper-{user}", item, BASE_MS + number * 1000))
    return clicks, titles
