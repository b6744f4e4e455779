"""Copy the click topic into the event archive.

One process reads all partitions (kafka/reader.py). The archive alone stores the next offset of each partition;
offsets are committed only to make the lag visible in Kafka.

    1. poll and decode
    2. write segments: after SEGMENT_EVENTS events or ``archive_flush_s``, and at the end
    3. commit
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from streamrec.archive.segments import EventArchive
from streamrec.errors import KafkaUnavailable, Stopped, StoreUnavailable
from streamrec.kafka.reader import OffsetRange, TopicReader
from streamrec.kafka.topics import ensure_topics
from streamrec.logs import LogOnce
from streamrec.setting_groups import EventSettings, KafkaSettings
from streamrec.waiting import pause, until_there

log = logging.getLogger(__name__)

SEGMENT_EVENTS = 50_000
RETRY_PAUSE_S = 1.0


class Archiver:
    """Reads the click topic and appends its events to an archive."""

    def __init__(self, kafka: KafkaSettings, events: EventSettings, archive: EventArchive, flush_s: float) -> None:
        self._kafka = kafka
        self._events = events
        self._flush_s = flush_s
        self._archive = archive
        self._log_unavailable = LogOnce(log)
        self._pending: dict[int, OffsetRange] = {}  # by partition: read, not yet archived
        self._flushed_s = time.monotonic()
        self.archived = 0  # events

    async def run(self, stop: asyncio.Event, burst: bool = False) -> None:
        """Copy until ``stop`` is set or, with ``burst``, until the end that the topic had at the start.

        Without ``burst`` it waits for a Kafka that is not there at the start.

        Raises:
            KafkaUnavailable: a broker refuses access or, with ``burst``, none answers.
            ArchiveError: another process writes to the archive.
            StoreUnavailable: the archive cannot be read at the start, or not be written when ``stop`` is set.
        """
        with self._archive.following(), contextlib.suppress(Stopped):
            async with contextlib.AsyncExitStack() as clients:
                if burst:
                    reader = await self._connect(clients)
                else:
                    reader = await until_there("Kafka", lambda: self._connect(clients), stop)
                await self._follow(reader, stop, burst)

    async def _connect(self, clients: contextlib.AsyncExitStack) -> TopicReader:
        """Create the topic if it is missing, and connect a reader."""
        for topic in await ensure_topics(self._kafka, (self._kafka.topic,)):
            log.info("topic created", extra={"topic": topic, "partitions": self._kafka.partitions})
        start = await asyncio.to_thread(self._archive.next_offsets)
        return await clients.enter_async_context(
            TopicReader(self._kafka, self._events, start, f"{self._kafka.group}-archive")
        )

    async def _follow(self, reader: TopicReader, stop: asyncio.Event, burst: bool) -> None:
        log.info("archiving", extra={"topic": self._kafka.topic, "archive": str(self._archive.store)})
        warning = LogOnce(log)
        while not stop.is_set():
            try:
                await reader.find_partitions()
            except KafkaUnavailable as error:
                warning("Kafka is unreachable, waiting for it: %s", error)
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            warning.reset()
            for partition, found in (await reader.poll()).items():
                self._add(partition, found)
            drained = burst and await reader.drained()
            if drained or self._is_due():
                await self._flush(reader, stop)
            if drained:
                return
        await self._flush(reader, stop)

    def _add(self, partition: int, found: OffsetRange) -> None:
        pending = self._pending.setdefault(partition, OffsetRange(found.first, found.first))
        pending.next = found.next
        pending.events += found.events
        pending.dead_letters += found.dead_letters

    def _is_due(self) -> bool:
        waiting = sum(len(pending.events) for pending in self._pending.values())
        return waiting >= SEGMENT_EVENTS or time.monotonic() - self._flushed_s >= self._flush_s

    async def _flush(self, reader: TopicReader, stop: asyncio.Event) -> None:
        self._flushed_s = time.monotonic()
        offsets = {}
        for partition, pending in sorted(self._pending.items()):
            await self._write(partition, pending, stop)
            del self._pending[partition]
            self.archived += len(pending.events)
            offsets[partition] = pending.next
        if offsets:
            await reader.commit(offsets)
            log.info("segments written", extra={"partitions": len(offsets), "events": self.archived})

    async def _write(self, partition: int, pending: OffsetRange, stop: asyncio.Event) -> None:
        """Write a segment. While the archive is unavailable, wait and read no further."""
        again = False
        while True:
            try:
                await asyncio.to_thread(self._append, partition, pending, again)
            except StoreUnavailable as error:
                if stop.is_set():
                    raise
                self._log_unavailable("the archive is unavailable, waiting for it: %s", error)
            else:
                self._log_unavailable.reset()
                return
            again = True
            await pause(stop, RETRY_PAUSE_S)

    def _append(self, partition: int, pending: OffsetRange, again: bool) -> None:
        # a write whose answer was lost has succeeded
        if not (again and self._archive.next_offsets().get(partition, 0) >= pending.next):
            self._archive.append(partition, pending.first, pending.next, pending.events, pending.dead_letters)
        self._archive.merge(partition)
