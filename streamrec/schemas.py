"""What flows along the serving path, in the order in which it does."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from streamrec.errors import StreamrecError


class ClickEvent(msgspec.Struct, frozen=True):
    """A decoded click, and where it stands in the topic."""

    user_id: str
    item_id: str
    timestamp_ms: int  # of the click
    partition: int
    offset: int
    record_ts_ms: int  # when the producer handed it to Kafka: latency is measured from here


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that is no click event, with its origin and the reason."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    reason: str


@dataclass(frozen=True)
class EventBatch:
    """The records of one poll.

    ``next_offsets`` is what to commit, by partition; ``assignment`` numbers the assignment of partitions
    under which the batch was read.
    """

    events: list[ClickEvent] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    next_offsets: dict[int, int] = field(default_factory=dict)
    assignment: int = 0


@dataclass(frozen=True, slots=True)
class UserSequence:
    """A user's stored sequence after a batch was appended.

    ``n`` counts all events ever applied, ``session_n`` those since the last session gap; ``stored`` are the newest
    items of the latter as Redis has them, oldest first, a NUL behind each: on the path of a click most of them are
    never looked at one by one. ``applied`` events of this batch were new, the rest were replays.

    ``clicks`` are the items of those that were new; of a new session, or of more than are kept, those that are there.
    ``before`` is ``stored`` without them.
    """

    user_id: str
    stored: bytes
    n: int
    session_n: int
    last_event_ts_ms: int
    applied: int = 0
    record_ts_ms: tuple[int, ...] = ()

    clicks: list[str] = field(init=False)
    before: bytes = field(init=False)

    def __post_init__(self) -> None:
        *older, _ = self.stored.rsplit(b"\0", self.applied + 1)  # behind the last NUL is nothing
        before, newest = (older[:1], older[1:]) if len(older) > self.applied else ([], older)
        object.__setattr__(self, "clicks", [item.decode(errors="replace") for item in newest])
        object.__setattr__(self, "before", b"".join(before) + b"\0" if before else b"")

    @property
    def items(self) -> list[str]:
        """All item ids, oldest first."""
        # total, as the script that writes them: one damaged value must not stop the daemon
        return self.stored.decode(errors="replace").split("\0")[:-1]


class Recommendation(msgspec.Struct, frozen=True):
    """A list to publish, computed from a user's first ``n`` events."""

    user_id: str
    items: list[str]
    scores: list[float]
    model: str
    event_ts_ms: int
    n: int
    record_ts_ms: tuple[int, ...] = ()


class PublishedList(msgspec.Struct):
    """The JSON value of a recommendation key. ``n`` stays last: the publish script finds it there."""

    items: list[str]
    scores: list[float]
    model: str
    event_ts_ms: int
    published_ts_ms: int
    n: int


def parse_published(user_id: str, value: bytes) -> PublishedList:
    """Read the value of a recommendation key.

    Raises:
        StreamrecError: it is not what this version writes.
    """
    try:
        return msgspec.json.decode(value, type=PublishedList)
    except msgspec.MsgspecError as error:
        raise StreamrecError(f"the published list of user {user_id!r} cannot be read: {error}") from None
