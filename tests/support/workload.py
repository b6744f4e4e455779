"""Records to produce: clicks, bad records, and an endless mix of both."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# A header of records that are no click events; the daemon ignores it.
BAD = "test.bad"
BASE_MS = 1_700_000_000_000
DAY_MS = 86_400_000


def click(user: str | int, item: str | int, timestamp_ms: int | None = None, **more: Any) -> bytes:
    """Return the value of a click's record. A time below a day counts from BASE_MS: tests number their clicks."""
    if isinstance(timestamp_ms, int) and 0 <= timestamp_ms < DAY_MS:
        timestamp_ms += BASE_MS
    timed = {} if timestamp_ms is None else {"timestamp": timestamp_ms}
    return json.dumps({"user_id": user, "item_id": item, **timed, **more}).encode()


@dataclass(frozen=True)
class Record:
    """One record to produce."""

    key: bytes | None
    value: bytes | None
    bad: bool = False

    @property
    def headers(self) -> list[tuple[str, bytes]]:
        return [(BAD, b"")] if self.bad else []


FAR_FUTURE_MS = 4_000_000_000_000
NO_EVENTS: dict[str, bytes | None] = {
    "not JSON": b"{not json",
    "not UTF-8": b'{"user_id": "\xff\xfe", "item_id": "i1"}',
    "not an object": b'["u1", "i1"]',
    "no item": b'{"user_id": "u1"}',
    "a user that is no id": b'{"user_id": null, "item_id": "i1"}',
    "an empty id": click("", "i1"),
    "an over-long id": click("u1", "i" * 257),
    "NUL in an id": click("u1", "i\0"),
    "half a surrogate pair": b'{"user_id": "\\ud800", "item_id": "i1"}',
    "a time that is no number": b'{"user_id": "u1", "item_id": "i1", "timestamp": "noon"}',
    "a time before 1970": click("u1", "i1", -1),
    "a time in seconds": click("u1", "i1", BASE_MS // 1000),
    "a time in microseconds": click("u1", "i1", BASE_MS * 1000),
    "a time in the far future": click("u1", "i1", FAR_FUTURE_MS),
    "a tombstone": None,
    "no bytes": b"",
}


# with this, an event may be an order too: a list of products, each a click
ORDERS = {"events_item_id": "item_id|products[].id"}
BAD_ORDERS = (b'{"user_id": "u1", "products": [{"id": "i1"}, {"id": ""}]}', b'{"user_id": "u1", "products": [{}]}')


def order(user: str | int, items: Iterable[str | int], timestamp_ms: int | None = None, **more: Any) -> bytes:
    """Return the value of an order's record."""
    products = [{"id": item, "price": 5} for item in items]
    timed = {} if timestamp_ms is None else {"timestamp": timestamp_ms}
    return json.dumps({"user_id": user, "products": products, **timed, **more}).encode()


# with these, an event may have a type
ROLES = {
    "events_roles": "view=click,purchase=click+exclude,dislike=exclude,impression=ignore",
    "lists_exclude_ttl_s": 100 * 365 * 86_400,
}
TYPES = ("view", "view", "view", "purchase", "dislike", "impression", "unnamed", None)


KNOWN_ITEMS: list[str | int] = [f"i{n}" for n in range(50)]


def workload(seed: int, bad_share: float = 0.02, order_share: float = 0.0, typed: bool = False) -> Iterator[Record]:
    """Yield records without end: hot and rare users, known and unknown items, ids as text or integer, some bad.

    Args:
        order_share: share of records with several clicks, or none; they need the setting in ORDERS.
        typed: events have types; they need the settings in ROLES.
    """
    rng = random.Random(seed)
    users: list[str | int] = [*(f"u{n}" for n in range(40)), *range(1000, 1020), *(f"stranger {n}" for n in range(5))]
    rng.shuffle(users)
    weights = [1 / (place + 3) for place in range(len(users))]
    ts_ms = BASE_MS
    while True:
        user = rng.choices(users, weights)[0]
        key = str(user).encode()
        if rng.random() < bad_share:
            bad = [*NO_EVENTS.values(), *(BAD_ORDERS if order_share else ())]
            yield Record(key, rng.choice(bad), bad=True)
            continue
        unknown = str(user).startswith("stranger") or rng.random() < 0.15
        item: str | int = rng.choice([f"x{rng.randrange(30)}", rng.randrange(30)] if unknown else KNOWN_ITEMS)
        ts_ms += rng.randrange(2_000)
        # some are out of order, and some have only the timestamp of the record
        stamp = None if rng.random() < 0.02 else ts_ms - rng.choice((0, 0, 0, 500, 90 * DAY_MS))
        more = {"event_type": rng.choice(TYPES)} if typed else {}
        if order_share and rng.random() < order_share:
            yield Record(key, order(user, [item, *rng.choices(KNOWN_ITEMS, k=12)][: rng.randrange(14)], stamp, **more))
        else:
            yield Record(key, click(user, item, stamp, **more))
