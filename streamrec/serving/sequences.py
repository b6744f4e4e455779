"""EventBatch -> [UserSequence] in one Redis round trip, or one to each node of a cluster.

A user's stored value is one STRING that append.lua writes and ``StoredSequence`` reads:

    1 n session_n count last_event_ts_ms topic_epoch partition:offset,...  NUL  item NUL item NUL ...

The header contains the replay guard: an event at or below the last applied offset of its user *and partition* is
skipped, so a batch that is delivered again after a crash changes nothing.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

from streamrec.errors import StreamrecError
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script
from streamrec.schemas import ClickEvent, EventBatch, StoredItems, UserSequence
from streamrec.setting_groups import SequenceSettings

log = logging.getLogger(__name__)

MASS_REJECTION = 0.5  # share of a batch's events; a larger share of rejected events is worth a line in the log
APPEND = Script(__package__, "append", replicated=True)
# append.lua has the same pattern
VALUE = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) (\d+) ([\d:,]*)\0(.*)", re.DOTALL)


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

    async def append(self, batch: EventBatch) -> list[UserSequence]:
        """Append the events of a batch; return the sequence of every user in it.

        Users whose events were all replays are returned too, to be scored and published again: the daemon may have
        crashed between append and publish.

        Raises:
            RedisUnavailable: try again; applied events are not applied twice.
            StreamrecError: a newer streamrec has written a sequence.
        """
        by_user: dict[str, list[ClickEvent]] = {}
        for event in batch.events:
            by_user.setdefault(event.user_id, []).append(event)
        if not by_user:
            return []
        calls = []
        for user_id, events in by_user.items():
            args: list[RedisArg] = [len(events)]
            for event in events:
                args += (event.partition, event.offset, event.timestamp_ms, event.item_id)
            calls.append(([self._keys.sequence(user_id)], args))
        settings = self._settings
        shared = [self.max_len, settings.ttl_s, int(settings.session_gap_s * 1000), self._topic_epoch]
        replies = await self._redis.run_each(APPEND, shared, calls)
        sequences = []
        for (user_id, events), (applied, damaged, value) in zip(by_user.items(), replies, strict=True):
            if damaged:
                log.warning("a damaged sequence was discarded and begun anew", extra={"user_id": user_id})
            sequences.append(parse_sequence(user_id, value, applied, tuple(e.record_ts_ms for e in events)))
        self._count_rejections(batch, sum(s.applied for s in sequences))
        return sequences

    async def read(self, users: list[str]) -> list[UserSequence]:
        """Return the stored sequences of users; users without one are left out.

        Raises:
            RedisUnavailable: Redis does not answer.
            StreamrecError: a value cannot be read.
        """
        values = await self._redis.get_many([self._keys.sequence(user) for user in users])
        return [parse_sequence(user, value) for user, value in zip(users, values, strict=True) if value is not None]

    def _count_rejections(self, batch: EventBatch, applied: int) -> None:
        """Count applied and rejected events; log when most are rejected, and when that ends."""
        rejected = len(batch.events) - applied
        self._metrics.events.labels("applied").inc(applied)
        self._metrics.events.labels("replayed").inc(rejected)
        self._metrics.guard_rejections.inc(rejected)
        rejecting = rejected > MASS_REJECTION * len(batch.events)
        if rejecting and not self._rejecting:
            log.warning(
                "most events of a batch were applied before: normal for a moment after a crash or a rebalance, or "
                "beside a rebuild; if this continues, the topic was probably deleted and created again: raise "
                "STREAMREC_KAFKA_TOPIC_EPOCH",
                extra={"rejected": rejected, "events": len(batch.events)},
            )
        elif self._rejecting and not rejecting:
            log.info("events are new again")
        self._rejecting = rejecting


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
    version, n_text, session_text, count_text, last_text, epoch_text, offsets, items = found.groups()
    if version != b"1":
        raise StreamrecError(
            f"the stored sequence of user {user_id!r} cannot be read: format {version.decode()} was written by a newer "
            "streamrec, this one reads format 1: upgrade it"
        )
    try:
        n, session_n, count = int(n_text), int(session_text), int(count_text)
        last_event_ts_ms, topic_epoch = int(last_text), int(epoch_text)
    except ValueError:  # more digits than Python converts
        return None
    if not count <= session_n <= n:
        return None
    return n, session_n, count, last_event_ts_ms, topic_epoch, offsets, items
