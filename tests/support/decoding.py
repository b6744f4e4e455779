"""Decode the bytes of a record, as a daemon does at a fixed moment."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streamrec.errors import BadRecord
from streamrec.kafka.decode import EventDecoder
from streamrec.schemas import ClickEvent
from streamrec.settings import Settings

NOW_MS = 1_700_000_000_000
RECORD_MS = NOW_MS - 250
DAY_MS = 86_400_000

under_any_load = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def decode(value: bytes | str | None, record_ts_ms: int = RECORD_MS, **settings: Any) -> list[ClickEvent]:
    decoder = EventDecoder(Settings.of(**settings).events, lambda: float(NOW_MS))
    return decoder.decode(value.encode() if isinstance(value, str) else value, 3, 17, record_ts_ms)


def decoded(value: bytes | str, record_ts_ms: int = RECORD_MS, **settings: Any) -> ClickEvent:
    (event,) = decode(value, record_ts_ms, **settings)
    return event


def reason(value: bytes | str | None, record_ts_ms: int = RECORD_MS, **settings: Any) -> str:
    with pytest.raises(BadRecord) as caught:
        decode(value, record_ts_ms, **settings)
    return str(caught.value)
