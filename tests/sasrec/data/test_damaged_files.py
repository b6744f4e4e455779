"""Report damaged files, folders and frames by name and remedy."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sasrec.data.datasets import (
    InteractionsDataset,
    read_interactions,
    read_items,
)
from sasrec.data.formats import DataFileError

from support.interactions import (
    to_csv,
    write,
    write_parquet,
)

GOOD_GZIP = gzip.compress(b"ITEM_ID\n" + b"".join(b"%d\n" % (n * n) for n in range(5000)), mtime=0)
FILE_FAULTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("items.csv", None, "cannot read {path}: No such file or directory"),
    "missing parquet": ("items.parquet", None, "cannot read {path}: No such file or directory"),
    "unknown kind": ("items.xlsx", b"x", "{path}:1: no known format in 'x'; expected a header with ITEM_ID (CSV, TSV"),
    "csv empty": ("items.csv", b"", "{path} is empty; expected a header with ITEM_ID"),
    "csv blank": ("items.csv", b"\n\n", "{path} is empty; expected a header with ITEM_ID"),
    "csv no header": ("items.csv", b"1\n2\n", "{path}:1: no known format in '1'; expected a header with ITEM_ID "),
    "csv semicolons": ("items.csv", b"ITEM_ID;A\n", "{path} has no rows"),
    "csv latin-1": ("items.csv", b"ITEM_ID\ncaf\xe9\n", "{path}:2: ITEM_ID 'caf\\udce9' is not UTF-8 text; save the"),
    "csv latin-1 header": ("items.csv", b"caf\xe9\n1\n", "{path}:1: no known format in 'caf\\udce9'"),
    "csv row beyond a block": ("items.csv", b'ITEM_ID\n"' + b"x" * 3_000_000 + b'"\n', "{path}:2: field larger than"),
    "gzip, but none": ("items.csv.gz", b"ITEM_ID\n1\n", "{path} is named .gz, but is no gzip file: it is text"),
    "gzip cut short": ("items.csv.gz", GOOD_GZIP[:2000], "{path} is cut short: "),
    "gzip flipped": ("items.csv.gz", GOOD_GZIP[:1000] + b"\xff\xff\xff" + GOOD_GZIP[1003:], "cannot read {path}: "),
    "parquet empty": ("items.parquet", b"", "{path} is empty; fetch it again"),
    "gzip empty": ("items.csv.gz", b"", "{path} is empty; fetch it again"),
    "text named parquet": (
        "items.parquet",
        b"ITEM_ID\n1\n",
        "{path} is named .parquet, but is no Parquet file: it is tex",
    ),
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
    "both kinds": (
        {"1.csv": {"ITEM_ID": [1]}, "2.parquet": {"ITEM_ID": [2]}},
        "{path} has files of several kinds (1.csv and 2.parquet)",
    ),
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
