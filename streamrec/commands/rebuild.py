"""`streamrec rebuild`: restore Redis from the archive and the topic."""

from __future__ import annotations

import argparse
import asyncio
import time

from streamrec.commands.options import KAFKA, REDIS, Subparsers, add_command, place, rate
from streamrec.settings import Settings


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "rebuild",
        run,
        ("archive_dir", "model_dir", "registry_dir", *KAFKA, *REDIS),
        "restore lost data in Redis from the archive and the topic",
        "Compute sequences, lists and click counts from the archive and the rest of the topic, and write those "
        "for which Redis has fewer events. Daemons may run meanwhile. A second run changes nothing; a stopped run can "
        "be repeated.",
    )
    command.add_argument("--rate", type=rate, default=0.0, help="users per second [as fast as possible]")
    command.add_argument("--dry-run", action="store_true", help="write nothing, only report the changes")


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Rebuild, and print a report."""
    place(settings.archive.dir, "archive_dir")
    from streamrec.commands import servers
    from streamrec.rebuild.rebuild import rebuild
    from streamrec.rebuild.report import Report

    started = time.monotonic()

    async def work() -> Report:
        await servers.wait_for(settings, servers.KAFKA, servers.REDIS)
        return await rebuild(settings, options.rate, options.dry_run)

    report = asyncio.run(work())
    print(f"{'would be: ' if options.dry_run else ''}{report}; {time.monotonic() - started:.1f} s")
    return 0
