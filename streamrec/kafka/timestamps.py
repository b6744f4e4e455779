"""The time of an event: RFC 3339 text, or a number in ``events_timestamp_unit``, to Unix ms in the bounds.

A timestamp may be ``max_future_s`` ahead of the clock, and of the record's own timestamp. If that is further ahead of
the clock, this machine's clock is behind, or a producer's is ahead: a warning says so, and the click counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec

from sasrec.data.times import EPOCH, LATEST_MS, MS_OF_UNIT, SHOWN_CHARS
from streamrec.errors import BadRecord
from streamrec.setting_groups import EventSettings

log = logging.getLogger(__name__)

DAY_MS = 86_400_000
MS = timedelta(milliseconds=1)
WHOLE = re.compile(r"-?\d{1,20}", re.ASCII)
LARGEST = 2.0**63  # larger numbers are no times, and too large for some operations


class Timestamps:
    """Reads timestamps.

    Args:
        now_ms: the clock.
    """

    def __init__(self, events: EventSettings, now_ms: Callable[[], float]) -> None:
        self._events = events
        self._now_ms = now_ms
        self._earliest_ms = events.min_timestamp_ms
        self._latest_ms = -1.0  # in the bounds when the clock was read last, and so ever since
        self._in_ms = events.timestamp_unit == "ms"
        self._warned_of_clock = False

    def of_record(self, record_ts_ms: int) -> int:
        """Return the timestamp of a record, if it may be that of its event.

        Raises:
            BadRecord: it is not in the bounds; the message is the reason.
        """
        return self._checked("the record's timestamp", record_ts_ms, record_ts_ms, "ms", record_ts_ms)

    def of_event(self, sent: int | float | str, record_ts_ms: int) -> int:
        """Return the timestamp of an event in ms.

        Raises:
            BadRecord: it is no time, or not in the bounds; the message names field, value and likely unit.
        """
        try:
            # not converted to float, for which an integer may be too large
            if self._in_ms and self._earliest_ms <= sent <= self._latest_ms:  # type: ignore[operator]
                return int(sent)
        except TypeError:  # text
            pass
        name, unit = self._events.timestamp, self._events.timestamp_unit
        if isinstance(sent, str):
            if not WHOLE.fullmatch(sent):
                time_ms = _of_text(name, sent)
                return self._checked(f"{name} {sent} is", time_ms, time_ms, "ms", record_ts_ms)
            sent = int(sent)  # as BigQuery writes large numbers
        return self._checked(name, sent, in_ms(sent, unit), unit, record_ts_ms)

    def _checked(self, name: str, sent: int | float, time_ms: int | float, unit: str, record_ts_ms: int) -> int:
        now_ms = self._now_ms()
        bounds = self._events.bounds(now_ms)
        self._latest_ms = bounds.latest_ms
        if self._earliest_ms <= time_ms <= bounds.latest_ms:
            return int(time_ms)
        if bounds.latest_ms < record_ts_ms <= LATEST_MS:
            self._warn_of_clock((record_ts_ms - now_ms) / DAY_MS)
            bounds = self._events.bounds(record_ts_ms)
        problem = bounds.problem(name, sent, unit)
        if problem is None:
            return int(time_ms)
        if time_ms > bounds.latest_ms:
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


def in_ms(value: int | float, unit: str) -> int | float:
    """Return a time in ms."""
    if unit == "ms":
        return value
    factor, divisor = MS_OF_UNIT[unit]
    time_ms = value * factor if divisor == 1 else value // divisor
    return round(time_ms) if isinstance(time_ms, float) and abs(time_ms) < LARGEST else time_ms


def in_unit(time_ms: int, unit: str) -> int | float:
    """Return a time in a unit, exactly."""
    factor, divisor = MS_OF_UNIT[unit]
    if factor == 1:
        return time_ms * divisor
    return time_ms / factor if time_ms % factor else time_ms // factor


def _of_text(name: str, text: str) -> int:
    """Return the time that a text says, in ms.

    Raises:
        BadRecord: the text says none; the message is the reason.
    """
    shown = repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")
    try:
        # a space in place of the T, as RFC 3339 allows, is new in msgspec 0.19
        moment = msgspec.convert(f"{text[:10]}T{text[11:]}" if text[10:11] == " " else text, datetime)
    except msgspec.ValidationError:
        raise BadRecord(f"{name} {shown} is neither a number nor a time such as 2024-01-31T12:00:00Z") from None
    if moment.tzinfo is None:
        raise BadRecord(f"{name} {shown} has no time zone: write Z for UTC, or an offset such as +01:00")
    return (moment - EPOCH) // MS
