"""Say by definition, over the whole list of a user's clicks, where sessions begin: slow, and shares no code."""

from __future__ import annotations

from collections.abc import Sequence


def is_begin(times_ms: Sequence[int], at: int, gap_ms: float) -> bool:
    """Return whether the click at this place begins a session though it is not the first."""
    return at > 0 and gap_ms > 0 and all(times_ms[at] - earlier > gap_ms for earlier in times_ms[:at])


def current_session(times_ms: Sequence[int], gap_ms: float) -> int:
    """Return the place at which the last session begins."""
    return max((at for at in range(len(times_ms)) if is_begin(times_ms, at, gap_ms)), default=0)
