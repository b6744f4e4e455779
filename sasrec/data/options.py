"""Command-line options that describe the columns of a file of interactions."""

from __future__ import annotations

import argparse

from sasrec.data.formats import Columns

FILE_HELP = (
    "interactions with user_id, item_id and timestamp (names in upper or lower case): CSV, TSV, JSON lines, MovieLens "
    "ratings or RecBole .inter, plain or .gz; Parquet; a folder of CSV or of Parquet files"
)


def add_column_options(parser: argparse.ArgumentParser, outcome: bool = True) -> None:
    """Add the options that :func:`columns_from` reads; ``outcome``: that of the column of outcomes too."""
    group = parser.add_argument_group("columns of the file, where its format does not say")
    group.add_argument("--user-column", metavar="NAME", help="column of user ids [user_id]")
    group.add_argument("--item-column", metavar="NAME", help="column of item ids [item_id]")
    group.add_argument("--timestamp-column", metavar="NAME", help="column of times [timestamp]")
    if outcome:
        group.add_argument("--outcome-column", metavar="NAME", help="column of outcomes [outcome or rating]")
    group.add_argument(
        "--separator",
        metavar="TEXT",
        type=_separator,
        help=r"characters between the fields; \t for a tab [found in the first line]",
    )
    group.add_argument(
        "--timestamp-unit",
        choices=("s", "ms"),
        help="of numeric timestamps [s for MovieLens and RecBole files, else ms]",
    )


def columns_from(options: argparse.Namespace) -> Columns:
    """Return the columns that parsed options describe."""
    return Columns(
        user=options.user_column,
        item=options.item_column,
        timestamp=options.timestamp_column,
        outcome=vars(options).get("outcome_column"),
        separator=options.separator,
        timestamp_unit=options.timestamp_unit,
    )


def _separator(text: str) -> str:
    separator = text.replace(r"\t", "\t")
    try:
        Columns(separator=separator)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return separator
