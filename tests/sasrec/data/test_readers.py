"""Stream events from files of every format, and from damaged files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasrec.data import checks
from sasrec.data.formats import Columns, DataFileError
from sasrec.data.readers import Event, read_events

TIME_MS = 1_700_000_000_000
EXPECTED = [Event("196", "242", TIME_MS), Event("186", "302", TIME_MS + 5000), Event("196", "51", TIME_MS + 1000)]
ROWS = [(event.user_id, event.item_id, event.timestamp_ms or 0) for event in EXPECTED]


def table(header: str, delimiter: str, order: Callable[[str, str, int], list[object]]) -> str:
    return "".join([header + "\n", *(delimiter.join(map(str, order(*row))) + "\n" for row in ROWS)])


FORMATS = {
    "csv": table("user_id,item_id,timestamp", ",", lambda u, i, t: [u, i, t]),
    "csv, CRLF": table("user_id,item_id,timestamp", ",", lambda u, i, t: [u, i, t]).replace("\n", "\r\n"),
    "csv, other column order": table("timestamp,item_id,user_id", ",", lambda u, i, t: [t, i, u]),
    "csv, more columns": table("shop,user_id,price,item_id,timestamp", ",", lambda u, i, t: ["x", u, 9.5, i, t]),
    "csv, capitals and spaces": table("User_ID, Item_ID, Timestamp", ",", lambda u, i, t: [u, i, t]),
    "csv, quoted": table('"user_id","item_id","timestamp"', ",", lambda u, i, t: [f'"{u}"', f'"{i}"', t]),
    "tsv": table("user_id\titem_id\ttimestamp", "\t", lambda u, i, t: [u, i, t]),
    "semicolon": table("user_id;item_id;timestamp", ";", lambda u, i, t: [u, i, t]),
    "jsonl": "".join(json.dumps({"user_id": u, "item_id": i, "timestamp": t}) + "\n" for u, i, t in ROWS),
    "jsonl, integers": "".join(
        json.dumps({"timestamp": t, "item_id": int(i), "more": [], "user_id": int(u)}) + "\n" for u, i, t in ROWS
    ),
    "MovieLens ratings.dat": "".join(f"{u}::{i}::3::{t // 1000}\n" for u, i, t in ROWS),
    "MovieLens u.data": "".join(f"{u}\t{i}\t3\t{t // 1000}\n" for u, i, t in ROWS),
    "MovieLens ratings.csv": table("userId,movieId,rating,timestamp", ",", lambda u, i, t: [u, i, 3.5, t // 1000]),
    "RecBole .inter": table(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float", "\t", lambda u, i, t: [u, i, 3, t // 1000]
    ),
    "blank lines between": table("user_id,item_id,timestamp", ",", lambda u, i, t: [u, i, t]).replace("\n", "\n\n"),
    "no newline at the end": table("user_id,item_id,timestamp", ",", lambda u, i, t: [u, i, t]).rstrip("\n"),
}


def write(folder: Path, content: str | bytes, name: str = "clicks.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", FORMATS)
def test_all_formats_give_equal_events_in_file_order(tmp_path: Path, kind: str, zipped: bool, bom: bytes) -> None:
    data = bom + FORMATS[kind].encode()
    name = "u.data" if kind == "MovieLens u.data" else "clicks"
    path = write(tmp_path, gzip.compress(data) if zipped else data, f"{name}.gz" if zipped else name)
    assert list(read_events(path)) == EXPECTED


@pytest.mark.parametrize("kind", FORMATS)
def test_blank_lines_before_the_first_row_are_skipped(tmp_path: Path, kind: str) -> None:
    name = "u.data" if kind == "MovieLens u.data" else "clicks.csv"
    assert list(read_events(write(tmp_path, "\n  \r\n" + FORMATS[kind], name))) == EXPECTED


RATED = {
    "csv": "user_id,rating,item_id,timestamp\nu,4,i,1\nu,2.5,j,2\n",
    "csv, outcome": "user_id,item_id,timestamp,Outcome\nu,i,1,4\nu,j,2,2.5\n",
    "csv, both": "user_id,item_id,timestamp,Outcome,rating\nu,i,1,4,1\nu,j,2,,2.5\n",
    "jsonl": '{"user_id": "u", "item_id": "i", "rating": 4, "timestamp": 1}\n'
    '{"user_id": "u", "item_id": "j", "outcome": "2.5", "timestamp": 1}\n',
    "ratings.dat": "u::i::4::1\nu::j::2.5::2\n",
    "RecBole": "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4\t1\nu\tj\t2.5\t2\n",
}


@pytest.mark.parametrize("content", RATED.values(), ids=RATED.keys())
def test_outcomes_are_read_on_request(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert [event.outcome for event in read_events(path, outcomes=True)] == [4.0, 2.5]
    assert [event.outcome for event in read_events(path)] == [None, None]


@pytest.mark.parametrize("value", ["", "good", "nan", "inf"])
def test_a_row_without_a_usable_outcome_is_named_when_outcomes_are_requested(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"user_id,item_id,timestamp,rating\nu,i,1,4\nu,j,2,{value}\n")
    assert len(list(read_events(path))) == 2
    with pytest.raises(DataFileError, match=r"clicks\.csv:3: rating ('good' is text|(nan|inf) is not finite|is empty)"):
        list(read_events(path, outcomes=True))


UNTIMED = Columns(in_file_order=True)


@pytest.mark.parametrize("content", ["user_id,item_id,at\nu,a,1\n", '{"user_id": "u", "item_id": "a", "at": 1}\n'])
def test_the_order_of_a_file_is_the_time_only_on_request(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataFileError, match=r":1: (column|field) TIMESTAMP is missing; .* 'at'; .*--in-file-order"):
        list(read_events(path))
    assert list(read_events(path, UNTIMED)) == [Event("u", "a", None)]
    assert list(read_events(path, Columns(timestamp="at"))) == [Event("u", "a", 1)]


def test_an_empty_time_is_named(tmp_path: Path) -> None:
    for content in (CSV + "u,a,1\nu,a,\n", JSON + '{"user_id": "u", "item_id": "a", "timestamp": null}\n'):
        path = write(tmp_path, content)
        with pytest.raises(
            DataFileError, match=r"clicks.csv:\d: timestamp is empty; give integers or datetimes, or remo"
        ):
            list(read_events(path))
        assert list(read_events(path, UNTIMED))[-1] == Event("u", "a", None)


def test_a_given_unit_overrides_the_unit_of_the_format(tmp_path: Path) -> None:
    in_seconds = write(tmp_path, "user_id,item_id,timestamp\nu,a,1700000000\n", "a.csv")
    movielens = write(tmp_path, "1::2::3::1700000000123\n", "b.dat")
    assert next(read_events(in_seconds, Columns(timestamp_unit="s"))).timestamp_ms == TIME_MS
    assert next(read_events(movielens, Columns(timestamp_unit="ms"))).timestamp_ms == TIME_MS + 123


@pytest.mark.parametrize(
    ("written", "expected_ms"),
    [("1.001", 1001), ("1700000000.123", TIME_MS + 123), ("1.7e9", TIME_MS), ("-1", -1000), ("0", 0)],
)
def test_fractions_of_seconds_survive(tmp_path: Path, written: str, expected_ms: int) -> None:
    path = write(tmp_path, f"user_id,item_id,timestamp\nu,a,{written}\n")
    assert next(read_events(path, Columns(timestamp_unit="s"))).timestamp_ms == expected_ms


def test_reading_reports_the_bytes_read(tmp_path: Path) -> None:
    rows = 300_000
    body = "user_id,item_id\n" + "".join(f"user{n},item{n}\n" for n in range(rows))
    for path in (write(tmp_path, body), write(tmp_path, gzip.compress(body.encode()), "clicks.csv.gz")):
        positions: list[int] = []
        assert len(list(read_events(path, UNTIMED, positions.append))) == rows
        assert positions == sorted(positions)
        assert len(positions) > 2
        assert positions[-1] == path.stat().st_size


# --- round trips


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
TRICKY = st.text(',;"\n\r\t :{}é\u2028日', min_size=1, max_size=6)
ID = (FIELD | TRICKY).filter(lambda text: not re.search(checks.FLOAT, text))
IDS = st.lists(st.tuples(ID, ID), min_size=1, max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=IDS, delimiter=st.sampled_from(",;\t"))
def test_any_ids_survive_a_csv_file(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([("user_id", "item_id", "timestamp"), *((user, item, TIME_MS) for user, item in rows)])
    path = write(tmp_path, text.getvalue())
    assert list(read_events(path)) == [Event(user, item, TIME_MS) for user, item in rows]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=IDS, ascii_only=st.booleans())
def test_any_ids_survive_a_json_lines_file(tmp_path: Path, rows: list[tuple[str, str]], ascii_only: bool) -> None:
    objects = [{"user_id": user, "item_id": item, "timestamp": TIME_MS} for user, item in rows]
    content = "".join(json.dumps(one, ensure_ascii=ascii_only) + "\n" for one in objects)
    assert list(read_events(write(tmp_path, content))) == [Event(user, item, TIME_MS) for user, item in rows]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=IDS)
def test_an_error_names_the_line_on_which_its_row_begins(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([("user_id", "item_id", "timestamp"), *((user, item, TIME_MS) for user, item in rows)])
    lines_before = len(io.StringIO(text.getvalue(), newline="").readlines())  # counted as an editor counts
    writer.writerow(("u", "two\nlines", "yesterday"))
    path = write(tmp_path, text.getvalue())
    with pytest.raises(DataFileError, match=f"clicks.csv:{lines_before + 1}: timestamp 'yesterday' is neither"):
        list(read_events(path))


# --- damage


CSV = "user_id,item_id,timestamp\n"
JSON = '{"user_id": "u", "item_id": "a", "timestamp": 1700000000000}\n'
DAT = "1::2::3::1700000000\n"
DAMAGED = {
    "no item column": ("user_id,timestamp\nu,1\n", ":1: column ITEM_ID is missing; the columns are 'user_id', 'tim"),
    "no user column": ("item_id,timestamp\na,1\n", ":1: column USER_ID is missing; the columns are 'item_id', 'tim"),
    "no header": ("u,a,1700000000000\n", ":1: no known format"),
    "prose": ("once upon a time\n", ":1: no known format"),
    "csv, field missing": (CSV + "u,a,1\nu,a\n", ":3: 3 columns expected, got 2"),
    "csv, field too many": (CSV + "u,a,1\n\n\nu,a,1,9\n", ":5: 3 columns expected, got 4"),
    "csv, after a row of two lines": (CSV + 'u,"a\nb",1\nu\n', ":4: 3 columns expected, got 1"),
    "csv, a quote left open": (CSV + 'u,a,1\nu,"b,2\nu,c,3\nu,d,4\n', ":3: unexpected end of data"),
    "csv, text behind a quote": (CSV + 'u,a,1\nu,"b"c,2\n', ":3: ',' expected after '\"'"),
    "csv, a field without end": (CSV + 'u,a,1\nu,"' + "b" * 200_000 + '",2\n', ":3: field larger than field limit"),
    "csv, user empty": (CSV + "u,a,1\n,a,1\n", ":3: user_id is empty"),
    "csv, item empty": (CSV + "u,,1\n", ":2: item_id is empty"),
    "csv, word for time": (CSV + "u,a,noon\n", ":2: timestamp 'noon' is neither an integer nor an ISO-8601 time"),
    "csv, nan for time": (CSV + "u,a,nan\n", ":2: timestamp 'nan' is neither"),
    "csv, infinite time": (CSV + "u,a,1e999\n", ":2: timestamp '1e999' is neither"),
    "csv, time beyond 64 bit": (CSV + "u,a,9223372036854775808\n", ":2: timestamp '9223372036854775808' is neither"),
    "csv, time of 5000 digits": (CSV + "u,a," + "9" * 5000 + "\n", ":2: timestamp '999"),
    "json, broken": (JSON + '{"user_id": \n', ":2: not JSON"),
    "json, nested without end": ('{"user_id": ' + "[" * 100_000 + "\n", ":1: not JSON"),
    "json, a list": (JSON + "\n[1]\n", ":3: a JSON object is expected, not list"),
    "json, user missing": (
        JSON + '{"item_id": "a", "uid": 1}\n',
        ":2: field USER_ID is missing; the fields are 'item_id', 'uid'; if one of them is meant, name it with --user-",
    ),
    "json, item empty": ('{"user_id": 0, "item_id": "", "timestamp": 1}\n', ":1: item_id is empty"),
    "json, item missing": ('{"user_id": 7}\n', ":1: field ITEM_ID is missing; the fields are 'user_id'; "),
    "json, time missing": (JSON + '{"user_id": 7, "item_id": 1}\n', ":2: field TIMESTAMP is missing; the fields are "),
    "json, id a fraction": (
        '{"user_id": "u", "item_id": 1.5}\n',
        ":1: item_id must be a string or an integer, not 1.5",
    ),
    "json, id null": ('{"user_id": null, "item_id": "a"}\n', ":1: user_id is null; give every row its id"),
    "json, id true": ('{"user_id": "u", "item_id": true}\n', ":1: item_id must be a string or an integer, not True"),
    "json, half a surrogate pair": (
        JSON + '{"user_id": "u", "item_id": "\\ud800", "timestamp": 1}\n',
        ":2: item_id '\\ud800' holds half of a surrogate pair",
    ),
    "json, time a list": ('{"user_id": "u", "item_id": "a", "timestamp": [1]}\n', ":1: timestamp '[1]' is neither"),
    "json, time true": ('{"user_id": "u", "item_id": "a", "timestamp": true}\n', ":1: timestamp 'True' is neither"),
    "dat, field missing": (DAT + "1::2::3\n", ":2: 4 fields between '::' expected, got 3"),
    "dat, time": (DAT + "1::2::3::x\n", ":2: timestamp 'x'"),
    "dat, item empty": (DAT + DAT + "1::::3::4\n", ":3: item_id is empty"),
    "empty": ("", " is empty"),
    "blank": ("   \n\n", " is empty"),
    "json, broken behind blank lines": ("\n \n" + JSON + "{\n", ":4: not JSON"),
    "csv, damaged behind blank lines": ("\n\n" + CSV + "u,a,1\nu\n", ":5: 3 columns expected, got 1"),
    "only a header": (CSV, " has no rows"),
    "only a header and blank lines": (CSV + "\n\n", " has no rows"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_row_is_reported_with_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataFileError, match=re.escape(f"{path}{message}")) as raised:
        list(read_events(path))
    assert "\n" not in str(raised.value), "one line"


def test_the_rows_before_the_damage_are_still_read(tmp_path: Path) -> None:
    rows = read_events(write(tmp_path, FORMATS["csv"] + "broken\n"))
    assert [next(rows) for _ in EXPECTED] == EXPECTED
    with pytest.raises(DataFileError, match=":5:"):
        next(rows)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"cannot read .*nowhere\.csv: No such file"):
        list(read_events(tmp_path / "nowhere.csv"))
    with pytest.raises(DataFileError, match=f"{tmp_path} has no data files; expected .parquet, .csv, "):
        list(read_events(tmp_path))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, CSV.encode() + "u,café,1\n".encode("latin-1"))
    with pytest.raises(DataFileError, match=r"clicks\.csv:2: item_id 'caf\\udce9' is not UTF-8 text; save the file as"):
        list(read_events(path))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=300), prefix=st.sampled_from([b"", CSV.encode(), JSON.encode(), DAT.encode(), b"{"]))
def test_binary_junk_gives_events_or_a_data_file_error_and_nothing_else(
    tmp_path: Path, junk: bytes, prefix: bytes
) -> None:
    path = write(tmp_path, prefix + junk)
    try:
        found = list(read_events(path))
    except DataFileError as error:
        assert str(path) in str(error)
    else:
        assert all(event.user_id and event.item_id for event in found)


def test_every_broken_gzip_is_a_data_file_error(tmp_path: Path) -> None:
    body = CSV + "".join(f"user{n % 7},item{n * n % 31},{TIME_MS + n}\n" for n in range(400))
    good = gzip.compress(body.encode(), mtime=0)
    kinds = set()
    for at in range(0, len(good), 7):
        flipped = bytearray(good)
        flipped[at] ^= 0x55
        for broken in (bytes(flipped), good[:at]):
            path = write(tmp_path, broken, "clicks.csv.gz")
            try:
                events = list(read_events(path))
            except DataFileError as error:
                kinds.add(type(error.__cause__))
                assert str(path) in str(error)
            else:  # a flip in the gzip header, for example in its time, changes no row
                assert [event.timestamp_ms for event in events] == [TIME_MS + n for n in range(400)]
    assert {EOFError, gzip.BadGzipFile, zlib.error} <= kinds


def test_a_gz_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataFileError, match=r"clicks\.csv\.gz is named \.gz, but is no gzip file: it is text; rename it"
    ):
        list(read_events(write(tmp_path, FORMATS["csv"], "clicks.csv.gz")))
