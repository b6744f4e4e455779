"""Decode the bytes of a record to a click event, to nothing, or to a BadRecord with the reason.

Any bytes give one of the three. The event type decides first: an event of a type that is not accepted is ignored,
whatever its other fields are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from sasrec.data.times import LATEST_MS
from streamrec.errors import BadRecord
from streamrec.schemas import ClickEvent
from streamrec.setting_groups import EventSettings

log = logging.getLogger(__name__)

MAX_ID_BYTES = 256
DAY_MS = 86_400_000


class EventDecoder:
    """Decodes JSON events under the configured field names.

    A timestamp may be ``max_future_s`` ahead of the clock, and of the record's own timestamp. If that is further ahead
    of the clock, this machine's clock is behind, or a producer's is ahead: a warning says so, and the click counts.

    Args:
        now_ms: the clock.
    """

    def __init__(self, events: EventSettings, now_ms: Callable[[], float] = lambda: time.time() * 1000) -> None:
        # with a typed struct, msgspec checks types while it parses, and skips unknown fields
        self._raw = msgspec.json.Decoder(
            msgspec.defstruct(
                "Event",
                [
                    ("user_id", str | int),
                    ("item_id", str | int),
                    ("timestamp", int | float | None, None),
                    ("event_type", Any, None),
                ],
                rename={
                    "user_id": events.user_id,
                    "item_id": events.item_id,
                    "timestamp": events.timestamp,
                    "event_type": events.type,
                },
            )
        )
        self._type = msgspec.json.Decoder(
            msgspec.defstruct("Event", [("event_type", Any, None)], rename={"event_type": events.type})
        )
        self._events = events
        self._accepted = frozenset(events.types)
        self._now_ms = now_ms
        self._earliest_ms = events.min_timestamp_ms
        self._max_future_ms = events.max_future_s * 1000
        self._warned_of_clock = False

    def decode(self, value: bytes | None, partition: int, offset: int, record_ts_ms: int) -> ClickEvent | None:
        """Return the event of a record; None if its event type is not accepted.

        Raises:
            BadRecord: the value is no click event; the message is the reason.
        """
        if not value:
            raise BadRecord("the record has no value")
        try:
            raw: Any = self._raw.decode(value)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            if self._accepted and self._is_ignored(value):
                return None
            raise BadRecord(f"not a click event: {error}") from None
        if self._accepted and not self._accepts(raw.event_type):
            return None
        user_id = identifier(self._events.user_id, raw.user_id)
        item_id = identifier(self._events.item_id, raw.item_id)
        if record_ts_ms < 0:  # the record has no timestamp
            record_ts_ms = int(self._now_ms())
        if raw.timestamp is None:
            timestamp_ms = self._timestamp("the record's timestamp", record_ts_ms, record_ts_ms)
        else:
            timestamp_ms = self._timestamp(self._events.timestamp, raw.timestamp, record_ts_ms)
            if record_ts_ms < self._earliest_ms:  # else latencies would count from 1970
                record_ts_ms = int(self._now_ms())
        return ClickEvent(user_id, item_id, timestamp_ms, partition, offset, record_ts_ms)

    def _accepts(self, event_type: object) -> bool:
        """Return whether events of a type are accepted; a type that is no text is none of the accepted ones."""
        return event_type is None or (isinstance(event_type, str) and event_type in self._accepted)

    def _is_ignored(self, value: bytes) -> bool:
        """Return whether a record that is no click event has a type that is not accepted."""
        try:
            raw: Any = self._type.decode(value)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False
        return not self._accepts(raw.event_type)

    def _timestamp(self, name: str, value: int | float, record_ts_ms: int) -> int:
        """Return a timestamp in ms that is in the bounds.

        Raises:
            BadRecord: it is not; the message names field, value and likely unit.
        """
        now_ms = self._now_ms()
        # not converted to float, for which an integer may be too large
        if self._earliest_ms <= value <= now_ms + self._max_future_ms and value <= LATEST_MS:
            return int(value)
        bounds = self._events.bounds(now_ms)
        if bounds.latest_ms < record_ts_ms <= LATEST_MS:
            self._warn_of_clock((record_ts_ms - now_ms) / DAY_MS)
            bounds = self._events.bounds(record_ts_ms)
        problem = bounds.problem(name, value)
        if problem is None:
            return int(value)
        if value > bounds.latest_ms:
            problem = f"{problem}, more than {self._events.max_future_s:g} s in the future"
        raise BadRecord(problem)

    def _warn_of_clock(self, ahead_days: float) -> None:
        if not self._warned_of_clock:
            log.warning(
                "records have timestamps %.0f days ahead of this machine's clock: check the clocks of this machine and "
                "of the producers",
                ahead_days,
            )
        self._warned_of_clock = True


def identifier(name: str, value: str | int) -> str:
    """Return a user or item id as text.

    Raises:
        BadRecord: the value is no id; the message is the reason.
    """
    try:
        text = str(value)
        size = len(text.encode())
    except ValueError as error:  # an integer too long to print; half of a surrogate pair
        raise BadRecord(f"{name} cannot be written as UTF-8 text: {error}") from None
    if not text:
        raise BadRecord(f"{name} is empty")
    if size > MAX_ID_BYTES:
        raise BadRecord(f"{name} has {size} bytes; at most {MAX_ID_BYTES} are allowed")
    if "\0" in text:
        raise BadRecord(f"{name} contains a NUL byte")
    return text
