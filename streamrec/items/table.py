"""The table of items: for each item the JSON value as it was sent, which is decoded on request.

A value is checked when it is put in. Only items with limits take more memory: those that are not available, or only
from or until some time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from datetime import datetime

import msgspec

from sasrec.data.times import LIBRARY_BOUNDS
from streamrec.errors import BadRecord

NEVER = (math.inf, -math.inf)  # limits of an item that is not available
OUTDATED_EDGES = 1_000


class Item(msgspec.Struct, frozen=True):
    """The fields of an item that streamrec knows; others are stored for the page, and null is the default."""

    title: str | None = None
    categories: tuple[str, ...] | str | None = None
    available: bool | None = None
    available_from: int | float | str | None = None
    available_until: int | float | str | None = None
    boost: float | None = None

    @property
    def all_categories(self) -> tuple[str, ...]:
        """The categories; one text is one category."""
        return (self.categories,) if isinstance(self.categories, str) else self.categories or ()


_DECODER = msgspec.json.Decoder(Item)


class ItemTable:
    """Items by id."""

    def __init__(self) -> None:
        self._rows: dict[str, bytes] = {}
        self._limits: dict[str, tuple[float, float]] = {}  # available from, until, in ms; else without an end
        self._edges: list[tuple[float, str]] = []  # a heap; an item that has changed since is only looked at again

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._rows

    def put(self, item_id: str, value: bytes) -> None:
        """Add or replace an item.

        Raises:
            BadRecord: the value is no item; the former one remains.
        """
        limits = limits_of(value)
        self._rows[item_id] = value
        if limits is None:
            self._limits.pop(item_id, None)
            return
        self._limits[item_id] = limits
        if limits is not NEVER:
            for edge_ms in limits:
                if math.isfinite(edge_ms):
                    heapq.heappush(self._edges, (edge_ms, item_id))
        if len(self._edges) > OUTDATED_EDGES + 4 * len(self._limits):  # items that are sent again and again
            edges = {(edge_ms, item) for item, limits in self._limits.items() for edge_ms in limits}
            self._edges = sorted(edge for edge in edges if math.isfinite(edge[0]))

    def remove(self, item_id: str) -> None:
        """Remove an item, if it is there."""
        self._rows.pop(item_id, None)
        self._limits.pop(item_id, None)

    def value(self, item_id: str) -> bytes | None:
        """Return the value of an item as it was sent."""
        return self._rows.get(item_id)

    def item(self, item_id: str) -> Item | None:
        """Return the known fields of an item."""
        value = self._rows.get(item_id)
        return None if value is None else _DECODER.decode(value)

    def is_available(self, item_id: str, now_ms: float) -> bool:
        """Return whether an item of the table is available at a time."""
        begin, end = self._limits.get(item_id, (-math.inf, math.inf))
        return begin <= now_ms < end

    def next_edge_ms(self) -> float:
        """Return the next time at which an item may come or go; infinite if none is known."""
        return self._edges[0][0] if self._edges else math.inf

    def passed_edges(self, now_ms: float) -> Iterator[str]:
        """Yield the items whose times have come, and forget these times."""
        while self._edges and self._edges[0][0] <= now_ms:
            yield heapq.heappop(self._edges)[1]

    def differences(self, other: ItemTable, unread: Iterable[str]) -> list[str]:
        """Return the ids whose values differ in another table; it need not have the ``unread`` ones."""
        ids = [item for item, value in other._rows.items() if self._rows.get(item) != value]
        known = set(unread)
        return ids + [item for item in self._rows if item not in other._rows and item not in known]


def limits_of(value: bytes) -> tuple[float, float] | None:
    """Return from when until when an item is available, in ms; None: always.

    Raises:
        BadRecord: the value is no item; the message is the reason.
    """
    try:
        item = _DECODER.decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRecord(f"not an item: {error}") from None
    begin = _time_ms("available_from", item.available_from, -math.inf)
    end = _time_ms("available_until", item.available_until, math.inf)
    if item.available is False or begin >= end:
        return NEVER
    return None if (begin, end) == (-math.inf, math.inf) else (begin, end)


def _time_ms(name: str, value: int | float | str | None, default: float) -> float:
    """Return a time in ms.

    Raises:
        BadRecord: it is neither RFC 3339 nor a number of milliseconds.
    """
    if value is None:
        return default
    if not isinstance(value, str):
        problem = LIBRARY_BOUNDS.problem(name, value)
        if problem is not None:
            raise BadRecord(problem)
        return float(value)
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise BadRecord(f"{name} {value[:40]!r} is no time as RFC 3339 writes it, like 2026-11-30T09:00:00Z") from None
    if time.tzinfo is None:
        raise BadRecord(f"{name} {value[:40]!r} has no time zone: add Z, or an offset like +01:00")
    return time.timestamp() * 1000
