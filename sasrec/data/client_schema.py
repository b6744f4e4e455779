"""Read a schema of columns from YAML, and bring a table into the types that it declares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import yaml
from pydantic import BaseModel, ValidationError

from sasrec.data.column_types import TEXT, is_text
from sasrec.data.content import one_line
from sasrec.data.formats import ITEM_ID, OUTCOME, TIMESTAMP, USER_ID, DataFileError
from sasrec.data.tables import Data
from sasrec.data.timestamps import timestamps

DECLARED = {"str": TEXT, "int": pa.int64(), "float": pa.float64()}


class _Column(BaseModel):
    # schemas of other recommenders declare more about a column (vocab, hash_buckets): ignored
    name: str
    type: Literal["str", "int", "float"]


class _Schema(BaseModel):
    columns: list[_Column]


def read_schema(path: Path, required: Collection[str]) -> dict[str, str]:
    """Return the type that a schema declares for each column.

    Args:
        required: columns that it must declare.

    Raises:
        DataFileError: the schema cannot be read, or a declaration cannot be used.
    """
    given: Any = None
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns = _Schema.model_validate(given).columns
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path} is not YAML: {one_line(error)}") from error
    except ValidationError as error:
        raise DataFileError(f"{path}: {_problem(error, given)}") from None
    schema: dict[str, str] = {}
    for column in columns:
        unusable = {USER_ID: ("float",), ITEM_ID: ("float",), OUTCOME: ("str",)}.get(column.name, ())
        if column.type in unusable:
            usable = " or ".join(kind for kind in DECLARED if kind not in unusable)
            raise DataFileError(f"{path}: column {column.name} is declared {column.type}; declare it {usable}")
        if column.name in schema:
            raise DataFileError(f"{path}: column {column.name} is declared twice; keep one of them")
        schema[column.name] = column.type
    for name in required:
        if name not in schema:
            raise DataFileError(f"{path}: column {name} is not declared; add - {{name: {name}, type: str}}")
    return schema


def as_declared(data: Data, schema: Mapping[str, str]) -> Data:
    """Return data with every declared column in its declared type.

    Raises:
        DataFileError: a value does not fit; the message names its row.
    """
    for at, name in enumerate(data.table.column_names):
        column, kind = data.table[name], schema.get(name)
        is_id = name in (USER_ID, ITEM_ID)
        floats = pa.types.is_floating(column.type)
        if kind is None or (is_id and (pa.types.is_boolean(column.type) or (floats and kind == "str"))):
            continue  # such ids are refused when they are read: 5.0 and true have several spellings
        if name == TIMESTAMP and not is_text(column.type):
            times = pa.chunked_array([timestamps(data)])
            data = replace(data, table=data.table.set_column(at, name, times))
        declared = data.cast(name, DECLARED[kind], f"is not {kind}, as the schema declares; correct either")
        data = replace(data, table=data.table.set_column(at, name, declared))
    return data


def _problem(error: ValidationError, given: Any) -> str:
    first = error.errors(include_url=False)[0]
    place, expected = first["loc"], "expected `columns:` and below it `- {name: USER_ID, type: str}` for each"
    if len(place) < 2 or not isinstance(place[1], int):
        return f"no list of columns in it; {expected}"
    column = given["columns"][place[1]]
    name = column.get("name", place[1]) if isinstance(column, dict) else place[1]
    if first["type"] == "literal_error":
        return f"column {name} has type {first['input']!r}; give str, int or float"
    return f"column {name}: {place[-1]}: {first['msg']}; {expected}"
