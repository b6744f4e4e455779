"""Append events to an archive as the archiver does, from where it ends, and merge segments: `main PLACE EVENTS`."""

from __future__ import annotations

import sys

from streamrec.archive import segments
from streamrec.archive.segments import EventArchive

from support.archives import click

SEGMENT = 2  # events


def main() -> int:
    """Append until partition 0 has this number of events."""
    segments.MIN_SEGMENTS_TO_MERGE = 3
    archive, events = EventArchive(sys.argv[1]), int(sys.argv[2])
    with archive.following():
        while (first := archive.next_offsets().get(0, 0)) < events:
            archive.append(0, first, first + SEGMENT, [click(0, n) for n in range(first, first + SEGMENT)])
            archive.merge(0)
    return 0
