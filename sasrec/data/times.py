"""The units and bounds of Unix times, and the unit that a number outside them probably has.

A time in seconds that is read as milliseconds lies before 1973, and one in microseconds after the year 5138. Every
place where times enter takes its bounds and its messages from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

EARLIEST_MS = 10**11  # 1973-03-03; the same number of seconds is the year 5138
LATEST_MS = 10**14  # 5138-11-16; the same number of microseconds is 1973-03-03
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# the numbers that are times between these bounds, by unit; no number is in two of them
UNITS = {
    "s": (10**8, 10**11, "seconds"),
    "ms": (10**11, 10**14, "milliseconds"),
    "us": (10**14, 10**17, "microseconds"),
    "ns": (10**17, 10**20, "nanoseconds"),
}
MS_OF_UNIT = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}  # numerator, denominator
SHOWN_CHARS = 40


@dataclass(frozen=True)
class TimeBounds:
    """The earliest and the latest time that is taken, both included."""

    earliest_ms: float = EARLIEST_MS
    latest_ms: float = LATEST_MS

    def problem(self, label: str, value: float, unit: str = "ms") -> str | None:
        """Return why a time is refused: one line with name, value and likely unit; None if it is in the bounds.

        Args:
            label: the name of the field.
            value: the time as it was written, in this unit.
        """
        factor, divisor = MS_OF_UNIT[unit]
        # an integer may be too large for a float
        time_ms = value * factor if divisor == 1 else value // divisor
        if self.earliest_ms <= time_ms <= self.latest_ms:
            return None
        side, bound_ms = ("before", self.earliest_ms) if time_ms < self.earliest_ms else ("after", self.latest_ms)
        day = EPOCH + timedelta(milliseconds=bound_ms)
        found = looks_like(value, unit)
        hint = f" looks like {found}" if found else ""
        return f"{label} {_shown(value)}{hint}: as Unix time in {unit} it is {side} {day:%Y-%m-%d}"


LIBRARY_BOUNDS = TimeBounds()


def looks_like(value: float, unit: str = "ms") -> str | None:
    """Return the unit in which a number is a usual time; None if this is the unit in which it was read, or none is."""
    found = [name for key, (low, high, name) in UNITS.items() if low <= value < high]
    return found[0] if found and found[0] != UNITS[unit][2] else None


def option_of(value: float) -> str:
    """Return the unit to give for a number, for messages; "..." if it is a usual time in none."""
    return next((key for key, (low, high, _) in UNITS.items() if low <= value < high), "...")


def _shown(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # an integer with more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
