"""The click topic -> the event archive.

All partitions are read by one process (topic_reader.py). Where each goes on is told by the archive alone; offsets are
committed only so that the lag can be seen from outside.

    1. poll and decode
    2. write a segment: after so many events, or so many seconds, and at the end
    3. commit
"""

from __future__ import annotations

import asyncio
import logging
import time

from streamrec.archive.segments import EventArchive
from streamrec.errors import KafkaUnavailable
from streamrec.kafka.reader import OffsetRange, TopicReader
from streamrec.kafka.topics import ensure_topics
from streamrec.setting_groups import EventSettings, KafkaSettings

log = logging.getLogger(__name__)

SEGMENT_EVENTS = 50_000
AWAY_PAUSE_S = 1.0


class Archiver:
    """Follows the click topic and writes what it reads into an archive."""

    def __init__(self, kafka: KafkaSettings, events: EventSettings, archive: EventArchive, flush_s: float) -> None:
        self._kafka = kafka
        self._events = events
        self._flush_s = flush_s
        self._archive = archive
        self._pending: dict[int, OffsetRange] = {}  # what was read and is not in the archive yet
        self._flushed_s = time.monotonic()
        self.archived = 0  # events

    async def run(self, stop: asyncio.Event, burst: bool = False) -> None:
        """Follow until ``stop`` is set or, with ``burst``, until the topic is read to where it ended at the start.

        Raises:
            KafkaUnavailable: no broker answers at the start, or one refuses us.
            ArchiveError: the archive cannot be written, or another process does so.
        """
        with self._archive.following():
            await self._follow(stop, burst)

    async def _follow(self, stop: asyncio.Event, burst: bool) -> None:
        for topic in await ensure_topics(self._kafka, (self._kafka.topic,)):
            log.info("topic created", extra={"topic": topic, "partitions": self._kafka.partitions})
        ends = await asyncio.to_thread(self._archive.next_offsets)
        async with TopicReader(self._kafka, self._events, ends, f"{self._kafka.group}-archive") as reader:
            log.info("archiving", extra={"topic": self._kafka.topic, "archive": self._archive.folder})
            while not stop.is_set():
                try:
                    await reader.find_partitions()
                except KafkaUnavailable as error:
                    log.warning("Kafka is away, waiting for it: %s", error)
                    await asyncio.sleep(AWAY_PAUSE_S)
                    continue
                for number, found in (await reader.poll()).items():
                    self._take(number, found)
                drained = burst and await reader.drained()
                if drained or self._is_due():
                    await self._flush(reader)
                if drained:
                    return
            await self._flush(reader)

    def _take(self, number: int, found: OffsetRange) -> None:
        pending = self._pending.setdefault(number, OffsetRange(found.first, found.first))
        pending.next = found.next
        pending.events += found.events
        pending.dead_letters += found.dead_letters

    def _is_due(self) -> bool:
        waiting = sum(len(pending.events) for pending in self._pending.values())
        return waiting >= SEGMENT_EVENTS or time.monotonic() - self._flushed_s >= self._flush_s

    async def _flush(self, reader: TopicReader) -> None:
        self._flushed_s = time.monotonic()
        offsets = {}
        for number, pending in sorted(self._pending.items()):
            await asyncio.to_thread(
                self._archive.append, number, pending.first, pending.next, pending.events, pending.dead_letters
            )
            await asyncio.to_thread(self._archive.merge, number)
            del self._pending[number]
            self.archived += len(pending.events)
            offsets[number] = pending.next
        if offsets:
            await reader.commit(offsets)
            log.info("segments written", extra={"partitions": len(offsets), "events": self.archived})
