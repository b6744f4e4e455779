"""Interactions as every kind of source: files of several formats, folders and frames."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as parquet

from sasrec.data.datasets import (
    InteractionsDataset,
)
from sasrec.data.sequences import Sequences
from sasrec.data.vocab import ItemVocab

TIME_MS = 1_700_000_000_000
NOON = datetime(2024, 1, 31, 12, 0, 0, 1000, tzinfo=UTC)
NOON_MS = 1_706_702_400_001
ROWS = {
    "USER_ID": ["u1", "u2", "u1", "ü,3"],
    "ITEM_ID": [7, 8, 7, -9],
    "OUTCOME": [1.0, 0.5, 0.0, 5.0],
    "TIMESTAMP": [TIME_MS + 5, TIME_MS, TIME_MS + 5, TIME_MS + 1],
    "PRICE": [1.5, 2.5, None, 3.5],
}


def to_csv(columns: dict[str, list[Any]], delimiter: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def write_csv(folder: Path, columns: dict[str, list[Any]]) -> Path:
    return write(folder, to_csv(columns))


def write(folder: Path, content: str | bytes, name: str = "clicks.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(folder: Path, columns: dict[str, list[Any]], name: str = "clicks.parquet") -> Path:
    path = write(folder, b"", name)
    parquet.write_table(pa.table(columns), path)
    return path


def halves(columns: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    return {name: values[:2] for name, values in columns.items()}, {
        name: values[2:] for name, values in columns.items()
    }


def csv_folder(folder: Path, columns: dict[str, list[Any]]) -> Path:
    first, second = halves(columns)
    write(folder / "data", to_csv(first), "part-1.csv")
    write(folder / "data", gzip.compress(to_csv(second).encode()), "part-2.csv.gz")
    write(folder / "data", "", "_SUCCESS")
    return folder / "data"


def parquet_folder(folder: Path, columns: dict[str, list[Any]]) -> Path:
    first, second = halves(columns)
    write_parquet(folder / "data", first, "day=1/part.parquet")
    write_parquet(folder / "data", second, "day=2/part.parquet")
    write(folder / "data", "damaged", ".crc/part.parquet")
    return folder / "data"


def string_views(columns: dict[str, list[Any]]) -> pa.Table:
    return pa.table(columns | {"USER_ID": pa.array(columns["USER_ID"]).cast(pa.string_view())})


Source = Callable[[Path, dict[str, list[Any]]], Any]
SOURCES: dict[str, Source] = {
    "dict": lambda folder, columns: columns,
    "dict of arrays": lambda folder, columns: {
        "USER_ID": pd.Series(columns["USER_ID"]),
        "ITEM_ID": np.array(columns["ITEM_ID"]),
        "OUTCOME": pl.Series(columns["OUTCOME"]),
        "TIMESTAMP": pa.array(columns["TIMESTAMP"]),
        "anything": object(),
    },
    "pandas": lambda folder, columns: pd.DataFrame(columns),
    "pandas, mixed index and column aside": lambda folder, columns: pd.DataFrame(
        columns | {"MIXED": [1, "a", object(), None]}, index=[1, "a", None, 2.5]
    ),
    "pandas, categories": lambda folder, columns: pd.DataFrame(columns).astype({"USER_ID": "category"}),
    "pandas, nullable types": lambda folder, columns: pd.DataFrame(columns).convert_dtypes(),
    "polars": lambda folder, columns: pl.DataFrame(columns),
    "polars, categories": lambda folder, columns: pl.DataFrame(columns, schema_overrides={"USER_ID": pl.Categorical}),
    "polars, object aside": lambda folder, columns: pl.DataFrame(
        columns | {"HUGE": [1, 2, 3, 4]}, schema_overrides={"HUGE": pl.Int128}
    ),
    "pyarrow": lambda folder, columns: pa.table(columns),
    "pyarrow, string views": lambda folder, columns: string_views(columns),
    "pyarrow, a batch": lambda folder, columns: string_views(columns).to_batches()[0],
    "csv": write_csv,
    "csv, path as str": lambda folder, columns: str(write_csv(folder, columns)),
    "csv, gzipped": lambda folder, columns: write(folder, gzip.compress(to_csv(columns).encode()), "Clicks.CSV.GZ"),
    "csv, BOM and blank lines": lambda folder, columns: write(
        folder, "\ufeff\n" + to_csv(columns).replace("\r\n", "\n\n")
    ),
    "tsv": lambda folder, columns: write(folder, to_csv(columns, "\t"), "clicks.tsv"),
    "parquet": write_parquet,
    "csv folder": csv_folder,
    "parquet folder": parquet_folder,
    "dataset": lambda folder, columns: InteractionsDataset(columns),
}


def sequences_of(lengths: list[int]) -> Sequences:
    """Return a sequence of each length; every event has an index of its own."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    total = int(offsets[-1])
    vocab = ItemVocab(f"i{n}" for n in range(total))
    return Sequences(vocab, tuple(f"u{n}" for n in range(len(lengths))), offsets, np.arange(1, total + 1))
