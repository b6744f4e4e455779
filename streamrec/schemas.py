"""What flows along the serving path, in this order: click, batch, sequence, recommendation, published list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import msgspec

from streamrec.errors import StreamrecError

NUL = b"\0"  # no id contains it


class Role(NamedTuple):
    """What an event does."""

    click: bool = True  # it extends the sequence
    exclude: bool = False  # it takes the item out of the user's lists for a while
    outcome: float = 1.0  # how good it is, 0 to 1; training weighs it so


CLICK = Role()
EXCLUDE = Role(click=False, exclude=True)


class Exclusions(NamedTuple):
    """The items that a user's lists may not contain now; ``changes``: how often they have changed."""

    items: tuple[str, ...] = ()
    changes: int = 0


NO_EXCLUSIONS = Exclusions()


class ClickEvent(msgspec.Struct, frozen=True):
    """A decoded click and its position in the topic."""

    user_id: str
    item_id: str
    timestamp_ms: int  # of the click
    partition: int
    offset: int
    record_ts_ms: int  # when the producer handed the record to Kafka: latency counts from here
    place: int = 0  # among the clicks of its record, which all have one offset
    role: Role = CLICK


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that is not a click event, with its origin and the reason."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    reason: str


class RecordMark(NamedTuple):
    """A record that identifies its topic (kafka/marks.py): its offset, its time, and a checksum of its bytes."""

    offset: int
    timestamp_ms: int
    checksum: int

    def __str__(self) -> str:
        return f"{self.offset} {self.timestamp_ms} {self.checksum}"

    @classmethod
    def parse(cls, text: str) -> RecordMark | None:
        """Read what ``str`` wrote; None for anything else."""
        try:
            offset, timestamp_ms, checksum = map(int, text.split(" "))
        except ValueError:
            return None
        return cls(offset, timestamp_ms, checksum)


@dataclass(frozen=True)
class EventBatch:
    """The records of one poll.

    ``next_offsets`` are the offsets to commit, by partition. ``assignment`` is the number of the partition assignment
    under which the batch was read. ``marks`` are those of the last records, by partition.
    """

    events: list[ClickEvent] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    next_offsets: dict[int, int] = field(default_factory=dict)
    assignment: int = 0
    marks: dict[int, RecordMark] = field(default_factory=dict)


class StoredItems(msgspec.Struct, frozen=True, gc=False):
    """A user's item ids as Redis stores them: oldest first, a NUL behind each.

    A click rarely needs the ids as text, so the bytes are decoded only on request.
    """

    data: bytes = b""

    @classmethod
    def of(cls, item_ids: Iterable[str]) -> Self:
        """Encode item ids."""
        return cls(b"".join([item_id.encode() + NUL for item_id in item_ids]))

    @classmethod
    def of_value(cls, data: bytes, count: int) -> Self:
        """Return the items of a stored value whose header says that there are ``count``.

        In a damaged value a last item may lack its NUL, or there may be more or fewer items: the newest ``count``
        complete ones are used.
        """
        if data.count(NUL) == count and (not data or data.endswith(NUL)):
            return cls(data)
        return cls(b"".join([item_id + NUL for item_id in data.split(NUL)[-1 - count : -1]]))

    def __len__(self) -> int:
        return self.data.count(NUL)

    def ids(self) -> list[str]:
        """Decode the item ids. Damaged bytes are replaced: one damaged value must not stop the daemon."""
        return self.data.decode("utf-8", "replace").split("\0")[:-1]

    def newest_ids(self, count: int) -> list[str]:
        """Decode the ids of the newest ``count`` items, oldest first."""
        return self.data[self._start_of_newest(count) :].decode("utf-8", "replace").split("\0")[:-1]

    def without_newest(self, count: int) -> StoredItems:
        """Return the items without the newest ``count``."""
        return StoredItems(self.data[: self._start_of_newest(count)])

    def _start_of_newest(self, count: int) -> int:
        start = len(self.data)
        while count and start:
            start = self.data.rfind(NUL, 0, start - 1) + 1
            count -= 1
        return start

    def ids_after(self, before: StoredItems, dropped: int) -> list[str] | None:
        """Return the ids that follow the items of ``before`` without its oldest ``dropped``.

        None if these do not begin with the items that remain of ``before``.
        """
        remaining = before.data.split(NUL, dropped)[-1]
        if not self.data.startswith(remaining):
            return None
        return self.data[len(remaining) :].decode("utf-8", "replace").split("\0")[:-1]

    def missing(self, needles: Sequence[bytes]) -> Iterator[int]:
        """Yield the places of the needles, made by ``needles_of``, whose item is not stored here."""
        # a search of the bytes costs less than a set of all items: callers stop after the first few places
        data = NUL + self.data
        return (place for place, needle in enumerate(needles) if needle not in data)

    @staticmethod
    def needles_of(item_ids: Iterable[str]) -> list[bytes]:
        """Encode item ids for ``missing``."""
        return [b"\0%b\0" % item_id.encode(errors="replace") for item_id in item_ids]


NO_ITEMS = StoredItems()


@dataclass(frozen=True, slots=True)
class UserSequence:
    """A user's stored sequence after a batch was appended.

    ``n`` counts all events ever applied, ``session_n`` those since the last session gap. ``stored`` holds the newest
    items of the session. ``applied`` events of this batch were new, the others were replays.

    ``clicks`` are the item ids of the new events that are still stored: a session gap or max_len may have removed some.
    """

    user_id: str
    stored: StoredItems
    n: int
    session_n: int
    last_event_ts_ms: int
    applied: int = 0
    record_ts_ms: tuple[int, ...] = ()
    excluded: Exclusions = NO_EXCLUSIONS

    clicks: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clicks", self.stored.newest_ids(self.applied))

    @property
    def before(self) -> StoredItems:
        """The items without the clicks."""
        return self.stored.without_newest(self.applied)

    def unwanted(self, filter_seen: bool) -> StoredItems:
        """Return the items that the user's list may not contain."""
        seen = self.stored if filter_seen else NO_ITEMS
        return StoredItems(seen.data + StoredItems.of(self.excluded.items).data) if self.excluded.items else seen

    @property
    def items(self) -> list[str]:
        """All item ids, oldest first."""
        return self.stored.ids()


class Recommendation(msgspec.Struct, frozen=True):
    """A list to publish, computed from a user's first ``n`` clicks.

    ``exclusions`` and ``changes`` count how often the user's exclusions, and refusals, had changed.
    """

    user_id: str
    items: list[str]
    scores: list[float]
    model: str
    event_ts_ms: int
    n: int
    record_ts_ms: tuple[int, ...] = ()
    exclusions: int = 0
    changes: int = 0

    def without(self, refused: Callable[[str], bool]) -> Recommendation:
        """Return the list without the refused items."""
        places = [place for place, item in enumerate(self.items) if not refused(item)]
        items, scores = [self.items[place] for place in places], [self.scores[place] for place in places]
        return msgspec.structs.replace(self, items=items, scores=scores)


class PublishedList(msgspec.Struct):
    """The JSON value of a recommendation key. ``n`` must be the last field: publish.lua expects it there."""

    items: list[str]
    scores: list[float]
    model: str
    event_ts_ms: int
    published_ts_ms: int
    n: int


def parse_published(user_id: str, value: bytes) -> PublishedList:
    """Read the value of a recommendation key.

    Raises:
        StreamrecError: the value is not a list as this version writes it.
    """
    try:
        found = msgspec.json.decode(value, type=PublishedList)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StreamrecError(f"the published list of user {user_id!r} cannot be read: {error}") from None
    if len(found.items) != len(found.scores):
        counts = f"{len(found.items)} items, {len(found.scores)} scores"
        raise StreamrecError(f"the published list of user {user_id!r} cannot be read: {counts}")
    return found
