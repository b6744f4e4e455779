"""Report damaged rows of frames, CSV files and Parquet files by row, column and remedy."""

from __future__ import annotations

import gzip
import re
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from sasrec.data.datasets import (
    read_interactions,
    read_items,
)
from sasrec.data.formats import DataFileError

from support.interactions import (
    ROWS,
    SOURCES,
    write,
    write_parquet,
)

FINE: dict[str, list[Any]] = {"USER_ID": ["u", "v", "w"], "ITEM_ID": ["i", "j", "k"], "TIMESTAMP": [1, 2, 3]}
NAN, INFINITY = float("nan"), float("inf")
TIME_REMEDY = "give integers or datetimes"
OUTCOME_REMEDY = "give a finite number or a boolean"
REMEDIES = {
    "USER_ID": "give every row its id, or remove the row",
    "ITEM_ID": "give every row its id, or remove the row",
    "TIMESTAMP": TIME_REMEDY,
    "OUTCOME": OUTCOME_REMEDY,
}
NO_TIMES = ("noon", "1.5", "1e5", "20240131.12", "31.01.2024", "2024-13-01", "9" * 19, "9" * 5000, "٣-٣", "0x1F", "")
ROW_FAULTS: dict[str, tuple[str, list[Any] | pa.Array, int, str]] = {
    "user null": ("USER_ID", ["u", None, None], 1, "is null"),
    "user empty": ("USER_ID", ["u", "v", ""], 2, "is empty"),
    "item null": ("ITEM_ID", [None, "i", "j"], 0, "is null"),
    "item empty": ("ITEM_ID", ["i", "", ""], 1, "is empty"),
    "items all null": ("ITEM_ID", [None, None, None], 0, "is null"),
    "item null, integers": ("ITEM_ID", [1, 2, None], 2, "is null"),
    "item null, whole floats": ("ITEM_ID", [1.0, None, 2.0], 1, "is null"),
    "user NaN, whole floats": ("USER_ID", [1.0, 2.0, NAN], 2, "is null"),
    "user null, category": ("USER_ID", pa.array(["u", None, "v"]).dictionary_encode(), 1, "is null"),
    "time null": ("TIMESTAMP", [1, None, 3], 1, "is null"),
    "time null, datetimes": ("TIMESTAMP", [datetime(2024, 1, 1), datetime(2024, 1, 1), None], 2, "is null"),
    "times all null": ("TIMESTAMP", [None] * 3, 0, "is null"),
    "time a fraction": ("TIMESTAMP", [1.0, 2.5, 3.0], 1, "2.5 is not an exact whole number"),
    "time NaN": ("TIMESTAMP", [1.0, 2.0, NAN], 2, "nan is not an exact whole number"),
    "time infinite": ("TIMESTAMP", [1.0, INFINITY, 2.0], 1, "inf is not an exact whole number"),
    "time rounded": ("TIMESTAMP", [1.0, 1e18, 2.0], 1, "1e+18 is not an exact whole number"),
    "time rounded to float32": (
        "TIMESTAMP",
        pa.array(np.array([1, 2, 2**24 + 2], np.float32)),
        2,
        "16777218.0 is not an exact whole number",
    ),
    "time beyond 64 bits": (
        "TIMESTAMP",
        pa.array([1, 2**63, 2**64 - 1], pa.uint64()),
        1,
        f"{2**63} does not fit 64 bits",
    ),
    **{
        f"time {text[:20]!r}": (
            "TIMESTAMP",
            ["1", "2024-01-31", text],
            2,
            f"{text!r} is neither an integer nor an ISO-",
        )
        for text in NO_TIMES
    },
    "outcome null": ("OUTCOME", [1.0, None, 0.0], 1, "is null"),
    "outcome null, booleans": ("OUTCOME", [True, False, None], 2, "is null"),
    "outcomes all null": ("OUTCOME", [None] * 3, 0, "is null"),
    "outcome NaN": ("OUTCOME", [1.0, NAN, 0.0], 1, "nan is not finite as float32"),
    "outcome infinite": ("OUTCOME", [1.0, 0.0, -INFINITY], 2, "-inf is not finite as float32"),
    "outcome beyond float32": ("OUTCOME", [1.0, 1e39, 2.0], 1, "1e+39 is not finite as float32"),
    "outcome a word": ("OUTCOME", ["1", "2", "good"], 2, "'good' is text"),
    "outcome digits as text": ("OUTCOME", ["1", "2", "3"], 0, "'1' is text"),
}


@pytest.mark.parametrize(("column", "values", "row", "problem"), ROW_FAULTS.values(), ids=ROW_FAULTS.keys())
def test_a_fault_names_column_row_and_remedy(tmp_path: Path, column: str, values: Any, row: int, problem: str) -> None:
    columns = FINE | {column: values}
    path = write_parquet(tmp_path, columns)
    for source, where in ((columns, f"row {row}"), (pa.table(columns), f"row {row}"), (path, f"{path}, row {row}")):
        with pytest.raises(DataFileError, match=f"^{re.escape(f'{where}: {column} {problem}')}") as raised:
            read_interactions(source)
        assert f"; {REMEDIES[column]}" in str(raised.value)
        assert "\n" not in str(raised.value), "one line"


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_a_missing_value_in_a_frame_is_found(frame: Any) -> None:
    for column, values in (("USER_ID", [1, None, 3]), ("ITEM_ID", ["a", None, "b"]), ("OUTCOME", [1.0, None, 2.0])):
        with pytest.raises(DataFileError, match=f"^row 1: {column} is null; {REMEDIES[column]}"):
            read_interactions(frame(FINE | {column: values}))
    with pytest.raises(DataFileError, match=r"^row 1: TIMESTAMP is null; "):
        read_interactions(frame(FINE | {"TIMESTAMP": [1.0, None, 2.0]}))


CSV_FAULTS = {
    "user empty": ("u,i,1,1\n,j,2,1\n", ":3: USER_ID is empty; "),
    "user empty, integers": ("1,i,1,1\n,j,2,1\n", ":3: USER_ID is empty; "),
    "item empty, quoted": ('u,i,1,1\nu,"",2,1\n', ":3: ITEM_ID is empty; "),
    "time empty": ("u,i,1,1\nu,j,,1\n", ":3: TIMESTAMP is empty; "),
    "time fraction": ("u,i,1,1\nu,j,2.5,1\n", ":3: TIMESTAMP '2.5' is neither "),
    "time a word": ("u,i,noon,1\n", ":2: TIMESTAMP 'noon' is neither "),
    "outcome empty": ("u,i,1, \n", ":2: OUTCOME is empty; "),
    "outcome a word": ("u,i,1,1\nu,j,2,\nu,j,2,x\n", ":4: OUTCOME 'x' is text; "),
    "outcome nan": ("u,i,1,1\nu,j,2,nan\n", ":3: OUTCOME nan is not finite "),
    "behind blank lines and a row of two": ('\nu,"i\nj",1,1\n\nu,j,2,nan\n', ":6: OUTCOME nan is not finite "),
    "field missing": ("u,i,1,1\nu,j,2\n", ":3: 4 columns expected, got 3"),
    "field too many": ("u,i,1,1\n\nu,j,2,1,9\n", ":4: 4 columns expected, got 5"),
    "field missing behind quotes": ('u,"i\nj",1,1\nu,j,2\n', ":4: 4 columns expected, got 3"),
    "a quote left open": ('u,i,1,1\nu,"j,2,1\nu,k,3,1\n', ":3: unexpected end of data"),
    "text behind a quote": ('u,i,1,1\nu,"j"k,2,1\n', ":3: "),
    "no rows": ("", " has no rows"),
}


@pytest.mark.parametrize(("rows", "message"), CSV_FAULTS.values(), ids=CSV_FAULTS.keys())
def test_a_fault_in_a_csv_file_names_file_and_line(tmp_path: Path, rows: str, message: str) -> None:
    text = "USER_ID,ITEM_ID,TIMESTAMP,OUTCOME\n" + rows
    folder = tmp_path / "folder"
    paths = [
        write(tmp_path, text),
        write(tmp_path, text.replace(",", "\t"), "clicks.tsv"),
        write(tmp_path, gzip.compress(text.encode()), "clicks.csv.gz"),
    ]
    for path in paths:
        with pytest.raises(DataFileError, match=re.escape(f"{path}{message}")) as raised:
            read_interactions(path)
        assert "\n" not in str(raised.value), "one line"
    if rows:
        write(folder, "USER_ID,ITEM_ID,TIMESTAMP,OUTCOME\nu,i,1,1\n", "1.csv")
        path = write(folder, text, "2.csv")
        with pytest.raises(DataFileError, match=re.escape(f"{path}{message}")):
            read_interactions(folder)


@pytest.mark.parametrize("column", ["USER_ID", "ITEM_ID"])
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.0], "double"),
        ([1.5, None], "double"),
        ([True], "bool"),
        ([b"a"], "binary"),
        ([[1]], "list<.*>"),
        ([date(2024, 1, 1)], "date32"),
        ([Decimal(1)], "decimal128.*"),
    ],
)
def test_ids_of_other_types_are_refused(column: str, values: list[Any], kind: str) -> None:
    columns = {name: ["x"] * len(values) for name in ("USER_ID", "ITEM_ID")} | {column: values}
    with pytest.raises(DataFileError, match=rf"^the frame: {column} has type {kind}.*; give strings or integers$"):
        read_interactions(columns, timestamp="optional")


@pytest.mark.parametrize(("values", "kind"), [([True], "bool"), ([b"1"], "binary"), ([timedelta(1)], "duration")])
def test_times_and_outcomes_of_other_types_are_refused(values: list[Any], kind: str) -> None:
    columns = {"USER_ID": ["u"], "ITEM_ID": ["i"]}
    with pytest.raises(DataFileError, match=f"^the frame: TIMESTAMP has type {kind}.*; {TIME_REMEDY}$"):
        read_interactions(columns | {"TIMESTAMP": values})
    if kind != "bool":
        with pytest.raises(DataFileError, match=f"^the frame: OUTCOME has type {kind}.*; {OUTCOME_REMEDY}$"):
            read_interactions(columns | {"OUTCOME": values}, timestamp="optional")


@pytest.mark.parametrize("source", ["dict", "pandas", "polars", "pyarrow", "csv", "parquet"])
@pytest.mark.parametrize("missing", ["USER_ID", "ITEM_ID", "TIMESTAMP", "OUTCOME"])
def test_the_error_of_a_missing_column_lists_the_columns(tmp_path: Path, source: str, missing: str) -> None:
    columns = {name: values for name, values in ROWS.items() if name != missing}
    there = ", ".join(map(repr, columns))
    option = missing.partition("_")[0].lower()
    remedy = f"if one of them is meant, name it with --{option}-column or Columns({option}=...)"
    message = re.escape(f": column {missing} is missing; the columns are {there}; {remedy}")
    order = "; if the rows are in the order of time, oldest first, say so with --in-file-order or .*"
    with pytest.raises(DataFileError, match=f"{message}{order if missing == 'TIMESTAMP' else ''}$"):
        read_interactions(SOURCES[source](tmp_path, columns), outcome="required")


@pytest.mark.parametrize(
    "frame", [pd.DataFrame([[1, 2]], columns=["ITEM_ID"] * 2), pa.table([[1], [2]], ["ITEM_ID"] * 2)]
)
def test_a_column_given_twice_is_refused(tmp_path: Path, frame: Any) -> None:
    for source, where in ((frame, "the frame"), (write(tmp_path, "ITEM_ID,ITEM_ID\n1,2\n"), r".*clicks\.csv:1")):
        with pytest.raises(DataFileError, match=rf"^{where}: column ITEM_ID is there 2 times; keep one of them$"):
            read_items(source)


@pytest.mark.parametrize("source", ["dict", "pandas", "polars", "pyarrow", "parquet"])
def test_no_rows_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataFileError, match=r"^(the frame|.*clicks.parquet) has no rows$"):
        read_items(SOURCES[source](tmp_path, {"ITEM_ID": []}))


def test_an_item_given_twice_names_both_rows(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"^row 3: ITEM_ID '5' is already at row 1; give each item once$"):
        read_items({"ITEM_ID": [4, 5, 6, 5]})
    path = write(tmp_path, "ITEM_ID\n5\n\n6\n5\n", "items.csv")
    with pytest.raises(DataFileError, match=re.escape(f"{path}:5: ITEM_ID '5' is already at {path}:2; give each")):
        read_items(path)
