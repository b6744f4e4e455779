"""Decode the bytes of a record to its clicks, to none, or to a BadRecord with the reason.

Any bytes give one of the three. The event type decides first: an event whose type has no role is ignored, whatever its
other fields are. One bad click makes the whole record bad: a record is applied whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from aiokafka import ConsumerRecord

from streamrec.errors import BadRecord
from streamrec.event_paths import Field, null_test, parse, reader_of
from streamrec.event_roles import Roles
from streamrec.kafka.avro import AvroValues
from streamrec.kafka.schema_registry import SchemaRegistry
from streamrec.kafka.timestamps import Timestamps
from streamrec.schemas import CLICK, ClickEvent, Role
from streamrec.setting_groups import EventSettings

MAX_ID_BYTES = 256
MAX_CLICKS = 10_000  # of a record; the sequence store sends at most so many in a call
IDS, TIMES = str | int, int | float | str
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class RawEvent(NamedTuple):
    """The fields of an event as they were sent."""

    user_id: str | int
    item_id: str | int | list[str | int]
    timestamp: int | float | str | None
    event_type: Any


class EventDecoder:
    """Decodes JSON events at the configured paths.

    Args:
        now_ms: the clock.
    """

    def __init__(self, events: EventSettings, now_ms: Callable[[], float] = lambda: time.time() * 1000) -> None:
        registry = events.schema_registry
        self._avro = AvroValues(SchemaRegistry(registry)) if registry.url else None
        self._read = _raw_reader(events)
        self._user_label, self._item_label = events.user_id, events.item_id
        self._through_list = any(step.many for path in parse(events.item_id) for step in path)
        self._ignore_null = bool(events.ignore_null)
        self._role_of = Roles(events.roles, events.outcomes).of if events.roles or events.outcomes else None
        self._is_ignored = _ignored_test(events, self._role_of)
        self._now_ms = now_ms
        self._earliest_ms = events.min_timestamp_ms
        times = Timestamps(events, now_ms)
        self._time_of_event, self._time_of_record = times.of_event, times.of_record

    async def prepare(self, records: Iterable[ConsumerRecord]) -> bool:
        """Fetch the schemas that Avro records need; return whether all are there, so that they can be decoded.

        Raises:
            SettingsError: the schema registry refuses the login.
        """
        return self._avro is None or await self._avro.learn(records)

    def decode(self, value: bytes | None, partition: int, offset: int, record_ts_ms: int) -> list[ClickEvent]:
        """Return the clicks of a record, none if it is ignored: by its type, or since its list of items is empty.

        Raises:
            BadRecord: the value is no click event; the message is the reason.
        """
        if not value:
            if self._ignore_null:
                return []
            raise BadRecord("the record has no value")
        if self._avro is not None:
            value = self._avro.to_json(value)
        try:
            raw = self._read(value)
        except UNREADABLE as error:
            if self._is_ignored is not None and self._is_ignored(value):
                return []
            raise BadRecord(f"not a click event: {error}") from None
        role = CLICK
        if self._role_of is not None:
            found = self._role_of(raw.event_type)
            if found is None:
                return []
            role = found
        several = self._through_list and isinstance(raw.item_id, list)
        if several and not raw.item_id:
            return []
        user_id = identifier(self._user_label, raw.user_id)
        if record_ts_ms < 0:  # the record has no timestamp
            record_ts_ms = int(self._now_ms())
        if raw.timestamp is None:
            timestamp_ms = self._time_of_record(record_ts_ms)
        else:
            timestamp_ms = self._time_of_event(raw.timestamp, record_ts_ms)
            if record_ts_ms < self._earliest_ms:  # else latencies would count from 1970
                record_ts_ms = int(self._now_ms())
        if several:
            return [
                ClickEvent(user_id, item_id, timestamp_ms, partition, offset, record_ts_ms, place, role)
                for place, item_id in enumerate(identifiers(self._item_label, raw.item_id))
            ]
        item_id = identifier(self._item_label, raw.item_id)
        return [ClickEvent(user_id, item_id, timestamp_ms, partition, offset, record_ts_ms, 0, role)]


def _raw_reader(events: EventSettings) -> Callable[[bytes], Any]:
    """Return a function that reads the fields of an event.

    The types are checked while the JSON is parsed, and other fields are skipped.
    """
    texts = (events.user_id, events.item_id, events.timestamp, events.type)
    names = [path[0].name for text in texts for path in parse(text) if len(path) == 1 and not path[0].many]
    if len(names) == len(texts) and all(len(parse(text)) == 1 for text in texts):  # msgspec alone reads plain names
        fields: list[tuple[str, Any, Any] | tuple[str, Any]]
        fields = [("user_id", IDS), ("item_id", IDS), ("timestamp", TIMES | None, None), ("event_type", Any, None)]
        rename = dict(zip(("user_id", "item_id", "timestamp", "event_type"), names, strict=True))
        return msgspec.json.Decoder(msgspec.defstruct("Event", fields, rename=rename)).decode
    read = reader_of(
        {
            "user_id": Field(events.user_id, IDS, required=True),
            "item_id": Field(events.item_id, IDS, required=True),
            "timestamp": Field(events.timestamp, TIMES),
            "type": Field(events.type, Any),
        }
    )
    return lambda value: RawEvent(*read(value))


def _ignored_test(
    events: EventSettings, role_of: Callable[[object], Role | None] | None
) -> Callable[[bytes], bool] | None:
    """Return a function that tells whether a record that is no click event is ignored; None if none is."""
    tests: list[Callable[[bytes], bool]] = []
    if role_of is not None:
        read_type = reader_of({"type": Field(events.type, Any)})
        tests.append(lambda value: role_of(read_type(value)[0]) is None)
    if events.ignore_null:
        tests.append(null_test(events.ignore_null))

    def is_ignored(value: bytes) -> bool:
        for test in tests:
            try:
                if test(value):
                    return True
            except UNREADABLE:
                continue
        return False

    return is_ignored if tests else None


def identifiers(name: str, values: Sequence[str | int]) -> list[str]:
    """Return the ids of a list as text.

    Raises:
        BadRecord: one is no id, or there are too many; the message is the reason.
    """
    if len(values) > MAX_CLICKS:
        raise BadRecord(f"{name} has {len(values):,} elements; at most {MAX_CLICKS:,} are allowed")
    found: list[str] = []
    try:
        for value in values:
            found.append(identifier(name, value))
    except BadRecord as error:
        raise BadRecord(f"{error} (element {len(found)})") from None
    return found


def identifier(name: str, value: str | int) -> str:
    """Return a user or item id as text.

    Raises:
        BadRecord: the value is no id; the message is the reason.
    """
    if type(value) is str and value.isascii() and 0 < len(value) <= MAX_ID_BYTES and "\0" not in value:
        return value  # nearly all ids
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
