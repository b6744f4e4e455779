"""Make event archives from clicks."""

from __future__ import annotations

from pathlib import Path

from streamrec.archive.segments import EventArchive
from streamrec.schemas import ClickEvent

from support.redis_access import BASE_MS

CENTURY_S = 100 * 365 * 86_400


def click(partition: int, offset: int) -> ClickEvent:
    user, item = f"u{partition}-{offset % 7}", f"ï{offset % 11}"
    return ClickEvent(user, item, BASE_MS + offset * 1000, partition, offset, BASE_MS)


def archived(folder: Path, events: list[ClickEvent], epoch: int = 0) -> EventArchive:
    """Return an archive of these events, with one segment per partition."""
    archive = EventArchive(folder, epoch)
    for partition in sorted({e.partition for e in events}):
        own = [e for e in events if e.partition == partition]
        archive.append(partition, own[0].offset, own[-1].offset + 1, own)
    return archive
