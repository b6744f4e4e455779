"""The items that no list may contain: those of the operator's blocklist, and those that the table does not have as
available.

Lists are computed with a mask of the model's vocabulary, in which an item changes when its reason does: a click pays
for no look-up. A refused item that was allowed before has gone, and the sweep takes it out of published lists.

An empty table refuses nothing: a topic that nobody has written to yet must not empty all lists.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import numpy as np

from sasrec import BlockedItems, ItemVocab
from streamrec.items.table import ItemTable

AT_ONCE = 500  # changes
LONGEST_WAIT_S = 1.0  # for the next item that comes or goes by itself: the clock may be set
MOST_GONE = 500  # items that go at once and are swept by name; if more go, all lists are compared with the table


class Refusals:
    """Tells which items are refused now, and which have gone.

    Args:
        table: the table of items; None: there is none.
        allow_unknown: allow items that the table does not have.
        now_ms: the clock.
    """

    def __init__(
        self,
        table: ItemTable | None = None,
        allow_unknown: bool = False,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        self.table = table
        self.blocked: frozenset[str] = frozenset()
        self.changes = 0  # lists that were computed at another number may have items that are refused now
        self.has_gone = asyncio.Event()
        self._gone: set[str] = set()
        self._all_gone = False
        self._allow_unknown = allow_unknown
        self._clock_ms = now_ms
        self._now_ms = now_ms()  # availability is as of this time
        self._masks: WeakKeyDictionary[ItemVocab, BlockedItems] = WeakKeyDictionary()
        self._building: dict[ItemVocab, set[str]] = {}

    @property
    def refuses_any(self) -> bool:
        """Whether any item may be refused."""
        return bool(self.blocked or self.table)

    def refuses(self, item_id: str) -> bool:
        """Return whether no list may contain an item now."""
        if item_id in self.blocked:
            return True
        if not self.table:
            return False
        if item_id not in self.table:
            return not self._allow_unknown
        return not self.table.is_available(item_id, self._now_ms)

    def of(self, vocab: ItemVocab) -> BlockedItems:
        """Return the refused items of a vocabulary; it stays up to date."""
        mask = self._masks.get(vocab)
        if mask is None:
            mask = self._masks[vocab] = self._mask(vocab)
        return mask

    async def prepare(self, vocab: ItemVocab) -> None:
        """Make the mask of a new model's vocabulary in a thread, so that no click waits for it."""
        changed = self._building[vocab] = set()
        try:
            mask = await asyncio.to_thread(self._mask, vocab)
        finally:
            del self._building[vocab]
        self._masks[vocab] = mask
        self._show(changed)

    def block(self, items: frozenset[str]) -> None:
        """Replace the operator's blocklist."""
        changed = items ^ self.blocked
        before = {item: self.refuses(item) for item in changed}
        self.blocked = items
        self._note(before)

    def put(self, item_id: str, value: bytes) -> None:
        """Add or replace an item of the table. Raises BadRecord if the value is no item."""
        assert self.table is not None
        self.pass_time()
        before, first = self.refuses(item_id), not self.table
        self.table.put(item_id, value)
        self._note({item_id: before})
        if first and not self._allow_unknown:
            self._start_over()

    def remove(self, item_id: str) -> None:
        """Remove an item of the table."""
        assert self.table is not None
        before = self.refuses(item_id)
        self.table.remove(item_id)
        self._note({item_id: before})
        if not self.table:
            self._start_over()

    def replace(self, table: ItemTable) -> None:
        """Use another table; for the start, before lists are computed."""
        self.table = table
        self._start_over()

    async def change_to(self, table: ItemTable, unread: Iterable[str]) -> None:
        """Apply what differs in another table, a few items at a time: clicks go first.

        Args:
            unread: items whose values could not be read; if the other table lacks them, they remain as they are.
        """
        assert self.table is not None
        for number, item_id in enumerate(await asyncio.to_thread(self.table.differences, table, unread)):
            value = table.value(item_id)
            if value is None:
                self.remove(item_id)
            else:
                self.put(item_id, value)
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)

    def pass_time(self) -> None:
        """Let items come and go whose time has come."""
        now_ms = self._clock_ms()
        before = {item: self.refuses(item) for item in self.table.passed_edges(now_ms)} if self.table else {}
        self._now_ms = now_ms
        self._note(before)

    async def watch_time(self) -> None:
        """Let time pass, and wait for the next item that comes or goes by itself."""
        self.pass_time()
        next_ms = self.table.next_edge_ms() if self.table else math.inf
        await asyncio.sleep(min(max((next_ms - self._clock_ms()) / 1000, 0.0), LONGEST_WAIT_S))

    def take_gone(self) -> set[str] | None:
        """Return the items that have gone since the last call; None if these are too many to name."""
        gone, everything = {item for item in self._gone if self.refuses(item)}, self._all_gone
        self._gone, self._all_gone = set(), False
        self.has_gone.clear()
        return None if everything else gone

    def put_back(self, gone: set[str] | None) -> None:
        """Let the next ``take_gone`` return these again."""
        self._all_gone |= gone is None
        self._note_gone(gone or ())

    def _note(self, before: dict[str, bool]) -> None:
        """Update masks for items that were refused or allowed before."""
        changed = [item for item, refused in before.items() if self.refuses(item) != refused]
        if changed:
            self._show(changed)
            self._note_gone(item for item in changed if not before[item])

    def _note_gone(self, items: Iterable[str]) -> None:
        self._gone.update(item for item in items if self.refuses(item))
        if len(self._gone) > MOST_GONE:
            self._all_gone = True
        if self._all_gone:
            self._gone.clear()
        if self._gone or self._all_gone:
            self.has_gone.set()

    def _start_over(self) -> None:
        """All items may have changed."""
        self._now_ms = self._clock_ms()
        self.changes += 1
        for vocab in self._masks:
            self._masks[vocab] = self._mask(vocab)
        for vocab, changed in self._building.items():
            changed.update(vocab.ids)
        self.put_back(None)

    def _show(self, items: Iterable[str]) -> None:
        self.changes += 1
        states = {item: self.refuses(item) for item in items}
        for vocab, mask in self._masks.items():
            for index, refused in zip(vocab.encode(states), states.values(), strict=True):
                mask.set(index, refused)
        for changed in self._building.values():
            changed.update(states)

    def _mask(self, vocab: ItemVocab) -> BlockedItems:
        mask = np.zeros(len(vocab) + 1, np.bool_)
        if self.refuses_any:
            mask[1:] = [self.refuses(item) for item in vocab.ids]
        return BlockedItems(mask)
