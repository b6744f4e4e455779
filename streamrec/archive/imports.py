"""Imported files in the archive: events that were never in the topic.

    imported/SHA256.parquet     the name is a hash of the events, so that a file is imported once

An import is one file: it appears whole or not at all, and goes so.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as compute

from sasrec import Event
from streamrec.archive.segment_files import SCHEMA, Segment, check_archive, columns_of_roles, read_table
from streamrec.bucket import StoredFile
from streamrec.errors import ArchiveError
from streamrec.schemas import CLICK, Role
from streamrec.storage import Store

IMPORTED = "imported"
SOURCE = b"streamrec.source"  # in the metadata of the schema: name of the imported file
RoleOf = Callable[[object], Role | None]
ID_CHARS = 12  # of the hash; enough to name an import


@dataclass(frozen=True)
class Import:
    """An imported file. ``source`` is empty if the import did not name it; ``imported_s`` is when it was written."""

    id: str
    source: str
    events: int
    first_ts_ms: int
    last_ts_ms: int
    bytes: int
    imported_s: float


def always_a_click(event_type: object) -> Role:
    """Return the role of a click."""
    return CLICK


def import_of(events: Iterable[Event], source: str, role_of: RoleOf) -> tuple[str, pa.Table]:
    """Return the name and the content of the file in the archive that has these events; not those without a role.

    Raises:
        ArchiveError: an event has no timestamp.
    """
    typed = [(event, role) for event in events if (role := role_of(event.event_type)) is not None]
    rows, roles = [event for event, _ in typed], [role for _, role in typed]
    if any(row.timestamp_ms is None for row in rows):
        raise ArchiveError("an event without a timestamp cannot be archived; add a timestamp to each row")
    columns: list[Sequence[object]] = [[getattr(row, name) for row in rows] for name in SCHEMA.names[:3]]
    columns += [range(len(rows)), *columns_of_roles(roles)]
    table = pa.table(columns, SCHEMA).replace_schema_metadata({SOURCE: source})
    # this text decides whether a file was imported before: it must not change
    events_text = ", ".join(
        f"Event(user_id={user!r}, item_id={item!r}, timestamp_ms={time!r}, outcome={outcome!r})"
        for user, item, time, outcome, _ in rows
    )
    digest = hashlib.sha256(f"[{events_text}]".encode()).hexdigest()
    return f"{IMPORTED}/{digest}.parquet", table


def list_imports(store: Store) -> list[Import]:
    """Return the imports of an archive, the oldest first.

    Raises:
        ArchiveError: one of them is damaged.
        StoreUnavailable: the archive cannot be read.
    """
    check_archive(store)
    found = []
    for file in sorted(_files(store), key=lambda file: (file.modified_s, file.name)):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found.append(_read(store, file))
    return found


def remove_import(store: Store, id: str) -> Import:
    """Remove an import, whole or not at all, and return it.

    Raises:
        ArchiveError: no import has this id, or several have.
        StoreUnavailable: the archive cannot be read or written.
    """
    check_archive(store)
    matching = [file for file in _files(store) if id and _id_of(file).startswith(id.lower())]
    if len(matching) != 1:
        problem = "several imports have" if matching else "no import has"
        raise ArchiveError(f"{problem} the id {id!r} in {store}; `streamrec archive imports` lists them")
    try:
        removed = _read(store, matching[0])
    except FileNotFoundError:
        raise ArchiveError(f"no import has the id {id!r} in {store}; another process removed it") from None
    store.delete(matching[0].name, durable=True)
    return removed


def _files(store: Store) -> list[StoredFile]:
    return [file for file in store.files(IMPORTED) if file.name.endswith(".parquet")]


def _id_of(file: StoredFile) -> str:
    return file.name.removeprefix(f"{IMPORTED}/").removesuffix(".parquet")


def _read(store: Store, file: StoredFile) -> Import:
    table = read_table(store, Segment(file.name))
    times = compute.min_max(table["timestamp_ms"]).as_py()
    source = (table.schema.metadata or {}).get(SOURCE, b"").decode()
    id = _id_of(file)[:ID_CHARS]
    return Import(id, source, table.num_rows, times["min"], times["max"], file.bytes, file.modified_s)
