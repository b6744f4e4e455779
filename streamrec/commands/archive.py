"""`streamrec archive`: the event archive, the clicks of the topic as Parquet files.

Each action takes the settings, the archive and the options, and yields lines of output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sasrec.data.options import FILE_HELP, add_column_options
from streamrec.commands.options import KAFKA, Subparsers, add_command, add_group, file_columns, place
from streamrec.errors import ArchiveError
from streamrec.event_roles import Roles, served_types
from streamrec.logs import one_line, utc
from streamrec.settings import Settings
from streamrec.stop_signals import stop_signals

if TYPE_CHECKING:
    from streamrec.archive.segments import EventArchive

log = logging.getLogger(__name__)

Lines = Callable[[Settings, "EventArchive", argparse.Namespace], Iterator[str]]
DAY_MS = 86_400_000


def add_to(commands: Subparsers) -> None:
    """Declare the command and its actions."""
    actions = add_group(
        commands,
        "archive",
        "store the clicks of the topic, to train from",
        "Write and look at the event archive: the clicks of the topic as Parquet files in a folder or object store.",
    )
    command = _add(actions, "follow", follow, "write the topic into the archive until a signal comes", KAFKA)
    command.add_argument("--burst", action="store_true", help="read the topic to its end, then exit")
    command = _add(actions, "import", import_file, "import the events of a file; a second import adds nothing")
    command.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    add_column_options(command, training=False)
    command = _add(actions, "imports", imports, "list the imported files")
    command.add_argument("--json", action="store_true", help="print one JSON object a file")
    command = _add(actions, "remove", remove, "remove an imported file")
    command.add_argument("id", metavar="ID", help="the import's id, or its first characters (archive imports)")
    command = _add(actions, "stats", stats, "print the size and the time range of the archive")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command = _add(actions, "prune", prune, "remove segments without an event of the last days")
    command.add_argument("--days", type=float, required=True, help="age limit in days; newer events remain")


def _add(
    actions: Subparsers, name: str, lines: Lines, help: str, flags: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    command = add_command(actions, name, _print, ("archive_dir", *flags), help)
    command.set_defaults(lines=lines)
    return command


def _print(settings: Settings, options: argparse.Namespace) -> int:
    where = place(settings.archive.dir, "archive_dir")
    from streamrec.archive.segments import EventArchive

    for line in options.lines(settings, EventArchive(where, settings.kafka.topic_epoch), options):
        print(one_line(line))
    return 0


def follow(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Write the topic into the archive until a signal comes."""
    from streamrec.archive.follow import Archiver
    from streamrec.commands import servers

    async def run() -> int:
        if options.burst:
            await servers.wait_for(settings, servers.KAFKA)
        stop = asyncio.Event()
        archiver = Archiver(settings.kafka, settings.events, archive, settings.archive.flush_s)
        with stop_signals(stop, lambda name: log.info("stopping", extra={"signal": name})):
            await archiver.run(stop, options.burst)
        return archiver.archived

    yield f"{asyncio.run(run()):,} events archived in {archive.store}"


def import_file(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Add the events of a file."""
    from sasrec import DataFileError, read_events

    try:
        bounds = settings.events.bounds(time.time() * 1000)
        columns = replace(file_columns(options), event_types=served_types(settings.events.roles))
        events = read_events(options.file, columns, bounds=bounds)
        # the daemon ignores events of some types, so the model must not learn them from a file
        role_of = Roles(settings.events.roles, settings.events.outcomes).of
        count = archive.import_events(events, str(options.file), role_of)
    except DataFileError as error:
        raise ArchiveError(f"{error} (nothing was imported)") from None
    yield f"{count:,} events of {options.file} imported" if count else f"{options.file} was imported before"


def imports(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """List the imported files."""
    from streamrec.archive.imports import list_imports

    for one in list_imports(archive.store):
        if options.json:
            yield json.dumps(vars(one))
            continue
        times = f"{utc(one.first_ts_ms)} to {utc(one.last_ts_ms)}"
        yield f"{one.id}  {utc(int(one.imported_s * 1000))}  {one.events:,} events from {times}  {one.source or '-'}"


def remove(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Remove an imported file."""
    from streamrec.archive.imports import remove_import

    removed = remove_import(archive.store, options.id)
    yield f"{removed.id} removed: {removed.events:,} events of {removed.source or 'a file without a name'}"


def stats(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Print the size and the time range of the archive."""
    found = archive.stats()
    if options.json:
        yield json.dumps(vars(found))
        return
    since, until = ("-" if ts_ms is None else utc(ts_ms) for ts_ms in (found.first_ts_ms, found.last_ts_ms))
    yield f"{found.events:,} events, {found.imported_events:,} of them imported; {found.dead_letters:,} dead letters"
    yield f"from {since} to {until}"
    yield f"{found.segments:,} segments, {found.bytes:,} bytes in {archive.store}"
    yield "next offsets: " + (", ".join(f"{p}: {o:,}" for p, o in sorted(found.next_offsets.items())) or "none")


def prune(settings: Settings, archive: EventArchive, options: argparse.Namespace) -> Iterator[str]:
    """Remove segments without an event of the last days."""
    written_s = max((file.modified_s for file in archive.store.files()), default=0.0)
    now_s = min(time.time(), written_s)  # a clock that is ahead must not remove new events
    if time.time() - now_s > DAY_MS / 1000:
        yield f"nothing was archived since {utc(int(now_s * 1000))}: the days count from then"
    removed = archive.prune(int(now_s * 1000 - options.days * DAY_MS))
    yield f"{removed:,} segments without an event of the last {options.days:g} days removed"
