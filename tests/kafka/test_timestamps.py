"""The time of an event: a number in a unit, or RFC 3339 text; anything else is refused with the reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.kafka.timestamps import in_ms, in_unit

from support.decoding import NOW_MS, decoded, reason, under_any_load

UNITS = {"s": 1 / 1000, "ms": 1, "us": 1000, "ns": 1_000_000}
SINCE_MS = NOW_MS - 10**9


def timed(timestamp: object) -> str:
    return json.dumps({"user_id": "u", "item_id": "i", "timestamp": timestamp})


def time_of(timestamp: object, unit: str = "ms") -> int:
    return decoded(timed(timestamp), events_timestamp_unit=unit).timestamp_ms


def why(timestamp: object, unit: str = "ms") -> str:
    return reason(timed(timestamp), events_timestamp_unit=unit)


@pytest.mark.parametrize(
    ("number", "unit", "expected_ms"),
    [
        (1_700_000_000, "s", NOW_MS),
        (1_699_999_999.123, "s", NOW_MS - 877),
        (1_699_999_999.9999, "s", NOW_MS),
        (1_699_999_999_999, "ms", NOW_MS - 1),
        (1_699_999_999_999_999, "us", NOW_MS - 1),
        (1_699_999_999_999_999_999, "ns", NOW_MS - 1),
        (1.6e15, "us", 1_600_000_000_000),
        ("1699999999999999", "us", NOW_MS - 1),
        ("1700000000", "s", NOW_MS),
        (str(NOW_MS), "ms", NOW_MS),
    ],
)
def test_a_number_is_in_the_unit_of_the_setting(number: object, unit: str, expected_ms: int) -> None:
    assert time_of(number, unit) == expected_ms


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [
        ("2023-11-14T22:13:20Z", NOW_MS),
        ("2023-11-14T22:13:19.877Z", NOW_MS - 123),
        ("2023-11-14T22:13:19.877333999Z", NOW_MS - 123),
        ("2023-11-14T23:13:20+01:00", NOW_MS),
        ("2023-11-14T16:43:20.000-05:30", NOW_MS),
        ("2023-11-14t22:13:20z", NOW_MS),
        ("2023-11-14 22:13:20Z", NOW_MS),
    ],
)
@pytest.mark.parametrize("unit", UNITS)
def test_a_text_is_the_same_time_in_any_unit(text: str, unit: str, expected_ms: int) -> None:
    assert time_of(text, unit) == expected_ms


@pytest.mark.parametrize(
    "text",
    ["", "noon", "2023-11-14", "22:13", "1e12", "1.7", "0x10", " 1700000000000", "2023-13-01T00:00:00Z", "٣" * 13],
)
def test_a_text_that_is_no_time_is_refused(text: str) -> None:
    assert why(text) == f"timestamp {text!r} is neither a number nor a time such as 2024-01-31T12:00:00Z"


def test_a_long_text_is_shown_in_part() -> None:
    assert len(why("9" * 10_000)) < 200
    assert len(why("x" * 10_000)) < 200


def test_a_text_without_a_time_zone_is_refused() -> None:
    assert why("2023-11-14T22:13:20") == (
        "timestamp '2023-11-14T22:13:20' has no time zone: write Z for UTC, or an offset such as +01:00"
    )


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("sent", UNITS)
def test_a_number_in_another_unit_is_refused_with_its_likely_unit(unit: str, sent: str) -> None:
    names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
    number = int(NOW_MS * UNITS[sent])
    for value in (number, str(number)):
        if unit == sent:
            assert time_of(value, unit) == NOW_MS
        else:
            assert why(value, unit).startswith(
                f"timestamp {number} looks like {names[sent]}: as Unix time in {unit} it is"
            )


@pytest.mark.parametrize("text", ["1970-01-01T00:00:00Z", "1969-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00"])
def test_a_text_before_the_bounds_is_refused(text: str) -> None:
    assert why(text).startswith(f"timestamp {text} is ")
    assert why(text).endswith(": as Unix time in ms it is before 1973-03-03")


@pytest.mark.parametrize("text", ["2023-11-16T00:00:00Z", "9999-12-31T23:59:59-23:59"])
def test_a_text_in_the_future_is_refused(text: str) -> None:
    assert why(text).endswith("it is after 2023-11-15, more than 86400 s in the future")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("number", [0, -1, -0.0, 1e300, -1e300, 10**400, -(10**400), "9" * 20, "-" + "9" * 20])
def test_numbers_of_no_unit_are_refused_in_any_unit(number: object, unit: str) -> None:
    assert f": as Unix time in {unit} it is " in why(number, unit)


@under_any_load
@given(st.integers(SINCE_MS, NOW_MS), st.sampled_from(sorted(UNITS)))
def test_a_time_that_is_written_in_a_unit_is_read_unchanged(time_ms: int, unit: str) -> None:
    assert in_ms(in_unit(time_ms, unit), unit) == time_ms
    assert time_of(in_unit(time_ms, unit), unit) == time_ms
