"""Fields of an event at paths: within objects, through lists, with alternatives; and the presets made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.errors import BadRecord
from streamrec.event_presets import PRESETS
from streamrec.kafka.decode import MAX_CLICKS, MAX_ID_BYTES, EventDecoder
from streamrec.schemas import ClickEvent
from streamrec.settings import Settings

from support.decoding import NOW_MS, RECORD_MS, decode, json_values, reason, under_any_load

ORDER = {"user_id": "user", "item_id": "products[].id"}


def clicks(event: object, **paths: str) -> list[tuple[str, str, int]]:
    """Return user, item and place of each click of an event; ``paths`` are settings of [events]."""
    found = decode(json.dumps(event), **{f"events_{name}": text for name, text in paths.items()})
    assert {(click.partition, click.offset, click.record_ts_ms) for click in found} <= {(3, 17, RECORD_MS)}
    return [(click.user_id, click.item_id, click.place) for click in found]


def why(event: object, **paths: str) -> str:
    return reason(json.dumps(event), **{f"events_{name}": text for name, text in paths.items()})


def order(*products: Any) -> dict[str, Any]:
    return {"user": "u", "products": list(products)}


def test_fields_lie_within_objects() -> None:
    paths = {"user_id": "payload.user.id", "item_id": "payload.item", "timestamp": "payload.at.ms", "type": "kind"}
    event = {"payload": {"user": {"id": 5, "name": "Ann"}, "item": "i", "at": {"ms": NOW_MS - 7}, "x": [1]}, "y": 2}
    assert clicks(event, **paths) == [("5", "i", 0)]
    (click,) = decode(json.dumps(event), **{f"events_{name}": text for name, text in paths.items()})
    assert click.timestamp_ms == NOW_MS - 7
    for payload in ({"user": {"id": 5}, "item": "i"}, {"user": {"id": 5}, "item": "i", "at": None}):
        (click,) = decode(json.dumps({"payload": payload}), **{f"events_{n}": text for n, text in paths.items()})
        assert click.timestamp_ms == RECORD_MS


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({}, "missing required field `payload`"),
        ({"payload": {}, "item_id": "i"}, "missing required field `user` - at `$.payload`"),
        ({"payload": {"user": {}}, "item_id": "i"}, "missing required field `id` - at `$.payload.user`"),
        ({"payload": {"user": {"id": None}}, "item_id": "i"}, "got `null` - at `$.payload.user.id`"),
        ({"payload": {"user": {"id": [5]}}, "item_id": "i"}, "got `array` - at `$.payload.user.id`"),
        ({"payload": {"user": "u"}, "item_id": "i"}, "Expected `object`, got `str` - at `$.payload.user`"),
        ({"payload": None, "item_id": "i"}, "Expected `object`, got `null` - at `$.payload`"),
    ],
    ids=str,
)
def test_an_error_names_the_path(event: object, said: str) -> None:
    assert said in why(event, user_id="payload.user.id")


def test_the_first_alternative_that_is_present_and_not_null_counts() -> None:
    paths = {"user_id": "user.id|session|cookie"}
    for user in ({"user": {"id": "u"}, "session": "s"}, {"user": None, "session": "u"}, {"user": {}, "session": "u"}):
        assert clicks({"item_id": "i", "cookie": "c"} | user, **paths) == [("u", "i", 0)]
    assert clicks({"item_id": "i", "user": {"id": None}, "cookie": 5}, **paths) == [("5", "i", 0)]
    assert clicks({"item_id": "i", "session": "", "cookie": "c"}, user_id="cookie|session") == [("c", "i", 0)]
    assert why({"item_id": "i", "session": None}, **paths) == (
        "not a click event: none of `user.id|session|cookie` has a value"
    )
    assert "`$.session`" in why({"item_id": "i", "session": [1], "cookie": "c"}, **paths)
    assert why({"item_id": "i", "session": ""}, **paths) == "user.id|session|cookie is empty"


def test_a_list_gives_one_click_an_element_in_order() -> None:
    event = order({"id": "a", "price": 5}, {"id": 7}, {"id": "a"})
    assert clicks(event, **ORDER) == [("u", "a", 0), ("u", "7", 1), ("u", "a", 2)]
    assert clicks({"user": "u", "ids": ["a", 7]}, user_id="user", item_id="ids[]") == [("u", "a", 0), ("u", "7", 1)]
    nested = {"user": "u", "orders": [{"lines": [{"sku": "a"}]}, {"lines": []}, {"lines": [{"sku": "b"}, {"sku": 3}]}]}
    assert [item for _, item, _ in clicks(nested, user_id="user", item_id="orders[].lines[].sku")] == ["a", "b", "3"]


def test_alternatives_through_a_list_are_chosen_for_each_element() -> None:
    paths = {"user_id": "user", "item_id": "item|products[].id|products[].sku"}
    assert [i for _, i, _ in clicks(order({"id": 1, "sku": "x"}, {"sku": "y"}), **paths)] == ["1", "y"]
    assert clicks(order({"id": 1}) | {"item": "i"}, **paths) == [("u", "i", 0)]
    assert clicks(order() | {"item": "i"}, user_id="user", item_id="products[].id|item") == [("u", "i", 0)]
    assert why(order({"id": 1}, {"price": 2}), **paths) == (
        "not a click event: none of `item|products[].id|products[].sku` has a value in element 1"
    )
    assert "in element 0" in why({"user": "u", "products": [None]}, **paths)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({}, "missing required field `id` - at `$.products[1]`"),
        ({"id": None}, "`$.products[1].id`"),
        ({"id": 1.5}, "`$.products[1].id`"),
        (None, "`$.products[1]`"),
        ("a", "`$.products[1]`"),
        ({"id": ""}, "products[].id is empty (element 1)"),
        ({"id": "x" * 257}, "products[].id has 257 bytes; at most 256 are allowed (element 1)"),
        ({"id": "a\0"}, "products[].id contains a NUL byte (element 1)"),
    ],
    ids=str,
)
def test_one_bad_element_makes_the_record_bad(bad: object, said: str) -> None:
    assert said in why(order({"id": "a"}, bad, {"id": "b"}), **ORDER)


def test_an_empty_list_is_ignored_and_a_missing_one_is_bad() -> None:
    assert clicks(order(), **ORDER) == []
    assert clicks({"user": "u", "orders": [{"lines": []}]}, user_id="user", item_id="orders[].lines[].sku") == []
    assert "`products`" in why({"user": "u"}, **ORDER)
    assert "`$.products`" in why({"user": "u", "products": None}, **ORDER)


def test_a_record_has_at_most_ten_thousand_clicks() -> None:
    assert len(clicks(order(*[{"id": 1}] * MAX_CLICKS), **ORDER)) == MAX_CLICKS
    assert why(order(*[{"id": 1}] * (MAX_CLICKS + 1)), **ORDER) == (
        "products[].id has 10,001 elements; at most 10,000 are allowed"
    )


def test_a_backslash_takes_a_sign_as_part_of_a_name() -> None:
    event = {"site.user": "u", "a|b": {"x[]": "i"}, "site": {"user": 5}, "a": 6}
    assert clicks(event, user_id=r"site\.user", item_id=r"a\|b.x\[\]") == [("u", "i", 0)]


def test_the_type_is_read_before_the_rest() -> None:
    paths = {**ORDER, "type": "meta.kind|kind", "roles": "buy=click"}
    for kind in ({"meta": {"kind": "view"}}, {"meta": {}, "kind": "view"}, {"kind": 5}):
        for rest in ({}, order({}), {"products": "none"}, order({"id": ""})):
            assert clicks(rest | kind, **paths) == []
    assert len(clicks(order({"id": 1}) | {"meta": {"kind": "buy"}, "kind": "view"}, **paths)) == 1
    assert "`$.meta`" in why(order({"id": 1}) | {"meta": "view", "kind": "view"}, **paths)


@under_any_load
@given(
    st.dictionaries(
        st.sampled_from(["user", "products", "item", "at", "kind"]),
        json_values | st.lists(st.dictionaries(st.sampled_from(["id", "sku"]), json_values), max_size=3),
    )
)
def test_arbitrary_json_gives_clicks_or_a_bad_record(value: dict[str, Any]) -> None:
    names = {
        "user_id": "user|item.user",
        "item_id": "products[].id|products[].sku.x|item.id",
        "timestamp": "at.ms|item.at",
        "type": "kind.name|kind.x",
        "roles": "click=click",
        "ignore_null": "item|at.x",
    }
    settings = Settings.of(**{f"events_{name}": text for name, text in names.items()})
    decoder = EventDecoder(settings.events, lambda: float(NOW_MS))
    try:
        found = decoder.decode(json.dumps(value).encode(), 0, 0, RECORD_MS)
    except BadRecord as error:
        assert str(error)
        return
    for place, click in enumerate(found):
        assert isinstance(click, ClickEvent)
        assert click.place == place
        assert 1 <= len(click.item_id.encode()) <= MAX_ID_BYTES


def row(**fields: Any) -> dict[str, Any]:
    return {"before": None, "after": fields, "op": "c", "source": {"ts_ms": NOW_MS - 5, "table": "clicks"}}


@pytest.mark.parametrize("envelope", [False, True])
def test_a_deleted_row_and_its_tombstone_are_ignored(envelope: bool) -> None:
    def sent(change: dict[str, Any]) -> dict[str, Any]:
        return {"schema": {"type": "struct"}, "payload": change} if envelope else change

    assert clicks(sent(row(user_id=1, item_id=2)), preset="debezium") == [("1", "2", 0)]
    assert clicks(sent(row() | {"before": {"user_id": 1}, "after": None, "op": "d"}), preset="debezium") == []
    assert decode(None, events_preset="debezium") == decode(b"", events_preset="debezium") == []
    assert "after.item_id" in why(sent(row(user_id=1)), preset="debezium")
    assert "after.user_id" in why(sent({"before": None, "op": "c"}), preset="debezium")
    assert reason(b"{not json", events_preset="debezium")
    assert "`$" in why(sent(row() | {"after": "a row"}), preset="debezium")


def test_a_setting_overrides_its_entry_of_the_preset() -> None:
    event = {"data": {"user_id": "u", "sku": "s"}, "time": NOW_MS - 1, "type": "view"}
    assert clicks(event, preset="cloudevents", item_id="data.sku") == [("u", "s", 0)]
    in_force = Settings.of(events_preset="cloudevents", events_item_id="data.sku").events
    assert (in_force.item_id, in_force.user_id, in_force.timestamp) == ("data.sku", "data.user_id", "time")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_together(preset: str) -> None:
    events = Settings.of(events_preset=preset).events
    assert events.model_dump().items() >= PRESETS[preset].items()
    assert EventDecoder(events)
