"""EventBatch -> [UserSequence] in one Redis round trip, or one to each node of a cluster.

A user's stored value is one STRING that append.lua writes and ``StoredSequence`` reads:

    1 n session_n count last_event_ts_ms topic_epoch partition:offset,...  NUL  item NUL item NUL ...

The header contains the replay guard: an event at or below the last applied offset of its user *and partition* is
skipped, so a batch that is delivered again after a crash changes nothing.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamrec.errors import RedisRejected, StreamrecError
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.isolation import Call
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script
from streamrec.schemas import (
    NO_EXCLUSIONS,
    NO_ITEMS,
    ClickEvent,
    EventBatch,
    Exclusions,
    StoredItems,
    UserSequence,
)
from streamrec.setting_groups import SequenceSettings

log = logging.getLogger(__name__)

MASS_REJECTION = 0.5  # share of a batch's events; a larger share of rejected events is worth a line in the log
# the controls append an item to one, and exclude one, for a minute
APPEND = Script(__package__, "append", replicated=True, control=(1, 60, 0, 0, 0, 0, 1, 0, 0, 0, "item"))
EXCLUDING = (1, 60, 0, 0, 60_000, 0, 1, 0, 0, 0, "item", 3)
APPEND_EXCLUDING = Script(__package__, "append", replicated=True, control=EXCLUDING)
# append.lua has the same pattern and the same limit
VALUE = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) (\d+) ([\d:,]*)\0(.*)", re.DOTALL)
MAX_DIGITS = 16
MAX_EXCLUDED = 1_000  # newest of a user; append.lua has the same limit
MAX_EVENTS_PER_CALL = 10_000  # Redis does nothing else meanwhile; no record has more

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
        exclude_ttl_s: how long an excluded item is out of the user's lists; 0 if no role excludes.
    """

    def __init__(
        self,
        redis: RedisClient,
        settings: SequenceSettings,
        topic_epoch: int,
        max_len: int,
        metrics: Metrics,
        exclude_ttl_s: int = 0,
    ) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._settings = settings
        self._topic_epoch = topic_epoch
        self._metrics = metrics
        self._exclude_ttl_s = exclude_ttl_s
        self.max_len = max_len
        self._rejecting = False

    async def append(self, batch: EventBatch, on_refused: OnRefused = raise_refused) -> list[UserSequence]:
        """Append the events of a batch; return the sequence of every user in it.

        Users whose events were all replays or exclusions are returned too: they are scored and published again, since
        the daemon may have crashed between append and publish.

        Args:
            on_refused: called with each user whose events can never be appended, and the reason [raise it].

        Raises:
            RedisUnavailable: try again; applied events are not applied twice.
        """
        found: dict[str, UserSequence] = {}
        clicks = sum([await self._append(by_user, found, on_refused) for by_user in _by_user(batch.events)])
        self._count_rejections(clicks, sum(sequence.applied for sequence in found.values()))
        if self._exclude_ttl_s:
            self._metrics.events.labels("excluded").inc(sum(not event.role.click for event in batch.events))
        return list(found.values())

    async def _append(
        self, by_user: Mapping[str, list[ClickEvent]], found: dict[str, UserSequence], on_refused: OnRefused
    ) -> int:
        """Append events in one call of Redis; note the sequences of users who are not refused; count their clicks."""
        settings, excludes = self._settings, self._exclude_ttl_s > 0
        shared = [self.max_len, settings.ttl_s, int(settings.session_gap_s * 1000), self._topic_epoch]
        shared += [self._exclude_ttl_s * 1000, int(time.time() * 1000)]
        calls: list[Call] = []
        for user_id, events in by_user.items():
            keys = [self._keys.sequence(user_id)]
            calls.append((keys + [self._keys.exclusions(user_id)] * excludes, _arguments(events, excludes)))
        replies = await self._redis.run_each(APPEND_EXCLUDING if excludes else APPEND, shared, calls)
        clicks = 0
        for (user_id, events), reply in zip(by_user.items(), replies, strict=True):
            try:
                sequence = _appended(user_id, reply, events)
            except StreamrecError as error:
                found.pop(user_id, None)
                on_refused(user_id, error)
                continue
            found[user_id] = _merged(found[user_id], sequence) if user_id in found else sequence
            clicks += sum(event.role.click for event in events) if excludes else len(events)
        return clicks

    async def read(self, users: list[str], on_refused: OnRefused = raise_refused) -> list[UserSequence]:
        """Return the stored sequences of users; users without one are left out.

        Args:
            on_refused: called with each user whose value cannot be read, and the reason [raise it].

        Raises:
            RedisUnavailable: Redis does not answer.
        """
        if self._exclude_ttl_s:
            found: dict[str, UserSequence] = {}
            await self._append({user: [] for user in users}, found, on_refused)  # reads sequences and exclusions
            return [sequence for sequence in found.values() if sequence.n or sequence.excluded.items]
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


def _arguments(events: list[ClickEvent], excludes: bool) -> list[RedisArg]:
    """Return what append.lua takes for the events of a user."""
    args: list[RedisArg] = [len(events)]
    for event in events:
        args += ("" if event.place else event.partition, event.offset, event.timestamp_ms, event.item_id)
        if excludes:
            args.append(event.role.click + 2 * event.role.exclude)
    return args


def _appended(user_id: str, reply: list[Any] | RedisRejected, events: list[ClickEvent]) -> UserSequence:
    """Read the reply of append.lua for one user; an empty sequence if only exclusions came.

    Raises:
        StreamrecError: the user's events were refused.
    """
    if isinstance(reply, RedisRejected):
        raise reply
    applied, damaged, value, *exclusions = reply
    if applied < 0:
        raise RedisRejected(f"user {user_id!r}: {value.decode(errors='replace')}")
    if damaged:
        log.warning("a damaged sequence was discarded and begun anew", extra={"user_id": user_id})
    times = tuple([event.record_ts_ms for event in events if not event.place])  # of each record
    excluded = NO_EXCLUSIONS
    for changes, *items in exclusions:
        excluded = Exclusions(tuple(item.decode(errors="replace") for item in items), int(changes))
    if value is None:
        return UserSequence(user_id, NO_ITEMS, 0, 0, 0, 0, times, excluded)
    return parse_sequence(user_id, value, applied, times, excluded)


def _merged(earlier: UserSequence, later: UserSequence) -> UserSequence:
    """Return the sequence of a user after two calls."""
    applied, times = earlier.applied + later.applied, earlier.record_ts_ms + later.record_ts_ms
    return replace(later, applied=applied, record_ts_ms=times)


def parse_sequence(
    user_id: str,
    value: bytes,
    applied: int = 0,
    record_ts_ms: tuple[int, ...] = (),
    excluded: Exclusions = NO_EXCLUSIONS,
) -> UserSequence:
    """Read a stored value.

    Raises:
        StreamrecError: the value is damaged, or a newer streamrec has written it.
    """
    parsed = _parse(user_id, value)
    if parsed is None:
        raise StreamrecError(f"the stored sequence of user {user_id!r} cannot be read: it is damaged")
    n, session_n, count, last_event_ts_ms, _, _, items = parsed
    stored = StoredItems.of_value(items, count)
    return UserSequence(user_id, stored, n, session_n, last_event_ts_ms, applied, record_ts_ms, excluded)


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
