"""Interactions and items from CSV, Parquet or a frame -> checked columns. Knows nothing of models or vocabularies.

    USER_ID, ITEM_ID   strings or integers; the integer 5 and the string "5" are one id
    TIMESTAMP          integers, kept exactly; datetimes, dates and ISO-8601 text become Unix ms (no zone: UTC)
    OUTCOME            finite numbers or booleans

Other columns are ignored. A frame is whatever speaks Arrow's ``__arrow_c_stream__`` (pandas from 2.2, polars,
pyarrow) or a mapping of columns. Rows of frames and Parquet files are counted from 0, lines of CSV files from 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from sasrec.data.readers import DataFileError
from sasrec.data.sequences import Interactions
from sasrec.data.tables import (
    ITEM_ID,
    OUTCOME,
    TEXT,
    TIMESTAMP,
    USER_ID,
    Data,
    as_integers,
    cast,
    first_misfit,
    frame_table,
    is_text,
    one_line,
    read_path,
)

INTERACTIONS_SCHEMA_PATH = Path(__file__).parent / "schemas" / "interactions.yaml"
ITEMS_SCHEMA_PATH = Path(__file__).parent / "schemas" / "items.yaml"
Presence = Literal["optional", "required"]
DECLARED = {"str": TEXT, "int": pa.int64(), "float": pa.float64()}
TIMES = "give integers or datetimes"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# datetime.fromisoformat takes any character between date and time: it would read "20240131.12" as noon
ISO_SHAPE = re.compile(r"[\dW-]{7,10}([Tt ].+)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)


class _Dataset:
    """Where data lie and what they must hold; see the subclasses."""

    columns: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]]

    def __init__(self, data_location: Any, client_schema_path: str | Path | None = None) -> None:
        self.data_location = data_location
        self.schema = {} if client_schema_path is None else _read_schema(Path(client_schema_path), self.required)

    def fetch_data(self) -> pa.Table:
        """Read the data, afresh at every call: the columns of the docstring above and those declared.

        Raises:
            DataFileError: no such file, a damaged one, a column missing or not of its declared type, no rows.
        """
        return self._load().table

    def _load(self, required: Iterable[str] = ()) -> Data:
        names = list(dict.fromkeys((*self.columns, *self.schema)))
        needed = {*self.required, *required, *self.schema}
        if isinstance(self.data_location, (str, Path)):
            data = read_path(Path(self.data_location), names, needed)
        else:
            data = Data(frame_table(self.data_location, names, needed), "the frame")
        if not data.table.num_rows:
            raise DataFileError(f"{data.name} has no rows")
        return _as_declared(data, self.schema)


class InteractionsDataset(_Dataset):
    """Interactions: USER_ID, ITEM_ID and, where there, OUTCOME and TIMESTAMP.

    Args:
        data_location: a CSV (.csv, .tsv, also .gz) or Parquet file, a folder of either, or a frame.
        client_schema_path: YAML, ``columns: [{name: USER_ID, type: str}, ...]``, types str, int and float. Each
            declared column must be in the data and fit its type.

    Raises:
        DataFileError: the schema cannot be read, or declares what cannot be used.
    """

    columns = (USER_ID, ITEM_ID, OUTCOME, TIMESTAMP)
    required = (USER_ID, ITEM_ID)


class ItemsDataset(_Dataset):
    """The items there are: ITEM_ID. Arguments and errors as for :class:`InteractionsDataset`."""

    columns = required = (ITEM_ID,)


@dataclass(frozen=True)
class InteractionRows:
    """Interactions as columns, each (N,), in the order given; ``integer_*``: the ids were integers there."""

    user_ids: list[str]
    item_ids: list[str]
    timestamps: NDArray[np.int64] | None
    outcomes: NDArray[np.float32] | None
    integer_users: bool
    integer_items: bool

    def to_interactions(self) -> Interactions:
        """Sort by timestamp, ties in the order given; without timestamps all are 0 and the order stays."""
        times = np.zeros(len(self.item_ids), np.int64) if self.timestamps is None else self.timestamps
        return Interactions(self.user_ids, self.item_ids, times, self.outcomes).in_order()


@dataclass(frozen=True)
class ItemRows:
    """Distinct items (N,), in the order given; ``integer_items``: the ids were integers there."""

    item_ids: list[str]
    integer_items: bool


def read_interactions(
    source: Any, *, outcome: Presence = "optional", timestamp: Presence = "required"
) -> InteractionRows:
    """Check and read interactions from a dataset, a path or a frame.

    Args:
        outcome: whether OUTCOME must be there; where it is, it is read and checked.
        timestamp: the same for TIMESTAMP.

    Raises:
        DataFileError: a column is missing, or a row cannot be used; the message names row, value and remedy.
    """
    presence = {OUTCOME: outcome, TIMESTAMP: timestamp}
    data = _dataset(source, InteractionsDataset)._load(name for name, how in presence.items() if how == "required")
    there = data.table.column_names
    users, integer_users = _ids(data, USER_ID)
    items, integer_items = _ids(data, ITEM_ID)
    times = _timestamps(data) if TIMESTAMP in there else None
    outcomes = _outcomes(data) if OUTCOME in there else None
    return InteractionRows(users, items, times, outcomes, integer_users, integer_items)


def read_items(source: Any) -> ItemRows:
    """Check and read items from a dataset, a path or a frame.

    Raises:
        DataFileError: the column is missing, an id cannot be used, or an item is given twice.
    """
    data = _dataset(source, ItemsDataset)._load()
    items, integer = _ids(data, ITEM_ID)
    rows: dict[str, int] = {}
    for row, item in enumerate(items):
        if rows.setdefault(item, row) != row:
            raise data.error(row, f"{ITEM_ID} {item!r} is already at {data.where(rows[item])}; give each item once")
    return ItemRows(items, integer)


def _dataset(source: Any, kind: type[_Dataset]) -> _Dataset:
    dataset = source if isinstance(source, _Dataset) else kind(source)
    if not isinstance(dataset, kind):
        raise DataFileError(f"an {type(dataset).__name__} was given where an {kind.__name__} is needed")
    return dataset


# --- columns


def _ids(data: Data, name: str) -> tuple[list[str], bool]:
    column = data.table[name]
    remedy = "give every row its id, or remove the row"
    integer = pa.types.is_integer(column.type)
    if pa.types.is_floating(column.type):
        # integers with a hole turn into floats on their way through pandas: the hole is what is wrong
        values = column.to_numpy()
        holes = np.isnan(values)
        if holes.any() and np.all(np.mod(values[~holes], 1) == 0):
            raise data.error(int(holes.argmax()), f"{name} is null; {remedy}")
    elif integer or is_text(column.type) or pa.types.is_null(column.type):
        data.refuse_nulls(name, remedy)
        coded = column.combine_chunks().dictionary_encode()
        places = coded.indices.to_numpy().tolist()
        try:
            # far fewer than rows, as a rule: each becomes text once
            texts = coded.dictionary.cast(TEXT).to_pylist()
        except UnicodeDecodeError as error:
            raise DataFileError(f"{data.name}: {name} is not UTF-8 text: {error}") from error
        if "" in texts:
            raise data.error(places.index(texts.index("")), f"{name} is empty; {remedy}")
        return [texts[place] for place in places], integer
    raise data.refuse_type(name, "give strings or integers")


def _timestamps(data: Data) -> NDArray[np.int64]:
    column, kind = data.table[TIMESTAMP], data.table[TIMESTAMP].type
    data.refuse_nulls(TIMESTAMP, f"{TIMES}, or remove the row")
    if is_text(kind):
        return _text_times(data, column)
    if pa.types.is_floating(kind):
        return _float_times(data, column.to_numpy())
    if pa.types.is_timestamp(kind):
        units = _numpy(column.cast(pa.int64()))
        return units * 1000 if kind.unit == "s" else units // {"ms": 1, "us": 1000, "ns": 1_000_000}[kind.unit]
    if pa.types.is_date(kind):
        return _numpy(column.cast(pa.date64()).cast(pa.int64()))
    if not pa.types.is_integer(kind):
        raise data.refuse_type(TIMESTAMP, TIMES)
    return _numpy(cast(data, TIMESTAMP, column, pa.int64(), f"does not fit 64 bits; {TIMES}"))


def _float_times(data: Data, values: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    # beyond this, neighbouring integers share one float: the value was rounded before it came here
    exact = np.abs(values) <= 2.0 ** (np.finfo(values.dtype).nmant + 1)
    bad = ~exact | (np.where(exact, values, 0) % 1 != 0)
    if bad.any():
        row = int(bad.argmax())
        raise data.error(row, f"{TIMESTAMP} {values[row]} is not a whole number held exactly; {TIMES}")
    return values.astype(np.int64)


def _text_times(data: Data, column: pa.ChunkedArray) -> NDArray[np.int64]:
    whole = as_integers(column)
    if whole is not column:
        return _numpy(whole)
    times: list[int] = []
    for row, text in enumerate(column.to_pylist()):
        time = _parse_time(text)
        if time is None:
            raise data.error(row, f"{TIMESTAMP} {text!r} is neither an integer nor an ISO-8601 time; {TIMES}")
        times.append(time)
    return np.array(times, np.int64)


def _parse_time(text: str) -> int | None:
    text = text.strip()
    try:
        if WHOLE.fullmatch(text):
            value = int(text.partition(".")[0])
        elif ISO_SHAPE.fullmatch(text):
            time = datetime.fromisoformat(text)
            value = ((time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH) // timedelta(milliseconds=1)
        else:
            return None
    except (ValueError, OverflowError):
        return None
    return value if -(2**63) <= value < 2**63 else None


def _outcomes(data: Data) -> NDArray[np.float32]:
    column, remedy = data.table[OUTCOME], "give a finite number or a boolean"
    types = pa.types
    if is_text(column.type):
        row = first_misfit(column, pa.float64())
        row = 0 if row == len(column) else row
        raise data.error(row, f"{OUTCOME} {column[row].as_py()!r} is text; {remedy}")
    data.refuse_nulls(OUTCOME, f"{remedy}, or remove the row")
    if not any(test(column.type) for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)):
        raise data.refuse_type(OUTCOME, remedy)
    values = column.cast(pa.float64(), safe=False).to_numpy()
    with np.errstate(over="ignore"):
        outcomes: NDArray[np.float32] = values.astype(np.float32)
    if not np.isfinite(outcomes).all():
        row = int((~np.isfinite(outcomes)).argmax())
        raise data.error(row, f"{OUTCOME} {values[row]} is not finite as float32; {remedy}")
    return outcomes


def _numpy(column: pa.ChunkedArray) -> NDArray[np.int64]:
    values: NDArray[np.int64] = np.array(column.to_numpy(), np.int64)  # a copy: Arrow's buffers are read-only
    return values


# --- schemas


class _Column(BaseModel):
    # the schemas of other recommenders say more of a column (vocab, hash_buckets): passed over
    name: str
    type: Literal["str", "int", "float"]


class _Schema(BaseModel):
    columns: list[_Column]


def _read_schema(path: Path, required: Collection[str]) -> dict[str, str]:
    given: Any = None
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns = _Schema.model_validate(given).columns
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} is not YAML: {one_line(error)}") from error
    except ValidationError as error:
        raise DataFileError(f"{path}: {_schema_problem(error, given)}") from None
    schema: dict[str, str] = {}
    for column in columns:
        unusable = {USER_ID: ("float",), ITEM_ID: ("float",), OUTCOME: ("str",)}.get(column.name, ())
        if column.type in unusable:
            fitting = " or ".join(kind for kind in DECLARED if kind not in unusable)
            raise DataFileError(f"{path}: column {column.name} is declared {column.type}; declare it {fitting}")
        if column.name in schema:
            raise DataFileError(f"{path}: column {column.name} is declared twice; keep one of them")
        schema[column.name] = column.type
    for name in required:
        if name not in schema:
            raise DataFileError(f"{path}: column {name} is not declared; add - {{name: {name}, type: str}}")
    return schema


def _schema_problem(error: ValidationError, given: Any) -> str:
    first = error.errors(include_url=False)[0]
    place, expected = first["loc"], "expected `columns:` and below it `- {name: USER_ID, type: str}` for each"
    if len(place) < 2 or not isinstance(place[1], int):
        return f"no list of columns in it; {expected}"
    column = given["columns"][place[1]]
    name = column.get("name", place[1]) if isinstance(column, dict) else place[1]
    if first["type"] == "literal_error":
        return f"column {name} has type {first['input']!r}; give str, int or float"
    return f"column {name}: {place[-1]}: {first['msg']}; {expected}"


def _as_declared(data: Data, schema: Mapping[str, str]) -> Data:
    table = data.table
    for at, name in enumerate(table.column_names):
        column, kind = table[name], schema.get(name)
        is_id = name in (USER_ID, ITEM_ID)
        floats = pa.types.is_floating(column.type)
        if kind is None or (is_id and (pa.types.is_boolean(column.type) or (floats and kind == "str"))):
            continue  # such ids are refused when read: 5.0 and true have no one spelling
        if name == TIMESTAMP and not is_text(column.type):
            column = pa.chunked_array([_timestamps(data)])
        declared = cast(data, name, column, DECLARED[kind], f"is not {kind}, as the schema declares; correct either")
        table = table.set_column(at, name, declared)
    return Data(table, data.name, data.files)
