"""Interaction files -> events, one at a time: CSV, TSV, JSON lines and the MovieLens formats, plain or .gz.

The format is told by the first line, not by the name:

    user_id,item_id,timestamp          CSV (comma, semicolon) or TSV, any column order, more columns ignored
    {"user_id": ..., "item_id": ...}   JSON lines
    userId,movieId,rating,timestamp    MovieLens ratings.csv
    1::1193::5::978300760              MovieLens 1M / 10M ratings.dat
    196 <tab> 242 <tab> 3 <tab> 881250949       MovieLens 100K u.data
    user_id:token <tab> item_id:token ...       RecBole .inter
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Literal, NamedTuple

log = logging.getLogger(__name__)

TimestampUnit = Literal["s", "ms"]
OUTCOME_NAMES = ("outcome", "rating")
# A timestamp below this, read as ms, lies before 1973: almost surely it was in seconds.
SECONDS_SUSPECTED_BELOW_MS = 100_000_000_000


class DataFileError(ValueError):
    """A data file cannot be read; the message names file, line and remedy."""


class Event(NamedTuple):
    """One interaction. ``timestamp_ms`` is None where the file has none, ``outcome`` where it was not asked for."""

    user_id: str
    item_id: str
    timestamp_ms: int | None
    outcome: float | None = None


def read_events(
    path: str | Path,
    timestamp_unit: TimestampUnit | None = None,
    on_bytes: Callable[[int], None] | None = None,
    outcomes: bool = False,
) -> Iterator[Event]:
    """Events of a file, in file order.

    Args:
        timestamp_unit: overrides the format's own: seconds for MovieLens, milliseconds for the rest.
        on_bytes: called with the position in the file (bytes on disk) as reading goes on, for a progress bar.
        outcomes: read column outcome or rating too.

    Raises:
        DataFileError: the file is missing, of unknown format, or a row is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            # closing the text wrapper below closes either
            unzipped: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
            with io.TextIOWrapper(unzipped, encoding="utf-8-sig", newline="") as text:
                for number, event in enumerate(_parse(path, text, timestamp_unit, outcomes)):
                    yield event
                    if on_bytes is not None and number % 1000 == 0:
                        on_bytes(raw.tell())
                if on_bytes is not None:
                    on_bytes(raw.tell())
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}") from error
    except zlib.error as error:
        raise DataFileError(f"{path} is damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is not UTF-8 text: {error}") from error
    except EOFError as error:
        raise DataFileError(f"{path} is cut short: {error}") from error


def _parse(path: Path, text: IO[str], unit: TimestampUnit | None, outcomes: bool) -> Iterator[Event]:
    number, first = next(((n, line) for n, line in enumerate(text, start=1) if line.strip()), (0, ""))
    if not first:
        raise DataFileError(f"{path} is empty; expected interactions with user_id, item_id and timestamp")
    rows, unit_of_format = _open_format(path, number, first, text)
    factor = 1000 if (unit or unit_of_format) == "s" else 1
    warned = unit is not None or factor == 1000
    line = 0
    for line, (user_id, item_id, time, outcome) in rows:
        if user_id is None or item_id is None or user_id == "" or item_id == "":
            which = "user_id" if user_id is None or user_id == "" else "item_id"
            raise DataFileError(f"{path}:{line}: {which} is empty; give every row both ids, or remove the row")
        timestamp_ms = None if time is None or time == "" else _timestamp(path, line, time, factor)
        if not warned and timestamp_ms is not None and 0 < timestamp_ms < SECONDS_SUSPECTED_BELOW_MS:
            log.warning("%s:%d: timestamp %s looks like seconds, read as milliseconds; give the unit if it is not",
                        path, line, time)  # fmt: skip
            warned = True
        good = _outcome(path, line, outcome) if outcomes else None
        yield Event(str(user_id), str(item_id), timestamp_ms, good)
    if not line:
        raise DataFileError(f"{path} has a header but no interactions")


Row = tuple[int, tuple[object, object, object, object]]  # line; user, item, time, outcome


def _open_format(path: Path, number: int, first: str, rest: IO[str]) -> tuple[Iterator[Row], TimestampUnit]:
    head = first.strip()
    if head.startswith("{"):
        return _json_rows(path, number, first, rest), "ms"
    if head.count("::") == 3:
        return _separated_rows(path, number, first, rest, "::"), "s"
    if len(head.split("\t")) == 4 and head.split("\t")[0].isdigit():
        return _separated_rows(path, number, first, rest, "\t"), "s"
    delimiter = max("\t,;", key=head.count)
    header = next(csv.reader([head], delimiter=delimiter))
    columns = [name.strip().split(":")[0].lower() for name in header]
    if {"userid", "movieid"} <= set(columns):
        columns = [{"userid": "user_id", "movieid": "item_id"}.get(name, name) for name in columns]
        return _table_rows(path, number, columns, rest, delimiter), "s"
    if {"user_id", "item_id"} <= set(columns):
        is_recbole = any(":" in name for name in header)
        return _table_rows(path, number, columns, rest, delimiter), "s" if is_recbole else "ms"
    raise DataFileError(
        f"{path}:{number}: no known format in {head[:60]!r}; expected a header with user_id and item_id (CSV, TSV), "
        "JSON lines with these fields, or MovieLens ratings (ratings.dat, u.data, ratings.csv, .inter)"
    )


def _json_rows(path: Path, number: int, first: str, rest: IO[str]) -> Iterator[Row]:
    for line, text in enumerate(chain([first], rest), start=number):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataFileError(f"{path}:{line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataFileError(f"{path}:{line}: a JSON object is expected, not {type(row).__name__}")
        for name in ("user_id", "item_id"):
            if isinstance(row.get(name), bool) or not isinstance(row.get(name, ""), (str, int)):
                raise DataFileError(f"{path}:{line}: {name} must be a string or an integer, not {row[name]!r}")
            try:
                str(row.get(name)).encode()
            except UnicodeEncodeError:
                raise DataFileError(f"{path}:{line}: {name} holds half of a surrogate pair: {row[name]!r}") from None
        outcome = next((row[name] for name in OUTCOME_NAMES if name in row), None)
        yield line, (row.get("user_id"), row.get("item_id"), row.get("timestamp"), outcome)


def _separated_rows(path: Path, number: int, first: str, rest: IO[str], separator: str) -> Iterator[Row]:
    for line, text in enumerate(chain([first], rest), start=number):
        fields = text.rstrip("\r\n").split(separator)
        if len(fields) != 4:
            if not text.strip():
                continue
            raise DataFileError(f"{path}:{line}: 4 fields between {separator!r} expected, got {len(fields)}")
        yield line, (fields[0], fields[1], fields[3], fields[2])


def _table_rows(path: Path, header: int, columns: list[str], text: IO[str], delimiter: str) -> Iterator[Row]:
    user, item = columns.index("user_id"), columns.index("item_id")
    time = columns.index("timestamp") if "timestamp" in columns else None
    outcome = next((columns.index(name) for name in OUTCOME_NAMES if name in columns), None)
    reader = csv.reader(text, delimiter=delimiter)
    line = header + 1  # where the row begins: quoted fields may span lines
    try:
        for row in reader:
            if row:
                if len(row) != len(columns):
                    raise DataFileError(f"{path}:{line}: {len(columns)} columns expected, got {len(row)}")
                rest = tuple(None if column is None else row[column] for column in (time, outcome))
                yield line, (row[user], row[item], rest[0], rest[1])
            line = header + reader.line_num + 1
    except csv.Error as error:
        raise DataFileError(f"{path}:{line}: {error}") from error


def _timestamp(path: Path, line: int, time: object, factor: int) -> int:
    try:
        if isinstance(time, (bool, list, dict)):
            raise ValueError
        value = int(time) if isinstance(time, (int, str)) and str(time).lstrip("-").isdigit() else float(time)  # type: ignore[arg-type]
        timestamp_ms = round(value * factor)
        if not -(2**63) <= timestamp_ms < 2**63:
            raise OverflowError
    except (ValueError, OverflowError):
        raise DataFileError(
            f"{path}:{line}: timestamp {time!r} is not a Unix time in seconds or milliseconds"
        ) from None
    return timestamp_ms


def _outcome(path: Path, line: int, outcome: object) -> float:
    if outcome is None or outcome == "":
        raise DataFileError(f"{path}:{line}: the row has no {' or '.join(OUTCOME_NAMES)}; give every row one")
    try:
        if isinstance(outcome, (list, dict)):
            raise ValueError
        value = float(outcome)  # type: ignore[arg-type]
        if not math.isfinite(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise DataFileError(f"{path}:{line}: outcome {outcome!r} is not a number") from None
    return value
