"""EventBatch -> [UserSequence] in one Redis round trip, or one to each node of a cluster.

A user's stored value is one STRING that append.lua writes and ``StoredSequence`` reads:

    1 n session_n count last_event_ts_ms topic_epoch partition:offset,...  NUL  item NUL item NUL ...

The header contains the replay guard: an event at or below the last applied offset of its user *and partition* is
skipped, so a batch that is delivered again after a crash changes nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from streamrec.errors import RedisRejected, StreamrecError
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script
from streamrec.schemas import ClickEvent, EventBatch, StoredItems, UserSequence
from streamrec.setting_groups import SequenceSettings

log = logging.getLogger(__name__)

MASS_REJECTION = 0.5  # share of a batch's events; a larger share of rejected events is worth a line in the log
# the control appends an item to one, for a minute
APPEND = Script(__package__, "append", replicated=True, control=(1, 60, 0, 0, 1, 0, 0, 0, "item"))
# append.lua has the same pattern and the same limit
VALUE = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) (\d+) ([\d:,]*)\0(.*)", re.DOTALL)
MAX_DIGITS = 16
MAX_EVENTS_PER_CALL = 10_000  # some 20 ms, in which Redis does nothing else; no record has more

OnRefused = Callable[[str, StreamrecError], None]


def raise_refused(user_id: str, error: StreamrecError) -> None:
    """Raise the error of a user whose data Redis, or this version, can never take."""
    raise error


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """The content of a stored value; ``offsets`` is the replay guard: the last applied offset of each partition."""

    items: StoredItems
    n: int
    session_n: int
    last_event_ts_ms: int
    topic_epoch: int
    offsets: dict[int, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the value that append.lua would have written."""
        offsets = ",".join(sorted(f"{partition}:{offset}" for partition, offset in self.offsets.items()))
        header = f"1 {self.n} {self.session_n} {len(self.items)} {self.last_event_ts_ms} {self.topic_epoch} {offsets}"
        return header.encode() + b"\0" + self.items.data

    def for_user(self, user_id: str) -> UserSequence:
        """Return the sequence to score, as if every event had been replayed."""
        return UserSequence(user_id, self.items, self.n, self.session_n, self.last_event_ts_ms)

    @classmethod
    def decode(cls, user_id: str, value: bytes) -> StoredSequence | None:
        """Read a value; None if it is damaged.

        Raises:
            StreamrecError: a newer streamrec has written the value.
        """
        parsed = _parse(user_id, value)
        if parsed is None:
            return None
        n, session_n, count, last_event_ts_ms, topic_epoch, offsets, items = parsed
        pairs = re.findall(rb"(\d+):(\d+)", offsets)
        guard = {int(partition): int(offset) for partition, offset in pairs}
        return cls(StoredItems.of_value(items, count), n, session_n, last_event_ts_ms, topic_epoch, guard)


class SequenceStore:
    """Users' sequences in Redis.

    Args:
        max_len: items stored per user.
    """

    def __init__(
        self, redis: RedisClient, settings: SequenceSettings, topic_epoch: int, max_len: int, metrics: Metrics
    ) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._settings = settings
        self._topic_epoch = topic_epoch
        self._metrics = metrics
        self.max_len = max_len
        self._rejecting = False

    async def append(self, batch: EventBatch, on_refused: OnRefused = raise_refused) -> list[UserSequence]:
        """Append the events of a batch; return the sequence of every user in it.

        Users whose events were all replays are returned too, to be scored and published again: the daemon may have
        crashed between append and publish.

        Args:
            on_refused: called with each user whose events can never be appended, and the reason [raise it].

        Raises:
            RedisUnavailable: try again; applied events are not applied twice.
        """
        settings = self._settings
        shared = [self.max_len, settings.ttl_s, int(settings.session_gap_s * 1000), self._topic_epoch]
        appended: dict[str, _Appended] = {}
        refused: dict[str, StreamrecError] = {}
        for by_user in _by_user(batch.events):
            calls = [([self._keys.sequence(user_id)], _arguments(events)) for user_id, events in by_user.items()]
            replies = await self._redis.run_each(APPEND, shared, calls)
            for (user_id, events), reply in zip(by_user.items(), replies, strict=True):
                try:
                    appended.setdefault(user_id, _Appended()).add(user_id, events, reply)
                except StreamrecError as error:
                    refused[user_id] = error
        for user_id, why in refused.items():
            on_refused(user_id, why)
        found = {user_id: user for user_id, user in appended.items() if user_id not in refused}
        self._count_rejections(sum(u.events for u in found.values()), sum(u.applied for u in found.values()))
        return [user.sequence(user_id) for user_id, user in found.items()]

    async def read(self, users: list[str], on_refused: OnRefused = raise_refused) -> list[UserSequence]:
        """Return the stored sequences of users; users without one are left out.

        Args:
            on_refused: called with each user whose value cannot be read, and the reason [raise it].

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        values = await self._redis.get_many([self._keys.sequence(user) for user in users])
        sequences = []
        for user, value in zip(users, values, strict=True):
            try:
                if value is not None:
                    sequences.append(parse_sequence(user, value))
            except StreamrecError as error:
                on_refused(user, error)
        return sequences

    def _count_rejections(self, events: int, applied: int) -> None:
        """Count applied and rejected events; log when most are rejected, and when that ends."""
        rejected = events - applied
        self._metrics.events.labels("applied").inc(applied)
        self._metrics.events.labels("replayed").inc(rejected)
        self._metrics.guard_rejections.inc(rejected)
        rejecting = rejected > MASS_REJECTION * events
        if rejecting and not self._rejecting:
            log.warning(
                "most events of a batch were applied before: normal for a moment after a crash or a rebalance, or "
                "beside a rebuild; if this continues, the topic was probably deleted and created again: raise "
                "STREAMREC_KAFKA_TOPIC_EPOCH",
                extra={"rejected": rejected, "events": events},
            )
        elif self._rejecting and not rejecting:
            log.info("events are new again")
        self._rejecting = rejecting


def _by_user(events: list[ClickEvent]) -> Iterator[dict[str, list[ClickEvent]]]:
    """Yield the events by user, those of one call at a time; the events of a record are in one call."""
    begin = 0
    while begin < len(events):
        end = min(begin + MAX_EVENTS_PER_CALL, len(events))
        while end < len(events) and events[end].place:
            end -= 1
        by_user: dict[str, list[ClickEvent]] = {}
        for event in events[begin:end]:
            by_user.setdefault(event.user_id, []).append(event)
        yield by_user
        begin = end


def _arguments(events: list[ClickEvent]) -> list[RedisArg]:
    """Return what append.lua takes for the events of a user."""
    args: list[RedisArg] = [len(events)]
    for event in events:
        args += ("" if event.place else event.partition, event.offset, event.timestamp_ms, event.item_id)
    return args


@dataclass(slots=True)
class _Appended:
    """What append.lua replied for one user, in one or more calls."""

    value: bytes = b""
    applied: int = 0
    events: int = 0
    record_ts_ms: list[int] = field(default_factory=list)  # of each record

    def add(self, user_id: str, events: list[ClickEvent], reply: list[Any] | RedisRejected) -> None:
        """Add the reply of a call.

        Raises:
            StreamrecError: the user's events were refused.
        """
        if isinstance(reply, RedisRejected):
            raise reply
        applied, damaged, self.value = reply
        if applied < 0:
            raise RedisRejected(f"user {user_id!r}: {self.value.decode(errors='replace')}")
        if damaged:
            log.warning("a damaged sequence was discarded and begun anew", extra={"user_id": user_id})
        self.applied += applied
        self.events += len(events)
        self.record_ts_ms += [event.record_ts_ms for event in events if not event.place]

    def sequence(self, user_id: str) -> UserSequence:
        """Return the user's sequence after all calls."""
        return parse_sequence(user_id, self.value, self.applied, tuple(self.record_ts_ms))


def parse_sequence(user_id: str, value: bytes, applied: int = 0, record_ts_ms: tuple[int, ...] = ()) -> UserSequence:
    """Read a stored value.

    Raises:
        StreamrecError: the value is damaged, or a newer streamrec has written it.
    """
    parsed = _parse(user_id, value)
    if parsed is None:
        raise StreamrecError(f"the stored sequence of user {user_id!r} cannot be read: it is damaged")
    n, session_n, count, last_event_ts_ms, _, _, items = parsed
    return UserSequence(
        user_id, StoredItems.of_value(items, count), n, session_n, last_event_ts_ms, applied, record_ts_ms
    )


def _parse(user_id: str, value: bytes) -> tuple[int, int, int, int, int, bytes, bytes] | None:
    """Split a value into the numbers of its header, the offsets and the items; None if append.lua would discard it.

    Raises:
        StreamrecError: a newer streamrec has written the value.
    """
    found = VALUE.fullmatch(value)
    if found is None:
        return None
    version, *numbers, offsets, items = found.groups()
    if version != b"1":
        raise StreamrecError(
            f"the stored sequence of user {user_id!r} cannot be read: format {version.decode()} was written by a newer "
            "streamrec, this one reads format 1: upgrade it"
        )
    if any(len(number) > MAX_DIGITS for number in numbers):
        return None
    n, session_n, count, last_event_ts_ms, topic_epoch = map(int, numbers)
    if not count <= session_n <= n:
        return None
    return n, session_n, count, last_event_ts_ms, topic_epoch, offsets, items
