"""The bytes of a record -> a click event, or a readable reason. Any bytes give one of the two."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.errors import BadRecord
from streamrec.kafka.decode import MAX_ID_BYTES, EventDecoder
from streamrec.schemas import ClickEvent
from streamrec.settings import Settings

from support.decoding import DAY_MS, NOW_MS, RECORD_MS, decode, decoded, json_values, reason, under_any_load

EARLIEST_MS = 100_000_000_000

ids = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=64)


def click(**fields: Any) -> str:
    return json.dumps({"user_id": "u", "item_id": "i"} | fields)


def timed(timestamp: str) -> str:
    """Return an event with this text as timestamp, valid JSON or not."""
    return f'{{"user_id": "u", "item_id": "i", "timestamp": {timestamp}}}'


decoder = EventDecoder(Settings.of(events_roles={"click": "click"}).events, lambda: float(NOW_MS))


def decode_anything(value: bytes) -> None:
    try:
        events = decoder.decode(value, 0, 0, RECORD_MS)
    except BadRecord as error:
        assert str(error)
        str(error).encode()  # it becomes a header
        return
    for event in events:
        for text in (event.user_id, event.item_id):
            assert 1 <= len(text.encode()) <= MAX_ID_BYTES
            assert "\0" not in text
        assert EARLIEST_MS <= event.timestamp_ms <= NOW_MS + DAY_MS


@under_any_load
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_an_event_or_a_bad_record(value: bytes) -> None:
    decode_anything(value)


@under_any_load
@given(st.dictionaries(st.sampled_from(["user_id", "item_id", "timestamp", "event_type", "x"]), json_values))
def test_arbitrary_json_is_an_event_or_a_bad_record(value: dict[str, Any]) -> None:
    decode_anything(json.dumps(value).encode())
    decode_anything(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))


@under_any_load
@given(st.binary(max_size=8), st.integers(0, 60), st.integers(0, 60))
def test_a_damaged_event_is_an_event_or_a_bad_record(junk: bytes, start: int, end: int) -> None:
    whole = b'{"user_id":"u","item_id":"i","timestamp":1700000000000,"x":[1]}'
    decode_anything(whole[:start] + junk + whole[end:])


@under_any_load
@given(ids, ids, st.none() | st.integers(EARLIEST_MS, NOW_MS), st.dictionaries(st.text(), json_values, max_size=3))
def test_a_valid_event_has_its_partition_and_offset(
    user: str, item: str, timestamp_ms: int | None, unknown: dict[str, Any]
) -> None:
    unknown = {name: value for name, value in unknown.items() if name != "event_type"}
    value = json.dumps(unknown | {"user_id": user, "item_id": item, "timestamp": timestamp_ms})
    expected_ms = RECORD_MS if timestamp_ms is None else timestamp_ms
    assert decoded(value) == ClickEvent(user, item, expected_ms, partition=3, offset=17, record_ts_ms=RECORD_MS)


@under_any_load
@given(st.integers(-(10**20), 10**20))
def test_an_integer_id_equals_its_digits_as_text(number: int) -> None:
    assert decoded(click(user_id=number, item_id=number)) == decoded(click(user_id=str(number), item_id=str(number)))


@pytest.mark.parametrize("field", ["user_id", "item_id"])
@pytest.mark.parametrize("value", [True, False, 1.0, 1.5, None, [1], {"id": 1}], ids=repr)
def test_an_id_that_is_neither_text_nor_integer_is_refused_by_name(field: str, value: object) -> None:
    assert f"$.{field}" in reason(click(**{field: value}))


@pytest.mark.parametrize("field", ["user_id", "item_id"])
def test_a_missing_id_is_refused_by_name(field: str) -> None:
    event = json.loads(click())
    del event[field]
    assert reason(json.dumps(event)) == f"not a click event: Object missing required field `{field}`"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "{field} is empty"),
        ("x" * 257, "{field} has 257 bytes; at most 256 are allowed"),
        ("x" + "é" * 128, "{field} has 257 bytes; at most 256 are allowed"),
        ("😀" * 65, "{field} has 260 bytes; at most 256 are allowed"),
        (10**300, "{field} has 301 bytes; at most 256 are allowed"),
        ("a\0b", "{field} contains a NUL byte"),
        ("\0", "{field} contains a NUL byte"),
    ],
    ids=["empty", "257 bytes", "257 bytes of 129 characters", "emoji", "long integer", "NUL", "only NUL"],
)
@pytest.mark.parametrize("field", ["user_id", "item_id"])
def test_an_unusable_id_is_refused_with_the_reason(field: str, value: object, why: str) -> None:
    assert reason(click(**{field: value})) == why.format(field=field)


@pytest.mark.parametrize("value", ["x" * 256, "é" * 128, "😀" * 64, " ", "\n", "{a}:b %s", "\x7f"], ids=repr)
def test_any_other_text_of_up_to_256_bytes_is_an_id(value: str) -> None:
    event = decoded(click(user_id=value, item_id=value))
    assert (event.user_id, event.item_id) == (value, value)


@pytest.mark.parametrize("escape", [r"\ud800", r"\udc00", r"x\ud83dx", r"\udc00\ud800"])
def test_half_of_a_surrogate_pair_is_refused(escape: str) -> None:
    assert "surrogate" in reason(f'{{"user_id": "{escape}", "item_id": "i"}}')


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert decoded(r'{"user_id": "\ud83d\ude00", "item_id": "i"}').user_id == "😀"


@pytest.mark.parametrize("value", [click(), click(timestamp=None)], ids=["missing", "null"])
def test_an_event_without_a_timestamp_has_that_of_its_record(value: str) -> None:
    assert decoded(value).timestamp_ms == RECORD_MS


def test_without_any_timestamp_the_time_is_now() -> None:
    event = decoded(click(), record_ts_ms=-1)  # Kafka's NO_TIMESTAMP
    assert (event.timestamp_ms, event.record_ts_ms) == (NOW_MS, NOW_MS)


def test_a_record_timestamp_that_is_none_counts_as_now() -> None:
    for record_ms in (0, NOW_MS // 1000):
        assert decoded(click(timestamp=NOW_MS - 5), record_ms).record_ts_ms == NOW_MS
    assert decoded(click(timestamp=NOW_MS - 5), RECORD_MS).record_ts_ms == RECORD_MS


def test_a_record_timestamp_in_the_future_is_refused_if_it_is_used() -> None:
    microseconds = NOW_MS * 1000
    assert "the record's timestamp 1700000000000000 looks like microseconds" in reason(click(), microseconds)
    assert decoded(click(timestamp=NOW_MS), microseconds).timestamp_ms == NOW_MS


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [("1e11", EARLIEST_MS), ("1.7e12", NOW_MS), ("1700000000000.9", NOW_MS), (str(NOW_MS + DAY_MS), NOW_MS + DAY_MS)],
)
def test_a_timestamp_is_a_number_of_milliseconds(text: str, expected_ms: int) -> None:
    assert decoded(timed(text)).timestamp_ms == expected_ms


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "nan", "0x10", "1_000", "+1", "01", "1e400"])
def test_text_that_json_does_not_call_a_number_is_no_timestamp(text: str) -> None:
    assert reason(timed(text)).startswith("not a click event: ")


@pytest.mark.parametrize("text", ["true", "[]", "{}"])
def test_a_timestamp_of_another_type_is_refused_by_name(text: str) -> None:
    assert "$.timestamp" in reason(timed(text))


@pytest.mark.parametrize("text", ["0", "-0.0", "5", "-1", "-0.5", "-1e300", str(-(10**400)), "99999999"])
def test_a_timestamp_before_1973_is_refused(text: str) -> None:
    assert reason(timed(text)).endswith(": as Unix time in ms it is before 1973-03-03")


@pytest.mark.parametrize(
    ("text", "unit", "side"),
    [
        ("789652009", "seconds", "before 1973-03-03"),
        ("1700000000", "seconds", "before 1973-03-03"),
        ("1700000000.5", "seconds", "before 1973-03-03"),
        ("99999999999", "seconds", "before 1973-03-03"),
        (str(NOW_MS * 10**3), "microseconds", "after 2023-11-15"),
        ("1.7e15", "microseconds", "after 2023-11-15"),
        (str(NOW_MS * 10**6), "nanoseconds", "after 2023-11-15"),
    ],
)
def test_a_timestamp_in_another_unit_is_refused_by_field_value_and_unit(text: str, unit: str, side: str) -> None:
    shown = str(float(text)) if "e" in text else text
    assert reason(timed(text)).startswith(f"timestamp {shown} looks like {unit}: as Unix time in ms it is {side}")
    named = reason(f'{{"user_id": "u", "item_id": "i", "at": {text}}}', events_timestamp="at")
    assert named.startswith(f"at {shown} looks like {unit}: ")
    if "." not in text and "e" not in text:
        assert f"the record's timestamp {shown} looks like {unit}" in reason(click(), int(text))


def test_the_earliest_timestamp_is_a_setting() -> None:
    assert decoded(timed("0"), events_min_timestamp_ms=0).timestamp_ms == 0
    assert reason(timed("-1"), events_min_timestamp_ms=0).endswith("it is before 1970-01-01")
    assert reason(timed("1600000000000"), events_min_timestamp_ms=NOW_MS).endswith("it is before 2023-11-14")


def test_a_clock_that_is_behind_refuses_no_click_and_is_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    late = EventDecoder(Settings.of().events, lambda: float(NOW_MS - 3 * DAY_MS))
    for offset, value in enumerate([click(), timed(str(NOW_MS)), timed(str(NOW_MS + DAY_MS))] * 2):
        (event,) = late.decode(value.encode(), 0, offset, NOW_MS)
        assert event.timestamp_ms >= NOW_MS
    assert [record.getMessage() for record in caplog.records] == [
        "records have timestamps 3 days ahead of this machine's clock: check the clocks of this machine and of the "
        "producers"
    ]
    late.decode(click().encode(), 0, 8, NOW_MS + 9 * DAY_MS)
    assert len(caplog.records) == 1
    for text in (str(NOW_MS + DAY_MS + 1), str(NOW_MS * 1000), "1700000000"):
        with pytest.raises(BadRecord, match=f"timestamp {text}"):
            late.decode(timed(text).encode(), 0, 9, NOW_MS)


def test_a_far_timestamp_of_a_record_that_came_today_says_nothing_about_the_clock(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "in the future" in reason(timed(str(NOW_MS + 2 * DAY_MS)))
    assert not caplog.records


@pytest.mark.parametrize("text", [str(NOW_MS + DAY_MS + 1), str(NOW_MS * 1000), "1e300", str(10**400), "9" * 310])
def test_a_timestamp_far_in_the_future_is_refused(text: str) -> None:
    assert reason(timed(text)).endswith(" it is after 2023-11-15, more than 86400 s in the future")


def test_an_integer_with_more_digits_than_python_prints_is_refused() -> None:
    assert "$.timestamp" in reason(timed("1" + "0" * 5000))
    assert "user_id" in reason('{"user_id": 1' + "0" * 5000 + ', "item_id": "i"}')


def test_the_limit_for_timestamps_in_the_future_is_a_setting() -> None:
    ahead = timed(str(NOW_MS + 60_000))
    assert decoded(ahead, events_max_future_s=60).timestamp_ms == NOW_MS + 60_000
    assert "more than 59.5 s" in reason(ahead, events_max_future_s=59.5)


@pytest.mark.parametrize("value", [None, b""])
def test_a_record_without_a_value_is_refused(value: bytes | None) -> None:
    assert reason(value) == "the record has no value"


@pytest.mark.parametrize("value", ["null", "5", '"text"', "[]", "true", "[{}]", '[{"user_id": "u", "item_id": "i"}]'])
def test_json_that_is_no_object_is_refused(value: str) -> None:
    assert reason(value).startswith("not a click event: Expected `object`")


@pytest.mark.parametrize(
    "value",
    [
        b" ",
        b"{",
        b"\x00",
        b"user_id=u",
        click().encode()[:-1],
        click().encode() + b" x",
        click().encode() * 2,
        b"\xef\xbb\xbf" + click().encode(),
        b'{"user_id": "\xff", "item_id": "i"}',
        b'{"user_id": "\xed\xa0\x80", "item_id": "i"}',
        click().encode("utf-16"),
        b'{"user_id": "a\x00b", "item_id": "i"}',
        b"{'user_id': 'u', 'item_id': 'i'}",
        b'{"user_id": "u", "item_id": "i",}',
    ],
    ids=[
        "blank",
        "open",
        "NUL",
        "form",
        "cut",
        "trailing",
        "two",
        "BOM",
        "bad UTF-8",
        "surrogate in UTF-8",
        "UTF-16",
        "raw NUL",
        "quotes",
        "comma",
    ],
)
def test_bytes_that_are_no_json_are_refused(value: bytes) -> None:
    assert reason(value).startswith("not a click event: ")


def test_spaces_around_the_object_do_not_matter() -> None:
    assert decoded(f" \r\n\t{click()}\n").user_id == "u"


@pytest.mark.parametrize("opening", ["[", '{"x":'])
def test_nesting_100_000_deep_is_refused(opening: str) -> None:
    assert reason(opening * 100_000).startswith("not a click event: ")
    assert "recursion" in reason('{"user_id": "u", "item_id": "i", "x": ' + opening * 100_000)


@pytest.mark.parametrize("junk", [b"\x00", b"a", b"[", b" ", b"\xff", b'"', b"9"])
def test_ten_megabytes_of_junk_are_refused(junk: bytes) -> None:
    assert len(reason(junk * 10_000_000)) < 500


def test_ten_megabytes_in_an_unknown_field_are_ignored() -> None:
    assert decoded(click(comment="x" * 10_000_000)).user_id == "u"


def test_ten_megabytes_in_an_id_are_refused() -> None:
    assert reason(click(user_id="x" * 10_000_000)) == "user_id has 10000000 bytes; at most 256 are allowed"


def test_the_last_of_two_fields_of_one_name_counts() -> None:
    assert decoded('{"user_id": "a", "item_id": "i", "user_id": "b"}').user_id == "b"


def test_field_names_are_settings() -> None:
    names = {"events_user_id": "visitor", "events_item_id": "sku", "events_timestamp": "at", "events_type": "kind"}
    value = {"visitor": 5, "sku": "s", "at": NOW_MS, "kind": "view", "user_id": None, "item_id": [], "timestamp": "no"}
    event = decoded(json.dumps(value), events_roles="view=click", **names)
    assert (event.user_id, event.item_id, event.timestamp_ms) == ("5", "s", NOW_MS)
    assert not decode(json.dumps(value | {"kind": "buy"}), events_roles="view=click", **names)
    assert "`visitor`" in reason(click(), **names)
    assert reason(json.dumps(value | {"sku": ""}), **names) == "sku is empty"
    assert reason(json.dumps(value | {"at": -1}), **names).startswith("at -1: ")


def test_field_names_may_be_swapped_and_odd() -> None:
    event = decoded(
        json.dumps({"item_id": "a", "user_id": "b", "it's {é} $.at|[]": NOW_MS}),
        events_user_id="item_id",
        events_item_id="user_id",
        events_timestamp=r"it's {é} $\.at\|\[\]",
    )
    assert (event.user_id, event.item_id, event.timestamp_ms) == ("a", "b", NOW_MS)


@pytest.mark.parametrize("event_type", ["click", "view"])
def test_an_event_of_a_type_that_is_a_click_passes(event_type: str) -> None:
    assert decode(click(event_type=event_type), events_roles="click=click, view=click")


@pytest.mark.parametrize("event_type", ["buy", "", "Click", "click "])
def test_another_event_type_is_ignored(event_type: str) -> None:
    assert not decode(click(event_type=event_type), events_roles="click=click,view=click")


@pytest.mark.parametrize("fields", [{}, {"event_type": None}], ids=["missing", "null"])
def test_an_event_without_a_type_is_always_a_click(fields: dict[str, Any]) -> None:
    assert decode(click(**fields), events_roles="click=click")


@pytest.mark.parametrize("value", [5, 1.5, True, [], ["click"], {}, {"name": "click"}], ids=repr)
def test_an_event_type_that_is_no_text_is_none_of_those_named(value: object) -> None:
    assert not decode(click(event_type=value), events_roles="click=click")


@pytest.mark.parametrize("value", ["anything", "impression", 5, [], {"a": 1}], ids=repr)
def test_a_star_names_the_types_that_have_no_role(value: object) -> None:
    roles = {"events_roles": "*=click,impression=ignore"}
    assert bool(decode(click(event_type=value), **roles)) == (value != "impression")
    assert not decode(click(event_type=value), events_roles="*=ignore,other=click")
    assert decode(json.dumps({"event_type": "impression", "user_id": None}), **roles) == []


@pytest.mark.parametrize("value", ["anything", 5, 1.5, True, None, [], {"a": 1}])
def test_every_event_is_a_click_without_roles(value: object) -> None:
    assert decode(click(event_type=value))


@pytest.mark.parametrize(
    ("settings", "outcomes"),
    [
        ({"events_outcomes": "view=0.2"}, {"view": 0.2, "buy": 1.0, None: 1.0, 5: 1.0}),
        ({"events_outcomes": "view=0.2,*=0.5"}, {"view": 0.2, "buy": 0.5, None: 1.0, 5: 0.5}),
        ({"events_outcomes": "view=0.2", "events_roles": "view=click,buy=click+exclude"}, {"view": 0.2, "buy": 1.0}),
        ({"events_outcomes": "buy=0.5", "events_roles": "view=click,*=click"}, {"view": 1.0, "buy": 0.5, "x": 1.0}),
    ],
)
def test_a_click_has_the_outcome_of_its_type(settings: dict[str, str], outcomes: dict[object, float]) -> None:
    found = {kind: decoded(click(event_type=kind), **settings).role.outcome for kind in outcomes}
    assert found == outcomes


OTHER_FIELDS: dict[str, dict[str, object]] = {
    "no ids": {},
    "no item": {"user_id": "u"},
    "no user": {"item_id": "i"},
    "a list of items": {"user_id": "u", "item_id": ["i", "j"]},
    "a null user": {"user_id": None, "item_id": "i"},
    "an empty user": {"user_id": "", "item_id": "i"},
    "nested ids": {"user_id": {"id": "u"}, "item_id": {"id": "i"}},
    "a float for an id": {"user_id": 1.5, "item_id": "i"},
    "an over-long id": {"user_id": "u" * 300, "item_id": "i"},
    "a time that is noon": {"user_id": "u", "item_id": "i", "timestamp": "noon"},
    "a time in seconds": {"user_id": "u", "item_id": "i", "timestamp": 1_700_000_000},
    "a negative time": {"user_id": "u", "item_id": "i", "timestamp": -1},
    "a time that is a list": {"user_id": "u", "item_id": "i", "timestamp": [1]},
}


@pytest.mark.parametrize("fields", OTHER_FIELDS.values(), ids=OTHER_FIELDS)
@pytest.mark.parametrize("first", [True, False], ids=["type first", "type last"])
@pytest.mark.parametrize("event_type", ["buy", "", 5, ["click"], {"name": "click"}], ids=repr)
def test_an_event_of_another_type_is_ignored_whatever_its_fields_are(
    fields: dict[str, object], first: bool, event_type: object
) -> None:
    kind: dict[str, object] = {"event_type": event_type}
    assert not decode(json.dumps(kind | fields if first else fields | kind), events_roles="click=click")
    for accepted in ({"event_type": "click"}, {"event_type": None}, {}):
        assert reason(json.dumps(fields | accepted), events_roles="click=click")
    assert reason(json.dumps(fields | kind)), "without roles every event is checked"


def test_bytes_that_are_no_json_are_refused_whatever_type_they_begin_with() -> None:
    assert reason('{"event_type": "buy", "user_id": ', events_roles="click=click").startswith("not a click event: ")
