"""Read data sets: all sources give equal rows in their order, and an error names the row and the remedy."""

from __future__ import annotations

import csv
import gzip
import io
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sasrec.data.datasets import (
    INTERACTIONS_SCHEMA_PATH,
    ITEMS_SCHEMA_PATH,
    InteractionRows,
    InteractionsDataset,
    ItemsDataset,
    read_interactions,
    read_items,
)
from sasrec.data.formats import DataFileError

TIME_MS = 1_700_000_000_000
ROWS = {
    "USER_ID": ["u1", "u2", "u1", "ü,3"],
    "ITEM_ID": [7, 8, 7, -9],
    "OUTCOME": [1.0, 0.5, 0.0, 5.0],
    "TIMESTAMP": [TIME_MS + 5, TIME_MS, TIME_MS + 5, TIME_MS + 1],
    "PRICE": [1.5, 2.5, None, 3.5],
}


def to_csv(columns: dict[str, list[Any]], delimiter: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def write_csv(folder: Path, columns: dict[str, list[Any]]) -> Path:
    return write(folder, to_csv(columns))


def write(folder: Path, content: str | bytes, name: str = "clicks.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(folder: Path, columns: dict[str, list[Any]], name: str = "clicks.parquet") -> Path:
    path = write(folder, b"", name)
    parquet.write_table(pa.table(columns), path)
    return path


def halves(columns: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    return {name: values[:2] for name, values in columns.items()}, {
        name: values[2:] for name, values in columns.items()
    }


def csv_folder(folder: Path, columns: dict[str, list[Any]]) -> Path:
    first, second = halves(columns)
    write(folder / "data", to_csv(first), "part-1.csv")
    write(folder / "data", gzip.compress(to_csv(second).encode()), "part-2.csv.gz")
    write(folder / "data", "", "_SUCCESS")
    return folder / "data"


def parquet_folder(folder: Path, columns: dict[str, list[Any]]) -> Path:
    first, second = halves(columns)
    write_parquet(folder / "data", first, "day=1/part.parquet")
    write_parquet(folder / "data", second, "day=2/part.parquet")
    write(folder / "data", "damaged", ".crc/part.parquet")
    return folder / "data"


Source = Callable[[Path, dict[str, list[Any]]], Any]
SOURCES: dict[str, Source] = {
    "dict": lambda folder, columns: columns,
    "dict of arrays": lambda folder, columns: {
        "USER_ID": pd.Series(columns["USER_ID"]),
        "ITEM_ID": np.array(columns["ITEM_ID"]),
        "OUTCOME": pl.Series(columns["OUTCOME"]),
        "TIMESTAMP": pa.array(columns["TIMESTAMP"]),
        "anything": object(),
    },
    "pandas": lambda folder, columns: pd.DataFrame(columns),
    "pandas, mixed index and column aside": lambda folder, columns: pd.DataFrame(
        columns | {"MIXED": [1, "a", object(), None]}, index=[1, "a", None, 2.5]
    ),
    "pandas, categories": lambda folder, columns: pd.DataFrame(columns).astype({"USER_ID": "category"}),
    "pandas, nullable types": lambda folder, columns: pd.DataFrame(columns).convert_dtypes(),
    "polars": lambda folder, columns: pl.DataFrame(columns),
    "polars, categories": lambda folder, columns: pl.DataFrame(columns, schema_overrides={"USER_ID": pl.Categorical}),
    "polars, object aside": lambda folder, columns: pl.DataFrame(
        columns | {"HUGE": [1, 2, 3, 4]}, schema_overrides={"HUGE": pl.Int128}
    ),
    "pyarrow": lambda folder, columns: pa.table(columns),
    "pyarrow, string views": lambda folder, columns: pa.table(
        columns | {"USER_ID": pa.array(columns["USER_ID"]).cast(pa.string_view())}
    ),
    "csv": write_csv,
    "csv, path as str": lambda folder, columns: str(write_csv(folder, columns)),
    "csv, gzipped": lambda folder, columns: write(folder, gzip.compress(to_csv(columns).encode()), "Clicks.CSV.GZ"),
    "csv, BOM and blank lines": lambda folder, columns: write(
        folder, "\ufeff\n" + to_csv(columns).replace("\r\n", "\n\n")
    ),
    "tsv": lambda folder, columns: write(folder, to_csv(columns, "\t"), "clicks.tsv"),
    "parquet": write_parquet,
    "csv folder": csv_folder,
    "parquet folder": parquet_folder,
    "dataset": lambda folder, columns: InteractionsDataset(columns),
}


def assert_rows(rows: InteractionRows) -> None:
    assert rows.user_ids == ["u1", "u2", "u1", "ü,3"]
    assert rows.item_ids == ["7", "8", "7", "-9"]
    assert (rows.integer_users, rows.integer_items) == (False, True)
    assert rows.timestamps is not None
    assert rows.timestamps.dtype == np.int64
    assert rows.timestamps.tolist() == ROWS["TIMESTAMP"]
    assert rows.outcomes is not None
    assert rows.outcomes.dtype == np.float32
    assert rows.outcomes.tolist() == ROWS["OUTCOME"]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_all_sources_give_equal_rows(tmp_path: Path, source: Source) -> None:
    assert_rows(read_interactions(source(tmp_path, ROWS)))


@pytest.mark.parametrize("source", ["dict", "pandas", "polars", "pyarrow", "csv", "parquet", "csv folder"])
def test_all_sources_give_equal_items(tmp_path: Path, source: str) -> None:
    columns = {"ITEM_ID": ["a", "b", "c"], "PRICE": [1, 2, 3]}
    rows = read_items(SOURCES[source](tmp_path, columns))
    assert (rows.item_ids, rows.integer_items) == (["a", "b", "c"], False)


def test_events_are_sorted_by_time_and_ties_keep_their_order() -> None:
    interactions = read_interactions(ROWS).to_interactions()
    assert interactions.user_ids == ["u2", "ü,3", "u1", "u1"]
    assert interactions.item_ids == ["8", "-9", "7", "7"]
    assert interactions.timestamps_ms.tolist() == [TIME_MS, TIME_MS + 1, TIME_MS + 5, TIME_MS + 5]
    assert interactions.outcomes is not None
    assert interactions.outcomes.tolist() == [0.5, 5.0, 1.0, 0.0]


def test_without_timestamps_and_outcomes_the_order_is_unchanged() -> None:
    rows = read_interactions({"USER_ID": ["b", "a"], "ITEM_ID": ["y", "x"]}, timestamp="optional")
    assert (rows.timestamps, rows.outcomes) == (None, None)
    interactions = rows.to_interactions()
    assert (interactions.user_ids, interactions.item_ids) == (["b", "a"], ["y", "x"])
    assert interactions.timestamps_ms.tolist() == [0, 0]
    assert interactions.outcomes is None


@given(times=st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_events_with_equal_timestamps_keep_their_order(times: list[int]) -> None:
    items = [str(row) for row in range(len(times))]
    found = read_interactions({"USER_ID": ["u"] * len(times), "ITEM_ID": items, "TIMESTAMP": times}).to_interactions()
    assert found.item_ids == [items[row] for _, row in sorted((time, row) for row, time in enumerate(times))]


def test_a_changed_file_is_seen(tmp_path: Path) -> None:
    dataset = InteractionsDataset(write_csv(tmp_path, ROWS))
    assert_rows(read_interactions(dataset))
    assert dataset.fetch_data().num_rows == 4
    write_csv(tmp_path, {name: values[:1] for name, values in ROWS.items()})
    assert dataset.fetch_data().num_rows == 1
    assert read_interactions(dataset).user_ids == ["u1"]


def test_a_dataset_can_be_made_before_its_file(tmp_path: Path) -> None:
    dataset = ItemsDataset(tmp_path / "items.csv")
    write(tmp_path, "ITEM_ID\na\n", "items.csv")
    assert dataset.fetch_data().to_pydict() == {"ITEM_ID": ["a"]}


WITHOUT_FRAMES = """
import sys
class NotInstalled:
    def find_spec(self, name, *_):
        if name in ("pandas", "polars"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
from sasrec.data.datasets import read_items
print(read_items({"ITEM_ID": [1]}).item_ids)
"""


def test_neither_pandas_nor_polars_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FRAMES], capture_output=True, check=True, text=True)
    assert done.stdout == "['1']\n"


# --- ids


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
TRICKY = st.text(',;"\n\r\t 0123456789-+.eNaé\u2028', min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(FIELD | TRICKY, FIELD | TRICKY), min_size=1, max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=PAIRS)
def test_any_ids_survive_every_source(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    users, items = [user for user, _ in pairs], [item for _, item in pairs]
    columns: dict[str, list[Any]] = {"USER_ID": users, "ITEM_ID": items}
    for name in ("csv", "parquet", "dict", "pandas", "polars", "pyarrow"):
        rows = read_interactions(SOURCES[name](tmp_path, columns), timestamp="optional")
        assert (rows.user_ids, rows.item_ids) == (users, items), name


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_integer_ids_become_their_digits_and_are_known_as_integers(tmp_path: Path, ids: list[int]) -> None:
    columns: dict[str, list[Any]] = {"USER_ID": ids, "ITEM_ID": list(map(str, ids))}
    for name in ("csv", "parquet", "dict", "pandas", "polars", "pyarrow"):
        rows = read_interactions(SOURCES[name](tmp_path, columns), timestamp="optional")
        assert rows.user_ids == rows.item_ids == list(map(str, ids))
        assert rows.integer_users
        assert rows.integer_items is (name == "csv"), "CSV has no types: 5 and '5' are equal"


def test_leading_zeros_in_a_csv_file_survive(tmp_path: Path) -> None:
    rows = read_items(write(tmp_path, "ITEM_ID\n007\n7\n0x7\n-0\nNA\n 7\n"))
    assert (rows.item_ids, rows.integer_items) == (["007", "7", "0x7", "-0", "NA", " 7"], False)


def test_one_word_makes_the_ids_of_a_whole_folder_text(tmp_path: Path) -> None:
    write(tmp_path, "ITEM_ID\n1\n", "1.csv")
    write(tmp_path, "ITEM_ID\nx2\n", "2.csv")
    rows = read_items(tmp_path)
    assert (rows.item_ids, rows.integer_items) == (["1", "x2"], False)


def test_uint64_ids_survive() -> None:
    assert read_items({"ITEM_ID": np.array([2**64 - 1], np.uint64)}).item_ids == [str(2**64 - 1)]


# --- TIMESTAMP


EXACT = [2**53 + 1, 2**53 - 1, 2**53, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("source", sorted(SOURCES.keys() - {"dict of arrays"}))
def test_integer_timestamps_are_exact(tmp_path: Path, source: str) -> None:
    columns = {"USER_ID": ["a"] * 4, "ITEM_ID": [1] * 4, "OUTCOME": [1] * 4, "TIMESTAMP": EXACT[1:]}
    for times in (EXACT[:4], EXACT[1:]):
        rows = read_interactions(SOURCES[source](tmp_path, columns | {"TIMESTAMP": times}))
        assert rows.timestamps is not None
        assert rows.timestamps.tolist() == times


NOON = datetime(2024, 1, 31, 12, 0, 0, 1000, tzinfo=UTC)
NOON_MS = 1_706_702_400_001
TIMES: dict[str, tuple[list[Any] | pa.Array, int]] = {
    "integer": ([5], 5),
    "small integer type": (pa.array([5], pa.uint8()), 5),
    "whole float": ([float(2**53)], 2**53),
    "negative whole float": ([-3.0], -3),
    "whole float32": (pa.array([2.0**24], pa.float32()), 2**24),
    "datetime": ([NOON.replace(tzinfo=None)], NOON_MS),
    "datetime, UTC": ([NOON], NOON_MS),
    "datetime, other zone": ([NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))], NOON_MS),
    "datetime, s": (pa.array([NOON_MS // 1000], pa.timestamp("s")), NOON_MS - 1),
    "datetime, ms": (pa.array([NOON_MS], pa.timestamp("ms", "Europe/Berlin")), NOON_MS),
    "datetime, ns": (pa.array([NOON_MS * 10**6 + 999_999], pa.timestamp("ns")), NOON_MS),
    "datetime before 1970": ([datetime(1969, 12, 31, 23, 59, 59, 999_500)], -1),
    "date": ([date(2024, 1, 31)], NOON_MS - 43_200_001),
    "date64": (pa.array([date(2024, 1, 31)], pa.date64()), NOON_MS - 43_200_001),
    "digits": ([str(2**53 + 1)], 2**53 + 1),
    "digits, signed and zero-padded": (["-0012"], -12),
    "digits and .0": ([f"{2**53 + 1}.0"], 2**53 + 1),
    "spaces around": ([" 12 "], 12),
    "ISO": (["2024-01-31T12:00:00.001"], NOON_MS),
    "ISO, Z": (["2024-01-31 12:00:00.001Z"], NOON_MS),
    "ISO, offset": (["2024-01-31T14:00:00.001+02:00"], NOON_MS),
    "ISO, nanoseconds": (["2024-01-31T12:00:00.001999999"], NOON_MS),
    "ISO, basic": (["20240131T120000.001Z"], NOON_MS),
    "ISO, date": (["2024-01-31"], NOON_MS - 43_200_001),
    "ISO, before 1970": (["1969-12-31T23:59:59.9995"], -1),
    "categories": (pa.array(["2024-01-31T12:00:00.001"]).dictionary_encode(), NOON_MS),
}


@pytest.mark.parametrize(("given_times", "expected"), TIMES.values(), ids=TIMES.keys())
def test_every_kind_of_timestamp(tmp_path: Path, given_times: Any, expected: int) -> None:
    columns: dict[str, Any] = {"USER_ID": ["u"], "ITEM_ID": ["i"], "TIMESTAMP": given_times}
    for source in (columns, write_parquet(tmp_path, columns)):
        rows = read_interactions(source)
        assert rows.timestamps is not None
        assert rows.timestamps.tolist() == [expected]


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_datetimes_of_frames(frame: Any) -> None:
    rows = read_interactions(frame({"USER_ID": ["u"] * 2, "ITEM_ID": ["i"] * 2, "TIMESTAMP": [NOON, NOON]}))
    assert rows.timestamps is not None
    assert rows.timestamps.tolist() == [NOON_MS, NOON_MS]


@settings(deadline=None)
@given(time=st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-9, minutes=-30))])))
def test_times_as_text_and_as_datetimes_are_equal(time: datetime) -> None:
    columns: dict[str, Any] = {"USER_ID": ["u"], "ITEM_ID": ["i"]}
    found = [read_interactions(columns | {"TIMESTAMP": [value]}).timestamps for value in (time, time.isoformat())]
    assert found[0] is not None
    assert found[0] == found[1]
    assert timedelta(0) <= time - datetime(1970, 1, 1, tzinfo=UTC) - timedelta(milliseconds=int(found[0][0]))


# --- OUTCOME


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [([True, False], [1, 0]), ([3, -1], [3, -1]), ([0.1, 2.5], [np.float32(0.1), 2.5]), (["True", "false"], [1, 0])],
)
def test_outcomes_of_frames_and_csv_files(tmp_path: Path, outcomes: list[Any], expected: list[float]) -> None:
    columns = {"USER_ID": ["u", "v"], "ITEM_ID": ["i", "j"], "OUTCOME": outcomes}
    sources = [write_csv(tmp_path, columns)] + ([columns, pl.DataFrame(columns)] if outcomes[0] != "True" else [])
    for source in sources:
        rows = read_interactions(source, outcome="required", timestamp="optional")
        assert rows.outcomes is not None
        assert rows.outcomes.tolist() == expected


def test_decimals_and_spaces_are_numbers(tmp_path: Path) -> None:
    columns = {"USER_ID": ["u"], "ITEM_ID": ["i"], "OUTCOME": [Decimal("1.50")]}
    text = write(tmp_path, "USER_ID,ITEM_ID,OUTCOME\nu,i, 1.50\n")
    for source in (columns, text):
        rows = read_interactions(source, timestamp="optional")
        assert rows.outcomes is not None
        assert rows.outcomes.tolist() == [1.5]


# --- damaged rows of frames, CSV files and Parquet files


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
    "time empty": ("u,i,1,1\nu,j,,1\n", ":3: TIMESTAMP is null; "),
    "time fraction": ("u,i,1,1\nu,j,2.5,1\n", ":3: TIMESTAMP '2.5' is neither "),
    "time a word": ("u,i,noon,1\n", ":2: TIMESTAMP 'noon' is neither "),
    "outcome empty": ("u,i,1, \n", ":2: OUTCOME is null; "),
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
    with pytest.raises(DataFileError, match=f"{message}$"):
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


# --- faults of files and frames


GOOD_GZIP = gzip.compress(b"ITEM_ID\n" + b"".join(b"%d\n" % (n * n) for n in range(5000)), mtime=0)
FILE_FAULTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("items.csv", None, "cannot read {path}: No such file or directory"),
    "missing parquet": ("items.parquet", None, "cannot read {path}: No such file or directory"),
    "unknown kind": ("items.xlsx", b"x", "{path}:1: no known format in 'x'; expected a header with ITEM_ID (CSV, TSV"),
    "csv empty": ("items.csv", b"", "{path} is empty; expected a header with ITEM_ID"),
    "csv blank": ("items.csv", b"\n\n", "{path} is empty; expected a header with ITEM_ID"),
    "csv no header": ("items.csv", b"1\n2\n", "{path}:1: no known format in '1'; expected a header with ITEM_ID "),
    "csv semicolons": ("items.csv", b"ITEM_ID;A\n", "{path} has no rows"),
    "csv latin-1": ("items.csv", b"ITEM_ID\ncaf\xe9\n", "{path} is not UTF-8 text: "),
    "csv latin-1 header": ("items.csv", b"caf\xe9\n1\n", "{path} is not UTF-8 text: "),
    "csv row beyond a block": ("items.csv", b'ITEM_ID\n"' + b"x" * 3_000_000 + b'"\n', "{path}:2: field larger than"),
    "gzip, but none": ("items.csv.gz", b"ITEM_ID\n1\n", "cannot read {path}: Not a gzipped file"),
    "gzip cut short": ("items.csv.gz", GOOD_GZIP[:2000], "{path} is cut short: "),
    "gzip flipped": ("items.csv.gz", GOOD_GZIP[:1000] + b"\xff\xff\xff" + GOOD_GZIP[1003:], "cannot read {path}: "),
    "parquet empty": ("items.parquet", b"", "cannot read {path}: Parquet file size is 0 bytes"),
    "parquet damaged": ("items.parquet", b"PAR1" + b"x" * 99, "cannot read {path}: Parquet magic bytes not found"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILE_FAULTS.values(), ids=FILE_FAULTS.keys())
def test_a_fault_of_a_file_names_the_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataFileError, match=f"^{re.escape(message.format(path=path))}") as raised:
        read_items(path)
    assert "\n" not in str(raised.value), "one line"


def test_every_damaged_parquet_file_is_a_data_file_error(tmp_path: Path) -> None:
    good = write_parquet(tmp_path, {"ITEM_ID": [f"item{n}" for n in range(300)]}).read_bytes()
    refused = 0
    for at in range(0, len(good), 61):
        path = write(tmp_path, good[:at], "cut.parquet")
        with pytest.raises(DataFileError, match=re.escape(str(path))):
            read_items(path)
        flipped = bytearray(good)
        flipped[at] ^= 0x55
        try:
            read_items(write(tmp_path, bytes(flipped), "flipped.parquet"))
        except DataFileError as error:
            refused += 1
            assert "\n" not in str(error), "one line"
    assert refused


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(junk=b",\xc2\x80\xc2", prefix=b"ITEM_ID,A\n1,2\n")  # a column that is not read is not UTF-8
@given(junk=st.binary(max_size=300), prefix=st.sampled_from([b"", b"ITEM_ID\n", b"ITEM_ID,A\n1,2\n", b"PAR1"]))
def test_junk_gives_items_or_a_data_file_error_and_nothing_else(tmp_path: Path, junk: bytes, prefix: bytes) -> None:
    for name in ("junk.csv", "junk.csv.gz", "junk.parquet"):
        path = write(tmp_path, prefix + junk, name)
        try:
            rows = read_items(path)
        except DataFileError as error:
            assert str(path) in str(error)
        else:
            assert all(rows.item_ids)


FOLDER_FAULTS: dict[str, tuple[dict[str, dict[str, list[Any]]], str]] = {
    "no files": ({}, "{path} has no data files; expected .parquet, .csv"),
    "both kinds": ({"1.csv": {"ITEM_ID": [1]}, "2.parquet": {"ITEM_ID": [2]}}, "{path} has both CSV and Parquet files"),
    "a column missing": (
        {"1.csv": {"ITEM_ID": [1]}, "2.csv": {"ID": [2]}},
        "{path}/2.csv:1: no known format in 'ID'; expected a header with ITEM_ID ",
    ),
    "types at odds": (
        {"1.parquet": {"ITEM_ID": [1]}, "2.parquet": {"ITEM_ID": ["a"]}},
        "the files in {path} do not fit together: ",
    ),
    "a row": ({"1.csv": {"ITEM_ID": [1, 2]}, "2.csv": {"ITEM_ID": [3, ""]}}, "{path}/2.csv:3: ITEM_ID is empty; "),
    "an item twice": (
        {"1.parquet": {"ITEM_ID": [1, 2]}, "2.parquet": {"ITEM_ID": [3, 2]}},
        "{path}/2.parquet, row 1: ITEM_ID '2' is already at {path}/1.parquet, row 1; ",
    ),
}


@pytest.mark.parametrize(("files", "message"), FOLDER_FAULTS.values(), ids=FOLDER_FAULTS.keys())
def test_a_fault_in_a_folder(tmp_path: Path, files: dict[str, dict[str, list[Any]]], message: str) -> None:
    for name, columns in files.items():
        if name.endswith("csv"):
            write(tmp_path, to_csv(columns), name)
        else:
            write_parquet(tmp_path, columns, name)
    with pytest.raises(DataFileError, match=f"^{re.escape(message.format(path=tmp_path))}"):
        read_items(tmp_path)


def test_a_column_that_only_some_files_have(tmp_path: Path) -> None:
    write(tmp_path, "USER_ID,ITEM_ID,TIMESTAMP\nu,i,1\n", "1.csv")
    path = write(tmp_path, "USER_ID,ITEM_ID\nu,i\n", "2.csv")
    message = f"{path} has the columns USER_ID, ITEM_ID, but USER_ID, ITEM_ID, TIMESTAMP in {tmp_path / '1.csv'}; give"
    with pytest.raises(DataFileError, match=re.escape(message)):
        read_interactions(tmp_path, timestamp="optional")


FRAME_FAULTS: dict[str, tuple[Any, str]] = {
    "a list": ([1], "cannot read the frame: a path, a pandas, polars or pyarrow table or a dict is needed, not list"),
    "nothing": (None, "cannot read the frame: a path, .* not NoneType"),
    "lazy": (pl.LazyFrame({"ITEM_ID": [1]}), "cannot read the frame: a path, .* not LazyFrame"),
    "a series": (pd.Series([1]), "cannot read the frame: .*"),
    "mixed": ({"ITEM_ID": [1, "a"]}, "cannot read ITEM_ID: Could not convert 'a'"),
    "mixed, pandas": (pd.DataFrame({"ITEM_ID": [1, "a"]}), "cannot read ITEM_ID: "),
    "beyond 64 bits": ({"ITEM_ID": [2**64]}, "cannot read ITEM_ID: Python int too large"),
    "half a surrogate pair": ({"ITEM_ID": ["\ud800"]}, "cannot read ITEM_ID: 'utf-8' codec can't encode"),
    "not UTF-8": (
        pa.table({"ITEM_ID": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())}),
        "the frame: ITEM_ID is not UTF-8 text: ",
    ),
    "a dataset of another kind": (InteractionsDataset({}), "an InteractionsDataset was given where an ItemsDataset is"),
}


@pytest.mark.parametrize(("frame", "message"), FRAME_FAULTS.values(), ids=FRAME_FAULTS.keys())
def test_a_fault_of_a_frame(frame: Any, message: str) -> None:
    with pytest.raises(DataFileError, match=f"^{message}"):
        read_items(frame)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataFileError, match=r"^cannot read the frame: Column 1 named ITEM_ID expected length 2"):
        read_interactions({"USER_ID": [1, 2], "ITEM_ID": [1]}, timestamp="optional")


# --- schemas


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


@pytest.mark.parametrize(("kind", "exact"), [("str", 2**53 + 1), ("int", 2**53 + 1), ("float", 2**53)])
def test_timestamps_of_every_declared_type(tmp_path: Path, kind: str, exact: int) -> None:
    path = schema(tmp_path, *IDS_AS_TEXT, f"TIMESTAMP, type: {kind}")
    columns: dict[str, list[Any]] = {"USER_ID": [1], "ITEM_ID": [2]}
    for times, expected in (
        ([exact], exact),
        ([NOON], NOON_MS),
        ([float(2**53)], 2**53),
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
    "time is rounded": ("TIMESTAMP, type: float", [1, 2**53 + 1], f"row 1: TIMESTAMP {2**53 + 1} is not float, as the"),
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
