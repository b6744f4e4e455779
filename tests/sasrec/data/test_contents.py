"""Read packed files, JSON arrays and nested objects; refuse what is neither text nor Parquet by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasrec.data.datasets import InteractionsDataset, read_interactions
from sasrec.data.formats import DEFAULT_COLUMNS, Columns, DataFileError
from sasrec.data.readers import Event, read_events

from support.interactions import write, write_parquet

CSV = "user_id,item_id,timestamp\nu,a,1\nv,b,2\n"
EVENTS = [Event("u", "a", 1), Event("v", "b", 2)]
ROWS = [{"user_id": "u", "item_id": "a", "timestamp": 1}, {"user_id": "v", "item_id": "b", "timestamp": 2}]


def zipped(files: dict[str, str | bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".zip": lambda data: zipped({"clicks": data, "__MACOSX/._clicks": b"x", "folder/": b""}),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def everywhere(path: Path, columns: Columns = DEFAULT_COLUMNS) -> list[Event]:
    """Return the events of a file, which streams and tables must read alike."""
    events = list(read_events(path, columns))
    rows = read_interactions(InteractionsDataset(path, columns=columns))
    assert rows.timestamps is not None
    assert [e[:3] for e in events] == [*zip(rows.user_ids, rows.item_ids, rows.timestamps.tolist(), strict=True)]
    return events


def refused(path: Path, columns: Columns = DEFAULT_COLUMNS) -> str:
    """Return the error of a file, which streams and tables must refuse alike."""
    errors = set()
    for read in (
        lambda: list(read_events(path, columns)),
        lambda: read_interactions(InteractionsDataset(path, columns=columns)),
    ):
        with pytest.raises(DataFileError, match=re.escape(str(path))) as raised:
            read()
        errors.add(str(raised.value))
    assert len(errors) == 1 and "\n" not in min(errors)
    return errors.pop().removeprefix(str(path))


@pytest.mark.parametrize("text", [CSV, "\n" + CSV.replace("\n", "\r\n"), "\ufeff" + CSV, json.dumps(ROWS)])
@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_are_read_by_their_bytes(tmp_path: Path, suffix: str, text: str) -> None:
    packed = PACK[suffix](text.encode())
    for name in (f"clicks.csv{suffix}", f"CLICKS{suffix.upper()}", "clicks"):
        assert everywhere(write(tmp_path, packed, name)) == EVENTS


@pytest.mark.parametrize("suffix", PACK)
def test_a_packed_file_that_is_cut_short_is_refused_after_its_good_rows(tmp_path: Path, suffix: str) -> None:
    body = "user_id,item_id,timestamp\n" + "".join(f"u{n * n % 977},i{n * n % 1009},{n}\n" for n in range(60_000))
    packed = PACK[suffix](body.encode())
    for size in (len(packed) - 1, len(packed) // 2, 20):
        path = write(tmp_path, packed[:size], f"clicks.csv{suffix}")
        found = []
        with pytest.raises(DataFileError, match=re.escape(str(path))):
            for event in read_events(path):
                found.append(event)
        assert [event.timestamp_ms for event in found] == list(range(len(found)))
        with pytest.raises(DataFileError, match=re.escape(str(path))):
            read_interactions(path)


@pytest.mark.parametrize("suffix", PACK)
def test_a_name_that_promises_another_packing_is_refused(tmp_path: Path, suffix: str) -> None:
    other = gzip.compress(CSV.encode()) if suffix != ".gz" else PACK[".zst"](CSV.encode())
    kind = "gzip" if suffix != ".gz" else "zstd"
    assert refused(write(tmp_path, CSV, f"x{suffix}")).startswith(f" is named {suffix}, but is no ")
    assert f": it is a {kind} file; rename it" in refused(write(tmp_path, other, f"x{suffix}"))
    assert refused(write(tmp_path, b"", f"x{suffix}")) == " is empty; fetch it again"


def test_a_zip_archive_has_one_file(tmp_path: Path) -> None:
    several = write(tmp_path, zipped({"a.csv": CSV, "b.csv": CSV}), "x.zip")
    assert refused(several) == " has 2 files (a.csv, b.csv); unpack it, and name the file or folder to read"
    assert " has 0 files ()" in refused(write(tmp_path, zipped({"folder/": b""}), "y.zip"))
    book = write(tmp_path, zipped({"[Content_Types].xml": "", "xl/workbook.xml": ""}), "book.xlsx")
    assert " is an Excel workbook or another document" in refused(book)
    nested = write(tmp_path, zipped({"a.csv.gz": gzip.compress(CSV.encode())}), "z.zip")
    assert " is a gzip file in a zip file; unpack it" in refused(nested)


def arrow_file(folder: Path) -> bytes:
    path = folder / "x.feather"
    feather.write_feather(pa.table({"user_id": ["u"]}), path)
    return path.read_bytes()


OTHERS: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "Parquet in gzip": (
        "x.parquet.gz",
        lambda f: gzip.compress(write_parquet(f, {"user_id": ["u"]}).read_bytes()),
        " is Parquet in a gzip file; unpack it: ",
    ),
    "Parquet in zip": (
        "x.zip",
        lambda f: zipped({"x.parquet": write_parquet(f, {"user_id": ["u"]}).read_bytes()}),
        " is Parquet in a zip file; unpack it: ",
    ),
    "text": ("x.parquet", lambda f: CSV.encode(), " is named .parquet, but is no Parquet file: it is text; rename it"),
    "gzip": (
        "x.parquet",
        lambda f: gzip.compress(CSV.encode()),
        " is named .parquet, but is no Parquet file: it is a gzip",
    ),
    "UTF-16": ("x.csv", lambda f: CSV.encode("utf-16"), " is UTF-16 text, neither text nor Parquet; save it as UTF-8"),
    "Arrow": ("x.csv", arrow_file, " is an Arrow (Feather) file, neither text nor Parquet; write its rows as CSV"),
    "HTML": ("x.csv", lambda f: b"<!DOCTYPE html>\n<html>", " is an HTML page, neither text nor Parquet; check its"),
    "Git LFS": (
        "x.csv",
        lambda f: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        " is a pointer of Git",
    ),
    "SQLite": ("x.csv", lambda f: b"SQLite format 3\0" + b"\0" * 99, " is an SQLite database, neither"),
    "Avro": ("x.csv", lambda f: b"Obj\x01" + b"\0" * 99, " is an Avro file, neither"),
    "encrypted": (
        "x.parquet",
        lambda f: b"PARE" + b"\0" * 99 + b"PARE",
        " is Parquet with an encrypted footer, neither",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), OTHERS.values(), ids=OTHERS)
def test_what_is_neither_text_nor_parquet_is_named(
    tmp_path: Path, name: str, content: Callable[[Path], bytes], message: str
) -> None:
    assert refused(write(tmp_path, content(tmp_path), name)).startswith(message)


def test_parquet_is_read_under_any_name(tmp_path: Path) -> None:
    columns = {"User_Id": ["u", "v"], "ITEM_ID": ["a", "b"], "timestamp": [1, 2]}
    assert everywhere(write_parquet(tmp_path, columns, "clicks.csv")) == EVENTS


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    import os
    import threading

    for content in (CSV, 'user_id,item_id,timestamp\n"u",a,1\nv,b,2\n', json.dumps(ROWS)):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(content,))
        writer.start()
        assert list(read_events(pipe)) == EVENTS
        writer.join()
        pipe.unlink()


# --- tables with a log, and other folders

LAKES = {
    "_delta_log/00000000000000000000.json": "a Delta Lake table",
    ".hoodie/hoodie.properties": "a Hudi table",
    "metadata/v1.metadata.json": "an Iceberg table",
    "_spark_metadata/0": "the output of a Spark stream",
    "snapshot/snapshot-1": "a Paimon table",
}


@pytest.mark.parametrize(("mark", "name"), LAKES.items())
def test_a_table_with_a_log_is_refused_by_name(tmp_path: Path, mark: str, name: str) -> None:
    table = tmp_path / "lake" / "clicks"
    part = write_parquet(table, {"user_id": ["u"], "item_id": ["a"], "timestamp": [1]}, "day=1/part-0.parquet")
    write(table, "{}", mark)
    for folder, how in ((table, "is"), (part.parent, "belongs to"), (tmp_path / "lake", "has in clicks")):
        message = refused(folder)
        assert message.startswith(f" {how} {name}: some of its files may be removed or replaced")
        assert "write the rows of its newest version as Parquet or CSV elsewhere" in message
    assert everywhere(part) == EVENTS[:1], "a file that is named is read"


def test_a_folder_does_not_have_one_file_twice(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder, CSV, "a.csv")
    write(folder, gzip.compress(CSV.encode()), "a.csv.gz")
    assert "a.csv and a.csv.gz are one file twice; remove one of them" in refused(folder)


def test_a_folder_may_have_files_of_every_kind_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for kind, files in {
        "csv": {"1.csv": CSV, "2.tsv.gz": gzip.compress(CSV.replace(",", "\t").encode())},
        "json": {"1.jsonl": lines, "2.ndjson.zst": PACK[".zst"](lines.encode()), "3.json": json.dumps(ROWS)},
    }.items():
        for name, content in files.items():
            write(tmp_path / kind, content, name)
        assert len(everywhere(tmp_path / kind)) == 2 * len(files)
    assert not caplog.records
    write(tmp_path / "csv", CSV, "3.txt")
    everywhere(tmp_path / "csv")
    assert "1 other files are not read: 3.txt" in caplog.text


# --- objects


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.text(min_size=1), st.text('[]{}",\\ü\n', min_size=1)), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    piece=st.integers(1, 40),
)
def test_a_json_array_is_read_in_any_layout(
    tmp_path: Path, rows: list[tuple[str, str]], indent: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(u.encode(errors="ignore").decode() or "u", i) for u, i in rows]
    objects = [{"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": 1} for user, item in rows]
    path = write(tmp_path, json.dumps(objects, indent=indent))
    with monkeypatch.context() as patch:
        patch.setattr("sasrec.data.lines.PIECE_CHARS", piece)
        patch.setattr("sasrec.data.objects.CHUNK_CHARS", piece)
        assert everywhere(path) == [Event(f"u{user}", f"i{item}", 1) for user, item in rows]


BROKEN_ARRAYS = {
    "cut short": ('[{"user_id": "u", "item_id": "a", "timestamp": 1},\n{"user_id": "v"', ":2: not JSON: "),
    "no end": ('[{"user_id": "u", "item_id": "a", "timestamp": 1}\n', ":2: not JSON: ']' is expected, not the end"),
    "a comma missing": (
        '[{"user_id": "u", "item_id": "a", "timestamp": 1}\n{"user_id": "v"}]',
        ":2: not JSON: ']' is expected, not '{'",
    ),
    "more behind": ('[{"user_id": "u", "item_id": "a", "timestamp": 1}]\n[]', ":2: not JSON: there is more behind"),
    "a number in it": (
        '[{"user_id": "u", "item_id": "a", "timestamp": 1},\n5]',
        ":2: a JSON object is expected, not int",
    ),
    "empty": ("[]", " has no rows"),
    "nothing": ("[ ", ":1: not JSON: the file is cut short"),
    "a field missing": (
        '[\n{"user_id": "u", "item": 1}]',
        ":2: field ITEM_ID is missing; the fields are 'user_id', 'item'",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_ARRAYS.values(), ids=BROKEN_ARRAYS)
def test_a_damaged_array_is_named_by_its_line(tmp_path: Path, content: str, message: str) -> None:
    found = []
    path = write(tmp_path, content)
    with pytest.raises(DataFileError, match=re.escape(f"{path}{message}")):
        for event in read_events(path):
            found.append(event)
    assert found == EVENTS[: len(found)]


def test_names_of_fields_in_objects_are_paths(tmp_path: Path) -> None:
    order = {
        "payload": {"user": {"id": 7}, "at": "2023-11-14T22:13:20Z"},
        "lines": [{"sku": {"id": "a"}}, {"sku": {"id": 5}}],
    }
    path = write(tmp_path, json.dumps(order) + "\n" + json.dumps(order | {"lines": []}) + "\n")
    columns = Columns(user="payload.user.id", item="lines[].sku.id", timestamp="payload.at")
    assert everywhere(path, columns) == [Event("7", "a", 1_700_000_000_000), Event("7", "5", 1_700_000_000_000)]
    ids = Columns(user="u", item="items[]", timestamp="t")
    assert everywhere(write(tmp_path, '{"u": 1, "items": ["a", "b"], "t": 2}'), ids) == [
        Event("1", "a", 2),
        Event("1", "b", 2),
    ]
    dotted = Columns(user="a.b", item="i", timestamp="t")
    assert everywhere(write(tmp_path, '{"a.b": "u", "i": "a", "t": 1}'), dotted) == EVENTS[:1]
    assert ":1: items is missing; the fields are 'u', 'i'" in refused(write(tmp_path, '{"u": 1, "i": 2}'), ids)
    assert ":1: items is int, not a list; " in refused(write(tmp_path, '{"u": 1, "items": 2, "t": 1}'), ids)


def test_objects_over_several_lines_are_explained(tmp_path: Path) -> None:
    assert "write each object on one line, or all of them as one JSON array" in refused(
        write(tmp_path, json.dumps(ROWS[0], indent=1) + "\n")
    )


# --- event types and ids


def test_events_of_other_types_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("u", "a", 1, "view"), ("", "b", "never", "error"), ("v", "b", 2, ""), ("w", "c", 3, "buy")]
    text = "user_id,item_id,timestamp,Event_Type\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    names = ("user_id", "item_id", "timestamp", "Event_Type")
    lines = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    view = Columns(event_types=("view",))
    for content in (text, text.replace("view", '"view"'), lines):
        path = write(tmp_path, content)
        found = list(read_events(path, view))
        assert found == [Event("u", "a", 1, None, "view"), Event("v", "b", 2)]
        assert len(everywhere(path, view)) == 2
    parquet = write_parquet(tmp_path, pd.DataFrame([r for r in rows if r[0]], columns=names).to_dict("list"))
    assert list(read_events(parquet, view)) == found
    assert not caplog.records
    assert everywhere(write(tmp_path, CSV), view) == EVENTS
    assert "has no column event_type: events of all types are read" in caplog.text


def test_no_event_of_a_type_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "user_id,item_id,timestamp,event_type\nu,a,1,view\n")
    message = " has no rows of event type buy, like; correct the types, or the name of their column"
    assert refused(path, Columns(event_types=("buy", "like"))) == message


def test_a_fault_behind_events_of_other_types_names_its_line(tmp_path: Path) -> None:
    text = "user_id,item_id,timestamp,event_type\nu,a,1,buy\nu,a,1,view\nu,a,never,view\n"
    assert refused(write(tmp_path, text), Columns(event_types=("view",))).startswith(":4: timestamp 'never' is neither")


@pytest.mark.parametrize("text", ["5.0", "-5.00", "1.2345678901234568e+17"])
def test_an_id_that_is_a_float_is_refused_everywhere(tmp_path: Path, text: str) -> None:
    for content in (
        f"user_id,item_id,timestamp\nu,7,1\nu,{text},1\n",
        f'user_id,item_id,timestamp\nu,7,1\nu,"{text}",1\n',
        f'{{"user_id": "u", "item_id": "7", "timestamp": 1}}\n'
        f'{{"user_id": "u", "item_id": "{text}", "timestamp": 1}}\n',
    ):
        assert f"item_id '{text}' is a number with a fraction; give strings or integers" in refused(
            write(tmp_path, content)
        )
    columns = {"user_id": ["u", "u"], "item_id": ["7", text], "timestamp": [1, 1]}
    assert ", row 1: item_id '" in refused(write_parquet(tmp_path, columns))
    for values in (columns["item_id"], [7.0, float(text)]):
        with pytest.raises(DataFileError, match="give strings or integers"):
            read_interactions(pd.DataFrame(columns | {"item_id": values}))
    fine = "user_id,item_id,timestamp\nu,5.0.1,1\nu,v5.0,1\nu,1e5,1\nu,5.25,1\n"
    assert [event.item_id for event in everywhere(write(tmp_path, fine))] == ["5.0.1", "v5.0", "1e5", "5.25"]


def test_a_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "user_id,item_id\nu,a\nuser_id,item_id\nv,b\n")
    for read in (
        lambda: list(read_events(path, Columns(in_file_order=True))),
        lambda: read_interactions(path, timestamp="optional"),
    ):
        with pytest.raises(DataFileError, match=r":3: the names of the columns are there again; remove the row"):
            read()


@pytest.mark.parametrize("missing", ["NaN", "null", "\\N"])
def test_an_id_that_may_be_a_missing_one_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    path = write(tmp_path, f"user_id,item_id,timestamp\nu,a,1\n{missing},b,2\n{missing},b,2\n")
    assert [event.user_id for event in read_events(path)] == ["u", missing, missing]
    assert caplog.messages == [
        f"{path}:3: user_id {missing!r} is read as an id; if it stands for a missing one, remove such rows"
    ]
