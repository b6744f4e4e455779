"""Convert Arrow columns: strings, categories and the untyped columns of text files."""

from __future__ import annotations

from bisect import bisect_left

import pyarrow as pa
import pyarrow.compute as pc

from sasrec.data.formats import ITEM_ID, OUTCOME, USER_ID

TEXT = pa.large_string()


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def as_integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text as int64 where this loses no digit ("007" is not 7), else the column itself."""
    try:
        whole = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column
    return whole if whole.cast(column.type).equals(column) else column


def fits(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Return whether all values of a column can be cast."""
    try:
        column.cast(kind)
    except pa.ArrowException:
        return False
    return True


def first_misfit(column: pa.ChunkedArray, kind: pa.DataType) -> int:
    """Return the first row that cannot be cast; the number of rows where all can."""
    return bisect_left(range(len(column)), True, key=lambda row: not fits(column.slice(0, row + 1), kind))


def plain(table: pa.Table) -> pa.Table:
    """Return a table with categories, and strings of any kind, as TEXT."""
    for at, name in enumerate(table.column_names):
        column = table[name]
        if pa.types.is_dictionary(column.type):
            kind = TEXT if is_text(column.type.value_type) else column.type.value_type
            chunks = [pc.take(chunk.dictionary.cast(kind), chunk.indices) for chunk in column.chunks]
            table = table.set_column(at, name, pa.chunked_array(chunks, kind))
        elif is_text(column.type):
            table = table.set_column(at, name, column.cast(TEXT))
    return table


def typed(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of a text file as a typed file would hold it.

    All files of a folder are typed together: one "x7" makes the ids of all of them text.
    """
    if name not in (USER_ID, ITEM_ID):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, TEXT), column)
    column = as_integers(column)
    kinds = (pa.float64(), pa.bool_()) if name == OUTCOME and is_text(column.type) else ()
    return next((column.cast(kind) for kind in kinds if fits(column, kind)), column)
