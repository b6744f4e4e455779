"""Titles of items: people read names, the daemon knows ids.

The first line decides the format; the file name only marks Parquet and gzip:

    item_id,title                      CSV (comma, semicolon) or TSV, columns in any order, further columns ignored
    movieId,title,genres               MovieLens movies.csv
    1::Toy Story (1995)::Animation     MovieLens 1M / 10M movies.dat
    1|Toy Story (1995)|01-Jan-1995|... MovieLens 100K u.item
    item_id:token <tab> movie_title... RecBole .item
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from streamrec.errors import SettingsError
from streamrec.items.table import ItemTable

MAX_TITLE_CHARS = 200
ID_COLUMNS, TITLE_COLUMNS, YEAR_COLUMNS = ("item_id", "movieid"), ("title", "movie_title"), ("release_year",)
Row = tuple[str, str]


class ItemNames:
    """Titles and categories of items.

    Args:
        titles: by item id, for items without a title in the table.
        table: the table of items, if there is one.
    """

    def __init__(self, titles: Mapping[str, str], table: ItemTable | None = None) -> None:
        self._titles = titles
        self._table = table

    def __len__(self) -> int:
        return max(len(self._titles), len(self._table or ()))

    def title(self, item_id: str) -> str | None:
        """Return the title of an item, None if it is not known."""
        item = self._table.item(item_id) if self._table else None
        return _shortened(item.title) if item and item.title else self._titles.get(item_id)

    def categories(self, item_id: str) -> list[str]:
        """Return the categories of an item; none if they are not known."""
        item = self._table.item(item_id) if self._table else None
        return [] if item is None else list(item.all_categories)


def read_titles(path: Path) -> dict[str, str]:
    """Return the titles by item id.

    Raises:
        SettingsError: the file cannot be read, or has an unknown format.
    """
    try:
        rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _text_rows(path, _text(path))
        return {item: _shortened(title) for item, title in rows if item and title}
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SettingsError(f"titles in {path}: cannot be read: {reason}") from None


def _shortened(title: str) -> str:
    return title if len(title) <= MAX_TITLE_CHARS else title[: MAX_TITLE_CHARS - 1] + "…"


def _text(path: Path) -> str:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # as in MovieLens 100K and 1M


def _text_rows(path: Path, text: str) -> Iterator[Row]:
    first = text.partition("\n")[0].strip()
    for separator in ("::", "|"):
        if separator in first and len(fields := first.split(separator)) > 1 and fields[0].isdigit():
            lines = (line.split(separator) for line in text.splitlines())
            return ((fields[0], fields[1]) for fields in lines if len(fields) > 1)
    delimiter = max("\t,;", key=first.count)
    file = io.StringIO(text, newline="")
    if delimiter == "\t":  # TSV files do not quote
        rows = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(file, delimiter=delimiter)
    return _rows_with_header(path, next(rows, []), rows)


def _parquet_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
        names = file.schema_arrow.names
        item, title, _ = _columns_of(path, names)
        table = file.read(columns=[names[item], names[title]])
    items, titles = (table[name].cast(pa.large_string()).to_pylist() for name in (names[item], names[title]))
    return ((str(item or ""), title or "") for item, title in zip(items, titles, strict=True))


def _rows_with_header(path: Path, header: list[str], rows: Iterator[list[str]]) -> Iterator[Row]:
    item, title, year = _columns_of(path, header)
    for row in rows:
        if len(row) > max(item, title):
            dated = year is not None and len(row) > year and row[year]
            yield row[item], f"{row[title]} ({row[year]})" if year is not None and dated else row[title]


def _columns_of(path: Path, header: list[str]) -> tuple[int, int, int | None]:
    """Return the indices of the columns with id, title and, if there is one, year."""
    names = [name.strip().split(":")[0].lower() for name in header]
    item, title, year = (
        next((names.index(name) for name in known if name in names), None)
        for known in (ID_COLUMNS, TITLE_COLUMNS, YEAR_COLUMNS)
    )
    if item is None or title is None:
        raise SettingsError(
            f"titles in {path}: no item_id and title in {', '.join(header)[:60]!r}; expected a header with both (CSV, "
            "TSV), Parquet with both, or MovieLens items (movies.csv, movies.dat, u.item, .item)"
        )
    return item, title, year
