"""Interactions and items from a file, a folder or a frame, as checked columns.

    USER_ID, ITEM_ID   strings or integers; the integer 5 and the string "5" are one id
    TIMESTAMP          integers in ms or in the unit that is given; datetimes, dates and RFC 3339 text (no zone: UTC)
    OUTCOME            finite numbers or booleans

Column names may be in upper or lower case; other columns are ignored. A file has one of the formats of
:mod:`sasrec.data.presets` or is Parquet. A frame has Arrow's ``__arrow_c_stream__`` (pandas from 2.2, polars from 1.18,
pyarrow) or is a mapping of columns. Rows of frames and Parquet files are counted from 0, lines of text files from 1.

This module does not know models and vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sasrec.data import checks
from sasrec.data.client_schema import as_declared, read_schema
from sasrec.data.formats import (
    DEFAULT_COLUMNS,
    EVENT_TYPE,
    ITEM_ID,
    OUTCOME,
    TIMESTAMP,
    USER_ID,
    Columns,
    DataFileError,
)
from sasrec.data.layouts import Request
from sasrec.data.sequences import Interactions
from sasrec.data.sources import read_frame, read_path
from sasrec.data.tables import Data
from sasrec.data.timestamps import timestamps

INTERACTIONS_SCHEMA_PATH = Path(__file__).parent / "schemas" / "interactions.yaml"
ITEMS_SCHEMA_PATH = Path(__file__).parent / "schemas" / "items.yaml"
Presence = Literal["optional", "required"]


class _Dataset:
    """A source of data and what it must contain; see the subclasses."""

    default_names: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]]

    def __init__(
        self, data_location: Any, client_schema_path: str | Path | None = None, columns: Columns = DEFAULT_COLUMNS
    ) -> None:
        self.data_location = data_location
        self.columns = columns
        self.schema = {} if client_schema_path is None else read_schema(Path(client_schema_path), self.required)

    def fetch_data(self) -> pa.Table:
        """Read the data again and return the class's columns and those that the schema declares.

        Raises:
            DataFileError: a file is missing or damaged, a column is missing or not of its declared type, or there
                are no rows.
        """
        return self._load().table

    def _load(self, required: Iterable[str] = ()) -> Data:
        names = (*self.default_names, *self.schema)
        request = Request.of(names, (*self.required, *required, *self.schema), self.columns)
        source = self.data_location
        data = read_path(Path(source), request) if isinstance(source, (str, Path)) else read_frame(source, request)
        if not data.table.num_rows:
            raise data.no_rows(data.name, self.columns.event_types)
        if EVENT_TYPE not in self.schema:
            data = data.without(EVENT_TYPE)
        empty = [name for name in data.table.column_names if data.table[name].null_count == len(data.table)]
        if data.objects:  # none has the field
            data = data.without(*(set(empty) - request.needed))
        return as_declared(checks.in_ms(data), self.schema)


class InteractionsDataset(_Dataset):
    """Interactions: USER_ID, ITEM_ID and, where present, OUTCOME and TIMESTAMP.

    Args:
        data_location: a file of interactions, a folder of CSV or of Parquet files, or a frame.
        client_schema_path: YAML, ``columns: [{name: USER_ID, type: str}, ...]``, types str, int and float. Each
            declared column must be in the data and fit its type.
        columns: column names, separator and unit of timestamps where they are not the default.

    Raises:
        DataFileError: the schema cannot be read, or a declaration cannot be used.
    """

    default_names = (USER_ID, ITEM_ID, OUTCOME, TIMESTAMP)
    required = (USER_ID, ITEM_ID)


class ItemsDataset(_Dataset):
    """The catalogue: ITEM_ID. Arguments and errors as for :class:`InteractionsDataset`."""

    default_names = required = (ITEM_ID,)


@dataclass(frozen=True)
class InteractionRows:
    """Interactions as columns, each (N,), in the order of the source; ``integer_*``: the source's ids were integers."""

    user_ids: list[str]
    item_ids: list[str]
    timestamps: NDArray[np.int64] | None
    outcomes: NDArray[np.float32] | None
    integer_users: bool
    integer_items: bool

    def to_interactions(self) -> Interactions:
        """Return the interactions sorted by timestamp, ties in their order; without timestamps all are 0."""
        times = np.zeros(len(self.item_ids), np.int64) if self.timestamps is None else self.timestamps
        return Interactions(self.user_ids, self.item_ids, times, self.outcomes).in_order()


@dataclass(frozen=True)
class ItemRows:
    """Distinct items (N,), in the order of the source; ``integer_items``: the source's ids were integers."""

    item_ids: list[str]
    integer_items: bool


def read_interactions(
    source: Any, *, outcome: Presence = "optional", timestamp: Presence = "required"
) -> InteractionRows:
    """Read and check interactions from a dataset, a path or a frame.

    Args:
        outcome: whether OUTCOME must be there. Where it is there, it is read and checked.
        timestamp: likewise for TIMESTAMP.

    Raises:
        DataFileError: a column is missing, or a row cannot be used; the message names row, value and remedy.
    """
    presence = {OUTCOME: outcome, TIMESTAMP: timestamp}
    data = _dataset(source, InteractionsDataset)._load(name for name, rule in presence.items() if rule == "required")
    present = data.table.column_names
    checks.refuse_header(data)
    users, integer_users = checks.ids(data, USER_ID)
    items, integer_items = checks.ids(data, ITEM_ID)
    times = timestamps(data) if TIMESTAMP in present else None
    if times is not None:
        order = checks.FileOrder(data.name)
        order.add(times)
        order.finish()
    outcomes = checks.outcomes(data) if OUTCOME in present else None
    return InteractionRows(users, items, times, outcomes, integer_users, integer_items)


def read_items(source: Any) -> ItemRows:
    """Read and check items from a dataset, a path or a frame.

    Raises:
        DataFileError: the column is missing, an id cannot be used, or an item is there twice.
    """
    data = _dataset(source, ItemsDataset)._load()
    items, integer = checks.ids(data, ITEM_ID)
    label = data.label(ITEM_ID)
    rows: dict[str, int] = {}
    for row, item in enumerate(items):
        if rows.setdefault(item, row) != row:
            raise data.error(row, f"{label} {item!r} is already at {data.where(rows[item])}; give each item once")
    return ItemRows(items, integer)


def _dataset(source: Any, kind: type[_Dataset]) -> _Dataset:
    dataset = source if isinstance(source, _Dataset) else kind(source)
    if not isinstance(dataset, kind):
        raise DataFileError(f"an {type(dataset).__name__} was given where an {kind.__name__} is needed")
    return dataset
