"""The items file: formats, bad lines, and changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamrec.errors import SettingsError
from streamrec.items.file import ItemFile, items_of, read_items
from streamrec.items.refusals import Refusals
from streamrec.items.table import Item, ItemTable
from streamrec.metrics import Metrics

LINES = [
    {"item_id": "a", "title": "A, the first", "categories": ["books", "new"], "boost": 0.5, "colour": "red"},
    {"item_id": 5, "available": False},
    {"item_id": "c", "available_until": "2030-01-01T00:00:00Z"},
]
CSV = """item_id,title,categories,available,available_until,boost,colour
a,"A, the first",books|new,,,0.5,red
5,,,false,,,
c,,,,2030-01-01T00:00:00Z,,
"""


def json_lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text", [json_lines(*LINES), CSV, CSV.replace(",", "\t").replace('"A\t the first"', "A, the first")]
)
def test_all_formats_give_one_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "items"
    path.write_text(text)
    table, bad = read_items(path)
    assert not bad and len(table) == 3
    assert table.item("a") == Item("A, the first", ("books", "new"), boost=0.5)
    assert json.loads(table.value("a") or b"")["colour"] == "red"
    assert [table.is_available(item, 1_900_000_000_000) for item in ("a", "5", "c")] == [True, False, False]
    assert table.is_available("c", 1_800_000_000_000)


async def test_a_bad_line_is_named_and_the_former_row_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json_lines({"item_id": "a", "title": "A"}, {"item_id": "b"}))
    refusals = Refusals(ItemTable())
    source = ItemFile(path, refusals, Metrics())
    await source.read()
    refusals.take_gone()
    new = tmp_path / "new"
    new.write_text(json_lines({"item_id": "a", "available_from": 17}, {"item_id": "c"}, {"title": "no id"}) + "{\n")
    new.rename(path)
    await source.follow()
    table = refusals.table
    assert table is not None and table.value("a") == b'{"title":"A"}'
    assert "b" not in table and "c" in table and refusals.take_gone() == {"b"}
    assert [f"{path}, line {n}" in caplog.text for n in (1, 2, 3, 4)] == [True, False, True, True]


async def test_a_file_that_is_lost_later_leaves_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json_lines({"item_id": "a"}))
    refusals = Refusals(ItemTable())
    source = ItemFile(path, refusals, Metrics())
    await source.read()
    path.unlink()
    for _ in range(2):
        await source.follow()
    assert "a" in (refusals.table or ()) and caplog.text.count("remains as it is") == 1


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "No such file"), ("sku;name\n1;x\n", "neither a JSON object nor a header")]
)
async def test_a_file_that_cannot_be_read_at_the_start_is_an_error(
    tmp_path: Path, text: str | None, problem: str
) -> None:
    path = tmp_path / "items"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=problem):
        await ItemFile(path, Refusals(ItemTable()), Metrics()).read()


def test_a_file_to_send_has_no_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json_lines({"item_id": "a", "n": 1}, {"item_id": ""}))
    found = items_of(path)
    assert next(found) == (1, "a", b'{"n":1}')
    with pytest.raises(SettingsError, match="line 2: item_id is empty"):
        next(found)
