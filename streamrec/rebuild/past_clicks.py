"""All past clicks of each user, from the archive and from the topic after it, and the sequence that they make.

Clicks are ordered as the daemon applied them, as far as this is known: imported clicks by time, then those of each
topic epoch, within a partition by offset. A user has clicks in several partitions if partitions were added or producers
do not key by user; these are merged by time.

The daemon's TTL runs from the arrival of a click, which an archive does not store. The user's newest time before and
up to the click stands for it: a late click neither cuts a sequence nor makes it too old, and a time before 1973, which
is none, does not either.

Exclusions are apart from the clicks: a click that also excludes is both.

Memory: 36 bytes for each click of the archive, and each user and item id once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from msgspec.structs import replace
from numpy.typing import NDArray

from sasrec.data.times import EARLIEST_MS, LIBRARY_BOUNDS, TimeBounds
from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveError
from streamrec.event_times import newest_ms, pauses_ms, usable
from streamrec.schemas import EXCLUDE, ClickEvent, StoredItems
from streamrec.serving.sequences import StoredSequence
from streamrec.setting_groups import SequenceSettings

Part = tuple[int, int, pa.Table]  # topic epoch, partition, clicks
IMPORTED = -1  # the topic epoch of imported clicks


class PastClicks:
    """Clicks by user.

    Args:
        archive: read as a whole.
        max_len: items per user.
        bounds: clicks after these times are skipped.

    Raises:
        ArchiveError: the archive cannot be read, or is empty.
    """

    def __init__(
        self, archive: EventArchive, settings: SequenceSettings, max_len: int, bounds: TimeBounds = LIBRARY_BOUNDS
    ) -> None:
        self._epoch = archive.topic_epoch
        self._gap_ms = int(settings.session_gap_s * 1000)
        self._ttl_ms = settings.ttl_s * 1000
        self._max_len = max_len
        found = archive.tables()
        self.next_offsets = {segment.partition: segment.next for segment, _ in found if segment.partition is not None}
        parts: list[Part] = [(IMPORTED, 0, table) for segment, table in found if segment.partition is None]
        followed = {epoch: earlier.tables(imported=False) for epoch, earlier in archive.before().items()}
        for epoch, of_epoch in (followed | {self._epoch: found}).items():
            parts += [(epoch, segment.partition, table) for segment, table in of_epoch if segment.partition is not None]
        parts = _usable_parts(parts, bounds, archive)
        self._exclusions: dict[str, dict[str, ClickEvent]] = {}  # by user and item, the newest
        for _, partition, table in parts:
            self._note_exclusions(_exclusions_in(table, partition))
        parts = [(epoch, partition, table.filter(table["click"])) for epoch, partition, table in parts]
        if not any(table.num_rows for _, _, table in parts):
            raise ArchiveError(
                f"the archive {archive.store} is empty; fill it with: streamrec archive follow, or streamrec archive "
                "import FILE"
            )
        sizes = [table.num_rows for _, _, table in parts]
        table = pa.concat_tables([table.replace_schema_metadata() for _, _, table in parts])
        users = table["user_id"].dictionary_encode().combine_chunks()
        items = table["item_id"].dictionary_encode().combine_chunks()
        epochs = np.repeat([epoch for epoch, _, _ in parts], sizes)
        partitions = np.repeat([partition for _, partition, _ in parts], sizes)
        columns = (epochs, partitions, table["offset"].to_numpy(), table["timestamp_ms"].to_numpy())
        order = np.lexsort((np.where(epochs == IMPORTED, columns[3], 0), epochs, users.indices.to_numpy()))
        self._columns = np.stack([column[order] for column in columns])  # (4, clicks), by user
        self._items: list[str] = items.dictionary.to_pylist()
        self._item_of: NDArray[np.int32] = items.indices.to_numpy()[order]
        self._users: dict[str, int] = {user: place for place, user in enumerate(users.dictionary.to_pylist())}
        counts = np.bincount(users.indices.to_numpy(), minlength=len(self._users))
        self._begins = np.concatenate(([0], counts.cumsum()))
        self._later: dict[str, list[ClickEvent]] = {}

    def __len__(self) -> int:
        return len(self._item_of) + sum(map(len, self._later.values()))

    @property
    def has_imported(self) -> bool:
        """Whether the archive has imported clicks, which were never in the topic."""
        return bool((self._columns[0] == IMPORTED).any())

    @property
    def first_ts_ms(self) -> int:
        """Time of the first click of the archive."""
        return int(self._columns[3].min())

    def add(self, events: Sequence[ClickEvent]) -> None:
        """Add events that the topic has after those of the archive."""
        self._note_exclusions(replace(event, role=EXCLUDE, place=0) for event in events if event.role.exclude)
        for event in events:
            if event.role.click:
                self._later.setdefault(event.user_id, []).append(event)

    def exclusions(self, since_ms: float) -> list[ClickEvent]:
        """Return the newest exclusion of each user and item, without earlier ones, as events that only exclude."""
        newest = (event for items in self._exclusions.values() for event in items.values())
        return [event for event in newest if event.timestamp_ms > since_ms]

    def _note_exclusions(self, events: Iterable[ClickEvent]) -> None:
        for event in events:
            items = self._exclusions.setdefault(event.user_id, {})
            if event.item_id not in items or items[event.item_id].timestamp_ms < event.timestamp_ms:
                items[event.item_id] = event

    def users(self) -> list[str]:
        """Return all users, the one with the newest click first."""
        newest = dict(zip(self._users, np.maximum.reduceat(self._columns[3], self._begins[:-1]).tolist(), strict=True))
        for user, later in self._later.items():
            newest[user] = max(newest.get(user, 0), *(event.timestamp_ms for event in later))
        return sorted(newest, key=lambda user: -newest[user])

    def sequence_of(self, user_id: str) -> StoredSequence:
        """Return the sequence that a user's clicks make on an empty Redis."""
        place = self._users.get(user_id)
        own = slice(0, 0) if place is None else slice(*self._begins[place : place + 2].tolist())
        later = self._later.get(user_id, [])
        rows = [(self._epoch, event.partition, event.offset, event.timestamp_ms) for event in later]
        columns = np.concatenate((self._columns[:, own], np.array(rows, np.int64).reshape(-1, 4).T), axis=1)
        order = _applied_order(*columns)
        epochs, partitions, offsets, times_ms = columns[:, order]
        one_user = np.zeros(len(order), np.int64)
        pauses = pauses_ms(one_user, times_ms)
        expired = pauses > self._ttl_ms
        expired[1:] &= newest_ms(one_user, times_ms)[:-1] >= EARLIEST_MS  # a time that is none tells no pause
        begin = _last(expired)  # a sequence that has expired is not restored
        session = max(begin, _last(pauses > self._gap_ms)) if self._gap_ms else begin
        archived = own.stop - own.start
        items = [
            self._items[self._item_of[own.start + row]] if row < archived else later[row - archived].item_id
            for row in order[session:][-self._max_len :].tolist()
        ]
        current = epochs == self._epoch
        guard = {int(p): int(offsets[current & (partitions == p)].max()) for p in np.unique(partitions[current])}
        return StoredSequence(
            StoredItems.of(items),
            len(order) - begin,
            len(order) - session,
            max(0, int(times_ms[begin:].max())),
            self._epoch,
            guard,
        )

    def popularity(self, half_life_s: float) -> tuple[dict[str, float], int]:
        """Return the clicks of each item, halved every half-life until the newest click, and its time."""
        later = [event for events in self._later.values() for event in events]
        newest = max([int(self._columns[3].max()), *(event.timestamp_ms for event in later)])
        weights = np.exp2((self._columns[3] - newest) / 1000 / half_life_s)
        counts = np.bincount(self._item_of, weights, len(self._items))
        found = dict(zip(self._items, counts.tolist(), strict=True))
        for event in later:
            weight = 2.0 ** ((event.timestamp_ms - newest) / 1000 / half_life_s)
            found[event.item_id] = found.get(event.item_id, 0.0) + weight
        return found, newest


def _usable_parts(parts: list[Part], bounds: TimeBounds, archive: EventArchive) -> list[Part]:
    """Return the parts that have clicks, without clicks whose time is none."""
    if not parts:
        return []
    times = np.concatenate([table["timestamp_ms"].to_numpy() for _, _, table in parts])
    masks = np.split(usable(times, bounds, archive.store), np.cumsum([table.num_rows for _, _, table in parts])[:-1])
    left = [
        (epoch, number, table if mask.all() else table.filter(pa.array(mask)))
        for (epoch, number, table), mask in zip(parts, masks, strict=True)
    ]
    return [part for part in left if part[2].num_rows]


def _exclusions_in(table: pa.Table, partition: int) -> list[ClickEvent]:
    """Return the exclusions of a part, without their clicks."""
    found = table.filter(table["exclude"]).to_pylist()
    return [
        ClickEvent(e["user_id"], e["item_id"], e["timestamp_ms"], partition, e["offset"], -1, role=EXCLUDE)
        for e in found
    ]


def _applied_order(
    epochs: NDArray[np.int64], partitions: NDArray[np.int64], offsets: NDArray[np.int64], times_ms: NDArray[np.int64]
) -> NDArray[np.intp]:
    """Return the order in which clicks were applied: by offset within a partition, partitions merged by time."""
    reached_ms = times_ms.copy()
    places = epochs * 2**31 + partitions
    for place in np.unique(places):
        own = places == place
        reached_ms[own] = np.maximum.accumulate(times_ms[own])
    return np.lexsort((offsets, partitions, reached_ms, epochs))


def _last(marks: NDArray[np.bool_]) -> int:
    """Return the row of the last mark, 0 if there is none."""
    found = np.flatnonzero(marks)
    return int(found[-1]) if len(found) else 0
