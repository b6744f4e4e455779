"""Read data sets: all sources give equal rows in their order."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sasrec.data import checks
from sasrec.data.datasets import (
    InteractionRows,
    InteractionsDataset,
    ItemsDataset,
    read_interactions,
    read_items,
)

from support.interactions import (
    NOON,
    NOON_MS,
    ROWS,
    SOURCES,
    TIME_MS,
    Source,
    string_views,
    write,
    write_csv,
    write_parquet,
)


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


def test_a_reader_of_batches_gives_equal_rows() -> None:
    assert_rows(read_interactions(string_views(ROWS).to_reader(max_chunksize=3)))


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
ID = (FIELD | TRICKY).filter(lambda text: not re.search(checks.FLOAT, text))
PAIRS = st.lists(st.tuples(ID, ID), min_size=1, max_size=8)


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


EXACT = [10**14 - 1, 10**14 - 2, -(2**53) - 1, -(2**63), 10**11]


@pytest.mark.parametrize("source", sorted(SOURCES.keys() - {"dict of arrays"}))
def test_integer_timestamps_are_exact(tmp_path: Path, source: str) -> None:
    columns = {"USER_ID": ["a"] * 4, "ITEM_ID": [1] * 4, "OUTCOME": [1] * 4, "TIMESTAMP": EXACT[1:]}
    for times in (EXACT[:4], EXACT[1:]):
        rows = read_interactions(SOURCES[source](tmp_path, columns | {"TIMESTAMP": times}))
        assert rows.timestamps is not None
        assert rows.timestamps.tolist() == times


TIMES: dict[str, tuple[list[Any] | pa.Array, int]] = {
    "integer": ([5], 5),
    "small integer type": (pa.array([5], pa.uint8()), 5),
    "whole float": ([float(10**14 - 1)], 10**14 - 1),
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
    "digits": ([str(10**14 - 1)], 10**14 - 1),
    "digits, signed and zero-padded": (["-0012"], -12),
    "digits and .0": ([f"{10**14 - 1}.0"], 10**14 - 1),
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
@given(
    time=st.datetimes(
        max_value=datetime(5138, 1, 1), timezones=st.sampled_from([UTC, timezone(timedelta(hours=-9, minutes=-30))])
    )
)
def test_times_as_text_and_as_datetimes_are_equal(time: datetime) -> None:
    assume(time.year != 1970)  # datetimes of January 1970 are numbers in another unit
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
