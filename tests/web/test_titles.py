"""Titles of items: the known formats, and the errors for other files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from streamrec.errors import SettingsError
from streamrec.web.titles import MAX_TITLE_CHARS, read_titles


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("items.csv", 'item_id,title\n1,"Alien, the film"\n2,Brazil\n'),
        ("items.csv", 'price;TITLE;ITEM_ID\n3;"Alien, the film";1\n4;Brazil;2\n'),
        ("items.tsv", "title\titem_id\nAlien, the film\t1\nBrazil\t2\n"),
        ("movies.csv", 'movieId,title,genres\n1,"Alien, the film",Horror\n2,Brazil,Drama\n'),
        ("movies.dat", "1::Alien, the film::Horror\n2::Brazil::Drama\n"),
        ("u.item", "1|Alien, the film|01-Jan-1979||\n2|Brazil|01-Jan-1985||\n"),
        ("items", '﻿item_id,title\r\n1,"Alien, the film"\r\n2,Brazil\r\n\r\n'),
    ],
)
def test_the_first_line_decides_the_format(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert read_titles(path) == {"1": "Alien, the film", "2": "Brazil"}
    path.with_suffix(".gz").write_bytes(gzip.compress(content.encode()))
    assert read_titles(path.with_suffix(".gz")) == {"1": "Alien, the film", "2": "Brazil"}


def test_tab_separated_files_do_not_quote_and_the_year_follows_the_title(tmp_path: Path) -> None:
    path = tmp_path / "ml.item"
    path.write_text('item_id:token\tmovie_title:token_seq\trelease_year:token\n1\t"Who\t1990\n2\tBrazil\t\n')
    assert read_titles(path) == {"1": '"Who (1990)', "2": "Brazil"}


@pytest.mark.parametrize("ids", [[1, 2], ["1", "2"]])
def test_parquet(tmp_path: Path, ids: list[int] | list[str]) -> None:
    path = tmp_path / "items.parquet"
    parquet.write_table(pa.table({"item_id": ids, "title": ["Alien", None], "price": [1, 2]}), path)
    assert read_titles(path) == {"1": "Alien"}


def test_latin_1_is_read_and_long_titles_are_shortened(tmp_path: Path) -> None:
    path = tmp_path / "movies.dat"
    path.write_bytes("1::Misérables, Les::Drama\n".encode("latin-1") + b"2::" + b"x" * 900 + b"::Drama\n")
    titles = read_titles(path)
    assert titles["1"] == "Misérables, Les"
    assert len(titles["2"]) == MAX_TITLE_CHARS


def test_incomplete_rows_and_rows_without_a_title_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n1\n\n2,\n,Nothing\n3,<script>alert(1)</script>\n")
    assert read_titles(path) == {"3": "<script>alert(1)</script>"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "No such file"),
        ("clicks.csv", b"user_id,item_id\n1,2\n", "no item_id and title in 'user_id, item_id'"),
        ("empty.csv", b"", "no item_id and title"),
        ("items.parquet", b"PAR1 not really", "cannot be read"),
        ("items.csv.gz", b"\x1f\x8b not really", "cannot be read"),
    ],
)
def test_an_unreadable_file_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"titles in {path}: .*{message}") as caught:
        read_titles(path)
    assert "\n" not in str(caught.value)
