"""Decode the bytes of a record to a click event, or to a BadRecord with the reason. Any bytes give one of the two."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from streamrec.errors import BadRecord
from streamrec.schemas import ClickEvent
from streamrec.setting_groups import EventSettings

MAX_ID_BYTES = 256


class EventDecoder:
    """Decodes JSON events under the configured field names.

    Args:
        now_ms: the clock; timestamps too far ahead of it are refused.
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
                    # if all events are accepted, this field may have any type, like an unknown field
                    ("event_type", str | None if events.types else Any, None),
                ],
                rename={
                    "user_id": events.user_id,
                    "item_id": events.item_id,
                    "timestamp": events.timestamp,
                    "event_type": events.type,
                },
            )
        )
        self._events = events
        self._accepted = frozenset(events.types)
        self._now_ms = now_ms

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
            raise BadRecord(f"not a click event: {error}") from None
        if self._accepted and raw.event_type is not None and raw.event_type not in self._accepted:
            return None
        user_id = identifier(self._events.user_id, raw.user_id)
        item_id = identifier(self._events.item_id, raw.item_id)
        if record_ts_ms < 0:  # the record has no timestamp
            record_ts_ms = int(self._now_ms())
        if raw.timestamp is None:
            timestamp_ms = self._timestamp("the record's timestamp", record_ts_ms)
        else:
            timestamp_ms = self._timestamp(self._events.timestamp, raw.timestamp)
        return ClickEvent(user_id, item_id, timestamp_ms, partition, offset, record_ts_ms)

    def _timestamp(self, name: str, value: int | float) -> int:
        if value < 0:
            raise BadRecord(f"{name}={value}: must be Unix time in ms, at least 0")
        # not converted to float, for which an integer may be too large
        if value > self._now_ms() + self._events.max_future_s * 1000:
            raise BadRecord(f"{name}={value}: more than {self._events.max_future_s:g} s in the future")
        return int(value)


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
