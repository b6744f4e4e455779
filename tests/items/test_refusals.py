"""Which items are refused: the table against its rules written out, masks against brute force, and time that passes."""

from __future__ import annotations

import asyncio
import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec import ItemVocab
from streamrec.errors import BadRecord
from streamrec.items.refusals import MOST_GONE, Refusals
from streamrec.items.table import ItemTable

START_MS = 1_700_000_000_000
IDS = [f"i{n}" for n in range(8)]
VOCAB = ItemVocab(IDS)


def value(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def refusals_with(items: dict[str, bytes], allow_unknown: bool = False) -> Refusals:
    found = Refusals(ItemTable(), allow_unknown, lambda: START_MS)
    for item, fields in items.items():
        found.put(item, fields)
    return found


def rfc3339(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat()


# --- the table


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (b"", "not an item"),
        (b"[]", "not an item"),
        (b'{"available": "yes"}', "not an item"),
        (b'{"categories": [1]}', "not an item"),
        (value(available_from=START_MS // 1000), "looks like seconds"),
        (value(available_until="tomorrow"), "RFC 3339"),
        (value(available_until="2026-11-30T09:00:00"), "no time zone"),
    ],
)
def test_a_bad_item_names_the_reason_and_leaves_the_former_one(fields: bytes, reason: str) -> None:
    table = ItemTable()
    table.put("a", value(title="A"))
    with pytest.raises(BadRecord, match=reason):
        table.put("a", fields)
    item = table.item("a")
    assert item is not None and item.title == "A"


def test_other_fields_are_kept_and_null_is_the_default() -> None:
    table = ItemTable()
    table.put("a", b'{"title": "A", "available": null, "boost": null, "colour": "red"}')
    found = table.value("a")
    assert found is not None and json.loads(found)["colour"] == "red" and table.is_available("a", 0)


def test_an_item_that_is_sent_again_and_again_takes_no_more_memory() -> None:
    table = ItemTable()
    for n in range(20_000):
        table.put("a", value(available_from=START_MS, available_until=START_MS + 1 + n))
    assert len(table._edges) < 3_000 and list(table.passed_edges(START_MS))
    assert START_MS < table.next_edge_ms() <= START_MS + 20_000
    assert list(table.passed_edges(START_MS + 20_000)) and table.next_edge_ms() == math.inf


# --- the rules


EDGES = st.one_of(st.none(), st.integers(START_MS - 3, START_MS + 6))
ROWS = st.builds(
    lambda available, begin, end, text: (available, begin, end, text),
    st.sampled_from([True, False, None]),
    EDGES,
    EDGES,
    st.booleans(),
)
STEPS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(IDS), ROWS),
    st.tuples(st.just("remove"), st.sampled_from(IDS), st.none()),
    st.tuples(st.just("block"), st.frozensets(st.sampled_from([*IDS, "other"])), st.none()),
    st.tuples(st.just("time"), st.integers(0, 3), st.none()),
)


@given(st.lists(STEPS, max_size=30), st.booleans())
def test_masks_and_gone_items_equal_brute_force_after_every_step(steps: list[Any], allow_unknown: bool) -> None:
    now_ms, blocked, rows = START_MS, frozenset[str](), dict[str, Any]()
    ours = Refusals(ItemTable(), allow_unknown, lambda: now_ms)

    def refused(item: str) -> bool:
        if item in blocked:
            return True
        if not rows:
            return False
        if item not in rows:
            return not allow_unknown
        available, begin, end, _ = rows[item]
        return available is False or not (begin or 0) <= now_ms < (end or START_MS * 2)

    ours.of(VOCAB)
    for kind, what, row in steps:
        before = {item for item in IDS if refused(item)}
        if kind == "put":
            available, begin, end, text = row
            rows[what] = row
            edges = {"available_from": begin, "available_until": end}
            ours.put(what, value(available=available, **{k: rfc3339(v) if text and v else v for k, v in edges.items()}))
        elif kind == "remove":
            rows.pop(what, None)
            ours.remove(what)
        elif kind == "block":
            blocked = what
            ours.block(what)
        else:
            now_ms += what
        ours.pass_time()
        now = {item for item in IDS if refused(item)}
        mask = ours.of(VOCAB)
        assert {IDS[n - 1] for n in range(1, len(mask.mask)) if mask.mask[n]} == now
        assert mask.count == len(now) and mask.mask[0]
        taken = ours.take_gone()
        assert taken is None or taken & set(IDS) == now - before
        assert not ours.has_gone.is_set()


def test_an_empty_table_refuses_nothing_and_an_unknown_item_is_refused_unless_allowed() -> None:
    assert not Refusals(ItemTable()).refuses("a")
    assert not Refusals().refuses("a")
    assert refusals_with({"a": value()}).refuses("b")
    assert not refusals_with({"a": value()}, allow_unknown=True).refuses("b")


async def test_a_mask_made_in_a_thread_has_the_changes_of_that_time() -> None:
    refusals = refusals_with({item: value() for item in IDS})
    making = asyncio.create_task(refusals.prepare(VOCAB))
    await asyncio.sleep(0)  # the thread has begun
    refusals.put("i3", value(available=False))
    await making
    assert refusals.of(VOCAB).mask.tolist() == [item in (None, "i3") for item in (None, *IDS)]


async def test_an_item_goes_by_itself_at_its_time() -> None:
    refusals = Refusals(ItemTable())
    soon = datetime.fromtimestamp(datetime.now(UTC).timestamp() + 0.3, UTC)
    refusals.put("i1", value(available_until=soon.isoformat()))
    refusals.put("i2", value())
    refusals.take_gone()
    while not refusals.has_gone.is_set():
        await refusals.watch_time()
    assert refusals.take_gone() == {"i1"} and refusals.refuses("i1") and datetime.now(UTC) >= soon


def test_many_items_that_go_at_once_are_not_named() -> None:
    refusals = refusals_with({f"x{n}": value() for n in range(MOST_GONE + 2)})
    refusals.take_gone()
    for n in range(MOST_GONE):
        refusals.remove(f"x{n}")
    assert refusals.take_gone() == {f"x{n}" for n in range(MOST_GONE)}
    refusals.block(frozenset(f"y{n}" for n in range(MOST_GONE + 1)))
    assert refusals.take_gone() == set()  # they were refused before
    refusals = refusals_with({f"x{n}": value() for n in range(MOST_GONE + 2)}, allow_unknown=True)
    refusals.take_gone()
    refusals.block(frozenset(f"x{n}" for n in range(MOST_GONE + 1)))
    assert refusals.take_gone() is None


async def test_another_table_is_applied_as_its_differences() -> None:
    refusals = refusals_with({"a": value(), "b": value(), "c": value(), "d": value()})
    vocab = ItemVocab(["a", "b", "c", "d", "e"])
    mask = refusals.of(vocab)
    other = ItemTable()
    for item, fields in {"a": value(), "b": value(available=False), "e": value()}.items():
        other.put(item, fields)
    refusals.take_gone()
    await refusals.change_to(other, unread={"d"})
    assert mask.mask.tolist() == [True, False, True, True, False, False]
    assert refusals.take_gone() == {"b", "c"}
