"""Bring data into the types that a schema declares, and report schemas that cannot be used."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from sasrec.data.datasets import (
    INTERACTIONS_SCHEMA_PATH,
    ITEMS_SCHEMA_PATH,
    InteractionsDataset,
    ItemsDataset,
    read_interactions,
)
from sasrec.data.formats import DataFileError

from support.interactions import (
    NOON,
    NOON_MS,
    ROWS,
    SOURCES,
    write,
)


def schema(folder: Path, *columns: str) -> Path:
    return write(folder, "columns:\n" + "".join(f"- {{name: {column}}}\n" for column in columns), "schema.yaml")


IDS_AS_TEXT = ("USER_ID, type: str", "ITEM_ID, type: str")


@pytest.mark.parametrize("source", sorted(SOURCES.keys() - {"dict of arrays"}))
def test_the_shipped_schemas_fit(tmp_path: Path, source: str) -> None:
    data = SOURCES[source](tmp_path, ROWS)
    if source != "dataset":
        table = InteractionsDataset(data, INTERACTIONS_SCHEMA_PATH).fetch_data()
        assert table["ITEM_ID"].to_pylist() == ["7", "8", "7", "-9"]
        assert table["TIMESTAMP"].to_pylist() == ROWS["TIMESTAMP"]
        assert table["OUTCOME"].to_pylist() == ROWS["OUTCOME"]
        assert ItemsDataset(data, str(ITEMS_SCHEMA_PATH)).fetch_data().column_names == ["ITEM_ID"]
        assert not read_interactions(InteractionsDataset(data, INTERACTIONS_SCHEMA_PATH)).integer_items, "declared str"


@pytest.mark.parametrize(("kind", "exact"), [("str", 10**14 - 1), ("int", 10**14 - 1), ("float", 10**14 - 1)])
def test_timestamps_of_every_declared_type(tmp_path: Path, kind: str, exact: int) -> None:
    path = schema(tmp_path, *IDS_AS_TEXT, f"TIMESTAMP, type: {kind}")
    columns: dict[str, list[Any]] = {"USER_ID": [1], "ITEM_ID": [2]}
    for times, expected in (
        ([exact], exact),
        ([NOON], NOON_MS),
        ([float(10**14 - 1)], 10**14 - 1),
        ([date(1970, 1, 2)], 86_400_000),
    ):
        rows = read_interactions(InteractionsDataset(columns | {"TIMESTAMP": times}, path))
        assert rows.timestamps is not None
        assert rows.timestamps.tolist() == [expected]


def test_timestamps_declared_as_text_are_parsed(tmp_path: Path) -> None:
    path = schema(tmp_path, *IDS_AS_TEXT, "TIMESTAMP, type: str")
    data = write(tmp_path, "USER_ID,ITEM_ID,TIMESTAMP\n1,2,2024-01-31T12:00:00.001Z\n1,3,17\n")
    rows = read_interactions(InteractionsDataset(data, path))
    assert rows.timestamps is not None
    assert rows.timestamps.tolist() == [NOON_MS, 17]


def test_ids_declared_int_are_integers(tmp_path: Path) -> None:
    path = schema(tmp_path, "USER_ID, type: int", "ITEM_ID, type: int")
    rows = read_interactions(
        InteractionsDataset({"USER_ID": ["1", "007"], "ITEM_ID": [5.0, 6.0]}, path), timestamp="optional"
    )
    assert (rows.user_ids, rows.integer_users) == (["1", "7"], True)
    assert (rows.item_ids, rows.integer_items) == (["5", "6"], True)


def test_declared_columns_of_other_names_are_read(tmp_path: Path) -> None:
    path = schema(tmp_path, *IDS_AS_TEXT, "PRICE, type: float, vocab: [a]", "SHOP, type: str")
    table = InteractionsDataset(write(tmp_path, "SHOP,USER_ID,ITEM_ID,PRICE\n1,2,3,\n1,2,3,4\n"), path).fetch_data()
    assert table.to_pydict() == {"USER_ID": ["2", "2"], "ITEM_ID": ["3", "3"], "PRICE": [None, 4.0], "SHOP": ["1", "1"]}


MISFITS: dict[str, tuple[str, list[Any], str]] = {
    "missing": ("AGE, type: int", [1], "the frame: column AGE is missing; the columns are 'USER_ID', "),
    "outcome missing": ("OUTCOME, type: float", [1], "the frame: column OUTCOME is missing; the columns are "),
    "fraction": ("X, type: int", [1.0, 1.5], "row 1: X 1.5 is not int, as the schema declares; correct either"),
    "word": ("X, type: float", ["1", "2", "a"], "row 2: X 'a' is not float, as the schema declares; correct either"),
    "list": ("X, type: str", [[1]], "row 0: X [1] is not str, as the schema declares; correct either"),
    "time is text": ("TIMESTAMP, type: int", ["1", "2024-01-31"], "row 1: TIMESTAMP '2024-01-31' is not int, as the"),
    "time is rounded": (
        "TIMESTAMP, type: float",
        [1, -(2**53) - 1],
        f"row 1: TIMESTAMP {-(2**53) - 1} is not float, as the",
    ),
    "time is true": ("TIMESTAMP, type: int", [True], "the frame: TIMESTAMP has type bool; give integers or datetimes"),
    "user is true": ("USER_ID, type: str", [True], "the frame: USER_ID has type bool; give strings or integers"),
    "user is a float": ("USER_ID, type: str", [5.0], "the frame: USER_ID has type double; give strings or integers"),
    "user is a word": ("USER_ID, type: int", ["5", "x"], "row 1: USER_ID 'x' is not int, as the schema declares"),
}


@pytest.mark.parametrize(("declared", "values", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_data_that_do_not_fit_the_schema(tmp_path: Path, declared: str, values: list[Any], message: str) -> None:
    name = declared.split(",")[0]
    columns = {"USER_ID": ["u"] * len(values), "ITEM_ID": ["i"] * len(values)}
    columns |= {name: values} if "missing" not in message else {}
    others = [column for column in IDS_AS_TEXT if not column.startswith(name)]
    dataset = InteractionsDataset(columns, schema(tmp_path, declared, *others))
    with pytest.raises(DataFileError, match=f"^{re.escape(message)}"):
        read_interactions(dataset, timestamp="optional")


EXPECTED = "expected `columns:` and below it `- {name: USER_ID, type: str}` for each"
SCHEMA_FAULTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot read {path}: No such file or directory"),
    "not YAML": (b"columns: [", "{path} is not YAML: while parsing"),
    "not UTF-8": (b"columns: caf\xe9", "{path} is not YAML: 'utf-8' codec"),
    "empty": (b"", "{path}: no list of columns in it; " + EXPECTED),
    "a word": (b"columns: none", "{path}: no list of columns in it; " + EXPECTED),
    "columns of words": (b"columns: [USER_ID]", "{path}: column 0: 0: Input should be a valid dict"),
    "type unknown": (b"columns: [{name: AGE, type: double}]", "{path}: column AGE has type 'double'; give str, int or"),
    "type missing": (b"columns: [{name: AGE}]", "{path}: column AGE: type: Field required; " + EXPECTED),
    "name missing": (b"columns: [{type: int}]", "{path}: column 0: name: Field required; " + EXPECTED),
    "name a number": (b"columns: [{name: 5, type: int}]", "{path}: column 5: name: Input should be a valid string; "),
    "twice": (b"columns: [{name: A, type: int}, {name: A, type: str}]", "{path}: column A is declared twice; keep one"),
    "no items": (b"columns: [{name: USER_ID, type: str}]", "{path}: column ITEM_ID is not declared; add - "),
    "no users": (b"columns: [{name: ITEM_ID, type: str}]", "{path}: column USER_ID is not declared; add - "),
    "float ids": (b"columns: [{name: USER_ID, type: float}]", "{path}: column USER_ID is declared float; declare it"),
    "outcome text": (b"columns: [{name: OUTCOME, type: str}]", "{path}: column OUTCOME is declared str; declare it"),
}


@pytest.mark.parametrize(("content", "message"), SCHEMA_FAULTS.values(), ids=SCHEMA_FAULTS.keys())
def test_a_fault_of_a_schema_names_file_column_and_remedy(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "schema.yaml"
    if content is not None:
        path.write_bytes(content)
    expected = message.replace("{path}", str(path))
    with pytest.raises(DataFileError, match=f"^{re.escape(expected)}") as raised:
        InteractionsDataset({}, path)
    assert "\n" not in str(raised.value), "one line"
    assert "pydantic" not in str(raised.value)
