"""The command line: parse, configure logging, run.

Commands import what they need when they run: torch takes seconds to import, and `streamrec recs` does not need it.
"""

from __future__ import annotations

import argparse
import os
import sys

from streamrec.commands import archive, bench, check, demo, items, models, rebuild, recs, replay, retrain, serve, user
from streamrec.commands.options import EPILOG, given_flags
from streamrec.errors import StreamrecError
from streamrec.logs import configure_logging, one_line
from streamrec.settings_sources import load_settings, unknown_variables

COMMANDS = (serve, replay, recs, user, check, retrain, rebuild, models, items, archive, demo, bench)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    try:
        try:
            return _run(_parser().parse_args(arguments))
        finally:
            sys.stdout.flush()  # a closed pipe raises here instead of at exit, where nothing can catch it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="streamrec",
        description="Turn clicks from Kafka into fresh top-k lists in Redis, one SASRec token per click. "
        "Try it: streamrec demo",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _run(options: argparse.Namespace) -> int:
    """Run the command of the options."""
    try:
        settings = load_settings(options.config, given_flags(options))
        configure_logging(settings.log.level, settings.log.format)
        for warning in unknown_variables():
            print(one_line(f"streamrec: {warning}"), file=sys.stderr)
        return int(options.run(settings, options))
    except StreamrecError as error:
        print(one_line(f"streamrec: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("streamrec: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
