"""`streamrec replay`: produce the events of a file to Kafka."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from sasrec.data.options import FILE_HELP, add_column_options
from streamrec.commands.options import KAFKA, Subparsers, add_command, file_columns, positive, rate
from streamrec.settings import Settings


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "replay",
        run,
        KAFKA,
        "produce the events of a file to Kafka",
        "Produce the events of a file to Kafka, keyed by user, so that the clicks of a user stay in order.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    command.add_argument("--rate", type=rate, default=0.0, help="events per second [as fast as possible]")
    command.add_argument("--limit", type=positive, help="stop after N events", metavar="N")
    add_column_options(command, training=False)


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Produce the events, and print how many."""
    from streamrec.commands import servers
    from streamrec.kafka.replay import replay

    columns = file_columns(options)

    async def work() -> int:
        await servers.wait_for(settings, servers.KAFKA)
        return await replay(settings.kafka, settings.events, options.file, options.rate, columns, options.limit)

    started = time.monotonic()
    sent = asyncio.run(work())
    print(f"{sent:,} events to topic {settings.kafka.topic} in {time.monotonic() - started:.1f} s")
    return 0
