"""What `streamrec archive ACTION` does: follow the topic, back-fill, look, prune."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from sasrec import Columns, DataFileError, read_events
from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveError
from streamrec.settings import Settings

DAY_MS = 86_400_000


def follow(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Write the topic into the archive until told to stop."""

    async def run() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        archiver = Archiver(settings, archive)
        await archiver.run(stop, options.burst)
        return archiver.archived

    yield f"{asyncio.run(run()):,} events archived in {archive.folder}"


def import_file(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Add the events of a file."""
    try:
        count = archive.import_events(read_events(options.file, Columns(timestamp_unit=options.timestamp_unit)))
    except DataFileError as error:
        raise ArchiveError(str(error)) from None
    yield f"{count:,} events of {options.file} imported" if count else f"{options.file} had been imported before"


def stats(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """What is there."""
    found = archive.stats()
    if options.json:
        yield json.dumps(vars(found))
        return
    since, until = (
        "-" if ts_ms is None else datetime.fromtimestamp(ts_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        for ts_ms in (found.first_ts_ms, found.last_ts_ms)
    )
    yield f"{found.events:,} events, {found.imported_events:,} of them imported; {found.dead_letters:,} dead letters"
    yield f"from {since} to {until}"
    yield f"{found.segments:,} segments, {found.bytes:,} bytes in {archive.folder}"
    yield "next offsets: " + (", ".join(f"{p}: {o:,}" for p, o in sorted(found.next_offsets.items())) or "none")


def prune(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Remove segments without an event of the last days."""
    removed = archive.prune(int(time.time() * 1000 - options.days * DAY_MS))
    yield f"{removed:,} segments without an event of the last {options.days:g} days removed"
