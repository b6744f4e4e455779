"""Import one file into an archive that has another one, then remove that one: a process for tests to kill."""

from __future__ import annotations

import sys

from sasrec import Event
from streamrec.archive.imports import list_imports, remove_import
from streamrec.archive.segments import EventArchive

OLD = [Event("ann", "a", 5), Event("bob", "b", 3)]
NEW = [Event("cid", "c", 9)]


def main() -> int:
    archive = EventArchive(sys.argv[1])
    archive.import_events(NEW, "new.csv")
    for one in list_imports(archive.store):
        if one.source == "old.csv":
            remove_import(archive.store, one.id)
    return 0
