"""EventBatch -> [UserSequence], in one Redis round trip, to each node of a cluster.

The stored value, one STRING a user (append.lua writes it, ``parse_sequence`` reads it):

    1 n session_n kept last_event_ts_ms topic_epoch partition:offset,...  NUL  item NUL item NUL ...

The header carries the replay guard: an event at or below the last applied offset of its user *and
partition* is skipped, so a batch delivered again after a crash changes nothing.
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
from streamrec.schemas import ClickEvent, EventBatch, UserSequence
from streamrec.setting_groups import SequenceSettings

log = logging.getLogger(__name__)

# As many rejections as this share of a batch are worth a line in the log.
MASS_REJECTION = 0.5
APPEND = Script(__package__, "append", replicated=True)
STORED = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) (\d+) ([\d:,]*)\0(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """All that a value holds; ``offsets`` is the replay guard, the last applied offset of each partition."""

    stored: bytes  # the items, as in UserSequence
    n: int
    session_n: int
    last_event_ts_ms: int
    topic_epoch: int
    offsets: dict[int, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """How many items are there."""
        return self.stored.count(b"\0")

    def encode(self) -> bytes:
        """The value, as append.lua would have written it."""
        offsets = ",".join(sorted(f"{partition}:{offset}" for partition, offset in self.offsets.items()))
        header = f"1 {self.n} {self.session_n} {self.kept} {self.last_event_ts_ms} {self.topic_epoch} {offsets}"
        return header.encode() + b"\0" + self.stored

    @classmethod
    def decode(cls, user_id: str, value: bytes) -> StoredSequence | None:
        """Read a value; None where it is damaged, so that append.lua would begin it anew.

        Raises:
            StreamrecError: a newer streamrec has written it.
        """
        found = STORED.fullmatch(value)
        if found is None:
            return None
        if found[1] != b"1":
            raise StreamrecError(
                f"sequence format {found[1].decode()} of user {user_id!r} was written by a newer streamrec; this one "
                "reads format 1: upgrade it"
            )
        n, session_n, kept, last_event_ts_ms, topic_epoch = (int(found[at]) for at in range(2, 7))
        if not kept <= session_n <= n:
            return None
        pairs = re.findall(rb"(\d+):(\d+)", found[7])
        offsets = {int(partition): int(offset) for partition, offset in pairs}
        return cls(_whole(found[8], kept), n, session_n, last_event_ts_ms, topic_epoch, offsets)


class SequenceStore:
    """Users' sequences in Redis.

    Args:
        max_len: items kept of a user.
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
        """Append the events of a batch; returns the sequence of every user in it, replays included.

        Users whose events were all replays are returned too: a crash may have come between the append and
        the publish, so they are scored and published again.

        Raises:
            RedisUnavailable: try again; what was applied is not applied twice.
            StreamrecError: a sequence was written by a newer streamrec.
        """
        by_user: dict[str, list[ClickEvent]] = {}
        for event in batch.events:
            by_user.setdefault(event.user_id, []).append(event)
        if not by_user:
            return []
        settings = self._settings
        shared = [
            self.max_len,
            settings.ttl_s,
            int(settings.session_gap_s * 1000),
            self._topic_epoch,
        ]
        calls = []
        for user_id, events in by_user.items():
            args: list[RedisArg] = [len(events)]
            for event in events:
                args += (event.partition, event.offset, event.timestamp_ms, event.item_id)
            calls.append(([self._keys.sequence(user_id)], args))
        replies = await self._redis.run_each(APPEND, shared, calls)
        sequences = []
        for (user_id, events), (applied, unreadable, value) in zip(by_user.items(), replies, strict=True):
            if unreadable:
                log.warning("a stored sequence could not be read and was begun anew", extra={"user_id": user_id})
            sequences.append(parse_sequence(user_id, value, applied, tuple(e.record_ts_ms for e in events)))
        self._judge_rejections(batch, sum(s.applied for s in sequences))
        return sequences

    async def read(self, users: list[str]) -> list[UserSequence]:
        """The stored sequences of users, as they are; those of whom nothing is stored are left out.

        Raises:
            RedisUnavailable: Redis does not answer.
            StreamrecError: a value cannot be read.
        """
        values = await self._redis.get_many([self._keys.sequence(user) for user in users])
        return [parse_sequence(user, value) for user, value in zip(users, values, strict=True) if value is not None]

    def _judge_rejections(self, batch: EventBatch, applied: int) -> None:
        rejected = len(batch.events) - applied
        self._metrics.events.labels("applied").inc(applied)
        self._metrics.events.labels("replayed").inc(rejected)
        self._metrics.guard_rejections.inc(rejected)
        rejecting = rejected > MASS_REJECTION * len(batch.events)
        if rejecting and not self._rejecting:
            log.warning(
                "most events of a batch had been applied before: normal for a moment after a crash or a rebalance, or "
                "beside a rebuild; if it goes on, the topic was probably deleted and created again: raise "
                "STREAMREC_KAFKA_TOPIC_EPOCH",
                extra={"rejected": rejected, "events": len(batch.events)},
            )
        elif self._rejecting and not rejecting:
            log.info("events are new again")
        self._rejecting = rejecting


def parse_sequence(user_id: str, value: bytes, applied: int = 0, record_ts_ms: tuple[int, ...] = ()) -> UserSequence:
    """Read a stored value.

    Raises:
        StreamrecError: it is not what this version writes.
    """
    try:
        header, _, stored = value.partition(b"\0")
        version, n, session_n, kept, last_event_ts_ms, *_ = header.decode(errors="replace").split(" ")
        if version != "1":
            raise ValueError(f"format {version}")
        return UserSequence(
            user_id, _whole(stored, int(kept)), int(n), int(session_n), int(last_event_ts_ms), applied, record_ts_ms
        )
    except ValueError as error:
        raise StreamrecError(f"the stored sequence of user {user_id!r} cannot be read: {error}") from None


def _whole(stored: bytes, kept: int) -> bytes:
    """The items, of which the header says how many; of damaged ones the newest are what there is."""
    if stored.count(b"\0") == kept and not (stored and stored[-1]):
        return stored
    return b"".join(item + b"\0" for item in stored.split(b"\0")[-1 - kept : -1])
