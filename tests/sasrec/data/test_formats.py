"""Read every format through both entries, streams of events and checked columns, with default and given columns."""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from sasrec.data.datasets import InteractionsDataset, ItemsDataset, read_interactions, read_items
from sasrec.data.formats import DEFAULT_COLUMNS, Columns, DataFileError
from sasrec.data.options import add_column_options, columns_from
from sasrec.data.readers import Event, read_events

from support.interactions import TIME_MS, write, write_parquet

Rows = list[tuple[str, str, int | None]]
ROWS: Rows = [("196", "242", TIME_MS), ("186", "302", TIME_MS + 5000), ("196", "51", TIME_MS + 1000)]


def table(header: str, separator: str, order: Callable[[str, str, int], list[object]]) -> str:
    lines = [separator.join(map(str, order(user, item, time or 0))) for user, item, time in ROWS]
    return "\n".join([*([header] if header else []), *lines]) + "\n"


def objects(user: str, item: str, time: str) -> str:
    return "".join(json.dumps({time: t, item: i, user: u, "more": [1]}) + "\n" for u, i, t in ROWS)


FORMATS = {
    "csv": table("user_id,item_id,timestamp", ",", lambda u, i, t: [u, i, t]),
    "csv, capitals": table("USER_ID,ITEM_ID,TIMESTAMP", ",", lambda u, i, t: [u, i, t]),
    "csv, mixed case, spaces": table("Item_Id, User_ID ,x, Timestamp", ",", lambda u, i, t: [i, u, '"a,b"', t]),
    "csv, blank lines first": "\n  \n" + table("user_id,item_id,timestamp", ",", lambda u, i, t: [u, i, t]),
    "csv, a name of two lines": table('"a\nb",user_id,item_id,timestamp', ",", lambda u, i, t: [1, u, i, t]),
    "csv, more separators in names": table(
        'user_id,item_id,timestamp,"a;b;c;d;e"', ",", lambda u, i, t: [u, i, t, '"1;2"']
    ),
    "csv, a name with a colon": table("user_id,item_id,timestamp,price:usd", ",", lambda u, i, t: [u, i, t, 5]),
    "tsv": table("user_id\titem_id\ttimestamp", "\t", lambda u, i, t: [u, i, t]),
    "tsv, a column without a name": table("\tuser_id\titem_id\ttimestamp", "\t", lambda u, i, t: [0, u, i, t]),
    "semicolons": table("user_id;item_id;timestamp", ";", lambda u, i, t: [u, i, t]),
    "double colons": table("user_id::item_id::timestamp", "::", lambda u, i, t: [u, i, t]),
    "jsonl": objects("user_id", "item_id", "timestamp"),
    "jsonl, capitals": objects("USER_ID", "ITEM_ID", "TIMESTAMP"),
    "MovieLens ratings.dat": table("", "::", lambda u, i, t: [u, i, 3, t // 1000]),
    "MovieLens u.data": table("", "\t", lambda u, i, t: [u, i, 3, t // 1000]),
    "MovieLens ratings.csv": table("userId,movieId,rating,timestamp", ",", lambda u, i, t: [u, i, 3.5, t // 1000]),
    "RecBole .inter": table(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float", "\t", lambda u, i, t: [u, i, 3, t / 1000]
    ),
}


MOVIELENS = Columns(format="movielens")
UNTIMED = Columns(in_file_order=True)


def streamed(path: Path, columns: Columns = DEFAULT_COLUMNS) -> Rows:
    return [(event.user_id, event.item_id, event.timestamp_ms) for event in read_events(path, columns)]


def checked(source: Any, columns: Columns = DEFAULT_COLUMNS) -> Rows:
    rows = read_interactions(InteractionsDataset(source, columns=columns), timestamp="optional")
    times = [None] * len(rows.user_ids) if rows.timestamps is None else rows.timestamps.tolist()
    return list(zip(rows.user_ids, rows.item_ids, times, strict=True))


@pytest.mark.parametrize("name", ["clicks.csv", "clicks.tsv", "clicks", "clicks.gz"])
@pytest.mark.parametrize("kind", FORMATS)
def test_both_entries_read_every_format_under_any_name(tmp_path: Path, kind: str, name: str) -> None:
    content = FORMATS[kind]
    path = write(tmp_path, gzip.compress(content.encode()) if name.endswith("gz") else content, name)
    columns = MOVIELENS if kind == "MovieLens u.data" else DEFAULT_COLUMNS
    assert streamed(path, columns) == ROWS
    assert checked(path, columns) == ROWS


@pytest.mark.parametrize("names", [("USER_ID", "ITEM_ID", "TIMESTAMP"), ("user_id", "item_id", "timestamp")])
def test_both_entries_read_parquet_and_folders(tmp_path: Path, names: tuple[str, str, str]) -> None:
    columns = dict(zip(names, map(list, zip(*ROWS, strict=True)), strict=True)) | {"more": [[1], [], [2]]}
    halves = [{name: values[:2] for name, values in columns.items()}, {k: v[2:] for k, v in columns.items()}]
    for at, half in enumerate(halves):
        write_parquet(tmp_path / "parquet", half, f"day={at}/part.parquet")
        pd.DataFrame(half).to_csv(write(tmp_path / "csv", "", f"{at}.csv"), index=False)
    for path in (write_parquet(tmp_path, columns), write_parquet(tmp_path, columns, "no-suffix")):
        assert streamed(path) == checked(path) == ROWS
    for folder in (tmp_path / "parquet", tmp_path / "csv"):
        assert streamed(folder) == checked(folder) == ROWS


@pytest.mark.parametrize("frame", [dict, pd.DataFrame, pl.DataFrame, pa.table])
def test_frames_may_have_names_in_any_case(frame: Any) -> None:
    users, items, times = map(list, zip(*ROWS, strict=True))
    assert checked(frame({"user_id": users, "Item_ID": items, "timestamp": times})) == ROWS
    assert checked(frame({"USER_ID": users, "user_id": items, "ITEM_ID": items, "TIMESTAMP": times})) == ROWS
    given = Columns(user="who", item="what", timestamp="when", timestamp_unit="s")
    assert checked(frame({"who": users, "what": items, "when": [t // 1000 for t in times]}), given) == ROWS
    with pytest.raises(DataFileError, match=r"^the frame: column USER_ID is there 2 times; keep one of them$"):
        checked(frame({"User_Id": users, "user_ID": users, "ITEM_ID": items}))


GIVEN = Columns(user="session", item="sku", timestamp="at")
NAMED = {
    "csv": (table("at,session,sku,user_id", ",", lambda u, i, t: [t, u, i, "x"]), GIVEN),
    "tsv with types": (table("session:token\tsku:token\tat:float", "\t", lambda u, i, t: [u, i, t // 1000]), GIVEN),
    "jsonl": (objects("session", "sku", "at"), GIVEN),
    "pipes": (
        table("session|sku|at", "|", lambda u, i, t: [u, i, t]),
        Columns(user="session", item="sku", timestamp="at", separator="|"),
    ),
    "broken bars": (
        table("user_id¦item_id¦timestamp", "¦", lambda u, i, t: [u, i, t]),
        Columns(separator="¦"),
    ),
    "two characters": (
        table("user_id||item_id||timestamp", "||", lambda u, i, t: [u, i, t]),
        Columns(separator="||"),
    ),
    "seconds": (
        table("user_id,item_id,timestamp", ",", lambda u, i, t: [u, i, f"{t / 1000:.3f}"]),
        Columns(timestamp_unit="s"),
    ),
    "milliseconds in ratings.dat": (
        table("", "::", lambda u, i, t: [u, i, 3, t]),
        Columns(timestamp_unit="ms", separator="::"),
    ),
}


@pytest.mark.parametrize(("content", "columns"), NAMED.values(), ids=NAMED.keys())
def test_both_entries_take_given_columns(tmp_path: Path, content: str, columns: Columns) -> None:
    path = write(tmp_path, content)
    assert streamed(path, columns) == ROWS
    assert checked(path, columns) == ROWS


def test_parquet_takes_given_columns(tmp_path: Path) -> None:
    users, items, times = map(list, zip(*ROWS, strict=True))
    path = write_parquet(tmp_path, {"session": users, "sku": items, "at": [time / 1000 for time in times]})
    columns = Columns(user="session", item="sku", timestamp="at", timestamp_unit="s")
    assert streamed(path, columns) == checked(path, columns) == ROWS
    dated = write_parquet(
        tmp_path, {"USER_ID": ["u"], "ITEM_ID": [7], "TIMESTAMP": [datetime(2024, 1, 31, tzinfo=UTC)]}
    )
    assert streamed(dated) == checked(dated) == [("u", "7", 1_706_659_200_000)]


OTHER_NAMES = "session,item_id,at\nu,a,1\n"
WRONG: dict[str, tuple[str, Columns, str]] = {
    "default missing": (
        OTHER_NAMES,
        Columns(),
        ":1: column USER_ID is missing; the columns are 'session', 'item_id', 'at'; if one of them is meant, "
        "name it with --user-column or Columns(user=...)",
    ),
    "given missing": (
        OTHER_NAMES,
        Columns(user="sessions"),
        ":1: column sessions is missing; the columns are 'session', 'item_id', 'at'; correct --user-column or",
    ),
    "given column of times missing": (
        "user_id,item_id\nu,a\n",
        Columns(timestamp="at"),
        ":1: column at is missing; the columns are 'user_id', 'item_id'; correct --timestamp-column or",
    ),
    "given names, none there": (
        "a,b\nu,a\n",
        Columns(user="x", item="y"),
        ":1: column x is missing; the columns are 'a', 'b'",
    ),
    "another separator": (
        "user_id,item_id\nu,a\n",
        Columns(separator="|"),
        ":1: column USER_ID is missing; the columns are 'user_id,item_id'; ",
    ),
    "jsonl": (
        '{"user_id": "u", "item_id": "a"}\n',
        Columns(timestamp="at"),
        ":1: field at is missing; the fields are 'user_id', 'item_id'; correct --timestamp-column or",
    ),
    "twice": ("user_id,item_id,user_id\nu,a,v\n", Columns(), ":1: column USER_ID is there 2 times; keep one of them"),
    "not known": (
        "once upon a time\n",
        Columns(),
        ":1: no known format in 'once upon a time'; expected a header with ",
    ),
    "row too long": ("user_id::item_id::timestamp\nu::a::1\nu::a::1::b\n", Columns(), ":3: 3 fields between '::' exp"),
    "own name in errors": (
        "User_ID,item_id,timestamp\nu,a,1\n,a,1\n",
        Columns(),
        ":3: User_ID is empty; give every row ",
    ),
    "given name in errors": (
        "s,item_id,timestamp\nu,a,1\n,a,1\n",
        Columns(user="s"),
        ":3: s is empty; give every row ",
    ),
}


@pytest.mark.parametrize(("content", "columns", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("read", [streamed, checked])
def test_both_entries_name_file_line_and_remedy(
    tmp_path: Path, content: str, columns: Columns, message: str, read: Callable[[Path, Columns], Rows]
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataFileError, match=f"^{re.escape(f'{path}{message}')}") as raised:
        read(path, columns)
    assert "\n" not in str(raised.value), "one line"


def test_a_damaged_row_of_any_format_is_named_by_its_line(tmp_path: Path) -> None:
    for content in ("1::2::3::978300760\n\n1::3::3::noon\n", "1\t2\t3\t978300760\n\n1\t3\t3\tnoon\n"):
        path = write(tmp_path, content, "ratings.dat")
        for read in (streamed, checked):
            with pytest.raises(DataFileError, match=re.escape(f"{path}:3: timestamp 'noon' is neither")):
                read(path, MOVIELENS)
    path = write(
        tmp_path, '{"user_id": 1, "item_id": 2, "timestamp": 1}\n\n{"user_id": 1, "item_id": "", "timestamp": 1}\n'
    )
    for read in (streamed, checked):
        with pytest.raises(DataFileError, match=re.escape(f"{path}:3: item_id is empty")):
            read(path)


def test_damaged_parquet_rows_are_named_by_their_number_in_the_file(tmp_path: Path) -> None:
    rows = 70_000  # more than one batch
    columns = {"user_id": ["u"] * rows, "item_id": [*["i"] * (rows - 1), ""], "timestamp": [1] * rows}
    path = write_parquet(tmp_path, columns)
    for read in (streamed, checked):
        with pytest.raises(DataFileError, match=re.escape(f"{path}, row {rows - 1}: item_id is empty; give every row")):
            read(path)


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    none = pa.array([], pa.string())
    path = write_parquet(tmp_path, {"user_id": none, "item_id": none, "timestamp": none})
    for read in (streamed, checked):
        with pytest.raises(DataFileError, match=re.escape(f"{path} has no rows")):
            read(path)


@pytest.mark.parametrize("name", ["outcome", "RATING", "Rating"])
def test_outcomes_of_parquet_files_are_streamed_on_request(tmp_path: Path, name: str) -> None:
    path = write_parquet(tmp_path, {"user_id": ["u", "v"], "item_id": [1, 2], name: [4.0, 2.5]})
    assert list(read_events(path, UNTIMED, outcomes=True)) == [Event("u", "1", None, 4.0), Event("v", "2", None, 2.5)]
    assert [event.outcome for event in read_events(path, UNTIMED)] == [None, None]
    bare = write_parquet(tmp_path, {"user_id": ["u"], "item_id": [1]}, "bare.parquet")
    with pytest.raises(DataFileError, match=re.escape(f"{bare}: there is no column outcome or rating")):
        list(read_events(bare, UNTIMED, outcomes=True))


def test_a_given_outcome_column_is_the_outcome_of_both_entries(tmp_path: Path) -> None:
    path = write(tmp_path, "user_id,item_id,rating,stars\nu,a,1,4\nu,b,1,2.5\n")
    columns = Columns(outcome="stars", in_file_order=True)
    assert [event.outcome for event in read_events(path, columns, outcomes=True)] == [4.0, 2.5]
    rows = read_interactions(InteractionsDataset(path, columns=columns), timestamp="optional")
    assert rows.outcomes is not None
    assert rows.outcomes.tolist() == [4.0, 2.5]
    assert read_interactions(path, timestamp="optional").outcomes is None, "a rating is an outcome only if it is named"
    movielens = write(tmp_path, "1::2::4::978300760\n", "ratings.dat")
    named = read_interactions(InteractionsDataset(movielens, columns=Columns(outcome="rating")))
    assert named.outcomes is not None
    assert named.outcomes.tolist() == [4.0]


def test_json_lines_tell_integer_ids_from_text(tmp_path: Path) -> None:
    path = write(tmp_path, '{"item_id": 5, "user_id": "5"}\n{"item_id": 6, "user_id": "x"}\n')
    rows = read_interactions(path, timestamp="optional")
    assert (rows.user_ids, rows.item_ids) == (["5", "x"], ["5", "6"])
    assert (rows.integer_users, rows.integer_items) == (False, True)
    assert read_items(ItemsDataset(path)).item_ids == ["5", "6"]
    text = read_items(write(tmp_path, '{"ITEM_ID": "5"}\n{"ITEM_ID": "6"}\n'))
    assert (text.item_ids, text.integer_items) == (["5", "6"], False)


def test_fetched_timestamps_are_in_milliseconds(tmp_path: Path) -> None:
    path = write(tmp_path, FORMATS["MovieLens ratings.csv"])
    assert InteractionsDataset(path).fetch_data()["TIMESTAMP"].to_pylist() == [time for *_, time in ROWS]
    with pytest.raises(DataFileError, match=r"row 1: TIMESTAMP \d+ does not fit 64 bits in ms"):
        checked({"USER_ID": [1, 1], "ITEM_ID": [1, 1], "TIMESTAMP": [1, 2**62]}, Columns(timestamp_unit="s"))
    floats = {"USER_ID": [1], "ITEM_ID": [1], "TIMESTAMP": np.array([np.inf])}
    with pytest.raises(DataFileError, match=r"row 0: TIMESTAMP inf is not a time in seconds"):
        checked(floats, Columns(timestamp_unit="s"))


def test_files_of_a_folder_have_one_format(tmp_path: Path) -> None:
    write(tmp_path, FORMATS["csv"], "1.csv")
    path = write(tmp_path, FORMATS["MovieLens ratings.csv"].replace("timestamp", "TIMESTAMP"), "2.csv")
    message = f"{path} is MovieLens ratings.csv, but {tmp_path / '1.csv'} is CSV or TSV; give all files the same format"
    with pytest.raises(DataFileError, match=re.escape(message)):
        checked(tmp_path)


def test_reading_a_folder_or_parquet_reports_the_bytes_read(tmp_path: Path) -> None:
    rows, lines = 150_000, 100_000
    for name in ("1.parquet", "2.parquet"):
        write_parquet(tmp_path / "parquet", {"user_id": range(rows), "item_id": range(rows)}, name)
        body = "user_id,item_id\n" + "".join(f"{row},{row}\n" for row in range(lines))
        write(tmp_path / "csv", body, name.replace("parquet", "csv"))
    for folder in (tmp_path / "parquet", tmp_path / "csv"):
        positions: list[int] = []
        assert len(list(read_events(folder, UNTIMED, positions.append))) in (2 * rows, 2 * lines)
        assert positions == sorted(positions)
        assert len(positions) > 3
        assert positions[-1] == sum(file.stat().st_size for file in folder.iterdir())


def test_columns_refuse_a_bad_separator_and_a_bad_unit() -> None:
    for separator in ("", '"', "\n", "a\r"):
        with pytest.raises(ValueError, match=r"^separator=.*: must be characters other than quotes and line breaks$"):
            Columns(separator=separator)
    with pytest.raises(ValueError, match=r"^timestamp_unit='h': must be 's', 'ms', 'us' or 'ns'$"):
        Columns(timestamp_unit="h")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^timestamp='t' and in_file_order exclude each other"):
        Columns(timestamp="t", in_file_order=True)


def test_command_line_options_become_columns(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_column_options(parser)
    assert columns_from(parser.parse_args([])) == Columns()
    options = ["--user-column", "u", "--item-column", "i", "--timestamp-column", "t", "--outcome-column", "o"]
    options += [
        "--separator",
        r"\t",
        "--timestamp-unit",
        "us",
        "--event-type-column",
        "e",
        "--event-types",
        "view, buy",
    ]
    expected = Columns("u", "i", "t", "o", "\t", "us", "e", ("view", "buy"))
    assert columns_from(parser.parse_args(options)) == expected
    assert columns_from(parser.parse_args(["--no-header", "--in-file-order"])) == Columns(
        header=False, in_file_order=True
    )
    assert columns_from(parser.parse_args(["--fields", "a,b"])) == Columns(fields=("a", "b"))
    assert columns_from(parser.parse_args(["--format", "otto"])) == Columns(format="otto")
    with pytest.raises(DataFileError, match="exclude each other"):
        columns_from(parser.parse_args(["--in-file-order", "--timestamp-column", "t"]))
    for wrong in (["--separator", ""], ["--timestamp-unit", "h"], ["--format", "netflix"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        assert wrong[0] in capsys.readouterr().err
