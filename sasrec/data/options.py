"""Command-line options that describe the columns of a file of interactions."""

from __future__ import annotations

import argparse
from typing import Any

from sasrec.data.formats import TIMESTAMP_UNITS, Columns, DataFileError
from sasrec.data.presets import PRESETS

FILE_HELP = (
    "interactions with user_id, item_id and timestamp (names in upper or lower case): CSV, TSV, JSON lines or a JSON "
    "array, plain, .gz, .zst or .zip; Parquet; a folder of such files; or a public data set (--format)"
)


def add_column_options(parser: argparse.ArgumentParser, training: bool = True) -> None:
    """Add the options that :func:`columns_from` reads.

    Args:
        training: those of outcomes and of the event types to read, too; the daemon has settings for them.
    """
    group = parser.add_argument_group("columns of the file, where its format does not say")
    group.add_argument("--format", choices=tuple(PRESETS), help="the file is of this public data set")
    group.add_argument("--user-column", metavar="NAME", help="column of user ids; in JSON a path: user.id [user_id]")
    group.add_argument("--item-column", metavar="NAME", help="column of item ids; in JSON a path: items[].id [item_id]")
    group.add_argument("--timestamp-column", metavar="NAME", help="column of times [timestamp]")
    if training:
        group.add_argument("--outcome-column", metavar="NAME", help="column of outcomes [outcome or rating]")
    group.add_argument("--event-type-column", metavar="NAME", help="column of event types [event_type]")
    if training:
        group.add_argument(
            "--event-types",
            metavar="TYPE,...",
            type=_names,
            default=(),
            help="read only events of these types, and events without a type [those of --format, else all]",
        )
    group.add_argument(
        "--separator",
        metavar="TEXT",
        type=_separator,
        help=r"characters between the fields; \t for a tab [found in the first line]",
    )
    header = group.add_mutually_exclusive_group()
    header.add_argument(
        "--no-header", action="store_true", help="the first line is a row; name the columns by number, the first is 1"
    )
    header.add_argument(
        "--fields", metavar="NAME,...", type=_names, default=(), help="names of the columns of a file without a header"
    )
    group.add_argument(
        "--timestamp-unit",
        choices=TIMESTAMP_UNITS,
        help="of numeric times [s for MovieLens and RecBole files, else ms]; text is RFC 3339 (2024-01-31T12:00:00Z)",
    )
    group.add_argument(
        "--in-file-order",
        action="store_true",
        help="the rows are in the order of time, oldest first: read no times [a time is needed]",
    )


def columns_from(options: argparse.Namespace) -> Columns:
    """Return the columns that parsed options describe.

    Raises:
        DataFileError: two options exclude each other.
    """
    given = vars(options)
    try:
        return _columns(options, given)
    except ValueError as error:
        raise DataFileError(str(error)) from None


def _columns(options: argparse.Namespace, given: dict[str, Any]) -> Columns:
    return Columns(
        user=options.user_column,
        item=options.item_column,
        timestamp=options.timestamp_column,
        outcome=given.get("outcome_column"),
        separator=options.separator,
        timestamp_unit=options.timestamp_unit,
        event_type=options.event_type_column,
        event_types=given.get("event_types", ()),
        format=options.format,
        header=not options.no_header,
        fields=options.fields,
        in_file_order=options.in_file_order,
    )


def _separator(text: str) -> str:
    separator = text.replace(r"\t", "\t")
    try:
        Columns(separator=separator)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return separator


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
