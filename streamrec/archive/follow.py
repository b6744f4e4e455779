"""Copy the click topic into the event archive.

One process reads all partitions (kafka/reader.py). The archive alone stores the next offset of each partition;
offsets are committed only to make the lag visible in Kafka.

    1. poll and decode
    2. write segments: after SEGMENT_EVENTS events or ``archive_flush_s``, and at the end
    3. commit
    4. merge small segments: upkeep, which may fail and is tried again later

A partition that cannot be written is tried again and again, and the others go on. What exceeds SEGMENT_EVENTS meanwhile
is dropped from memory, and read again from Kafka once the partition is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping

from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveTaken, KafkaUnavailable, Stopped, StoreUnreachable, reason
from streamrec.kafka.reader import OffsetRange, TopicReader
from streamrec.kafka.topics import ensure_topics
from streamrec.logs import LogOnce
from streamrec.metrics import RetrainMetrics
from streamrec.setting_groups import EventSettings, KafkaSettings
from streamrec.waiting import pause, until_there

log = logging.getLogger(__name__)

SEGMENT_EVENTS = 50_000
RETRY_PAUSE_S = 1.0
RETRY_MERGE_S = 60.0


class Archiver:
    """Reads the click topic and appends its events to an archive."""

    def __init__(
        self,
        kafka: KafkaSettings,
        events: EventSettings,
        archive: EventArchive,
        flush_s: float,
        metrics: RetrainMetrics | None = None,
    ) -> None:
        self._kafka = kafka
        self._events = events
        self._flush_s = flush_s
        self._archive = archive
        self._metrics = metrics
        self._reported: set[int] = set()
        self._log_merge = LogOnce(log)
        self._pending: dict[int, OffsetRange] = {}  # by partition: read, not yet archived
        self._failing_since_s: dict[int, float] = {}  # partitions that could not be written
        self._dropped: set[int] = set()  # of these: records were dropped from memory
        self._merge_again_s = 0.0
        self._flushed_s = time.monotonic()
        self.archived = 0  # events

    async def run(self, stop: asyncio.Event, burst: bool = False) -> None:
        """Copy until ``stop`` is set or, with ``burst``, until the end that the topic had at the start.

        Without ``burst`` it waits for a Kafka that is not there at the start.

        Raises:
            KafkaUnavailable: a broker refuses access or, with ``burst``, none answers.
            ArchiveTaken: another process writes to the archive.
            ArchiveError, StoreUnavailable: the archive cannot be read at the start, or not be written when ``stop`` is
                set.
        """
        with self._archive.following(), contextlib.suppress(Stopped):
            read_again = True
            while read_again:
                self._pending.clear()
                self._dropped.clear()
                async with contextlib.AsyncExitStack() as clients:
                    if burst:
                        reader = await self._connect(clients)
                    else:
                        reader = await until_there("Kafka", lambda: self._connect(clients), stop)
                    read_again = await self._follow(reader, stop, burst)

    async def _connect(self, clients: contextlib.AsyncExitStack) -> TopicReader:
        """Create the topic if it is missing, and connect a reader."""
        for topic in await ensure_topics(self._kafka, (self._kafka.topic,)):
            log.info("topic created", extra={"topic": topic, "partitions": self._kafka.partitions})
        start = await asyncio.to_thread(self._archive.next_offsets)
        marks = await asyncio.to_thread(self._archive.marks)
        self._show(start)
        return await clients.enter_async_context(
            TopicReader(self._kafka, self._events, start, marks, f"{self._kafka.group}-archive")
        )

    async def _follow(self, reader: TopicReader, stop: asyncio.Event, burst: bool) -> bool:
        """Copy; return whether to connect again, to read dropped records."""
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
            if self._dropped - self._failing_since_s.keys():
                return True
            if self._dropped:  # no need to hurry through records that are dropped
                await pause(stop, RETRY_PAUSE_S)
            if drained and not self._pending:
                return False
        await self._flush(reader, stop)
        return False

    def _add(self, partition: int, found: OffsetRange) -> None:
        if partition in self._failing_since_s and self._waiting(failing=True) >= SEGMENT_EVENTS:
            self._dropped.add(partition)
        if partition in self._dropped:
            return
        pending = self._pending.setdefault(partition, OffsetRange(found.first, found.first))
        pending.next = found.next
        pending.mark = found.mark or pending.mark
        pending.events += found.events
        pending.dead_letters += found.dead_letters

    def _waiting(self, failing: bool) -> int:
        """Count the events in memory of partitions that fail, or of the others."""
        return sum(len(p.events) for n, p in self._pending.items() if (n in self._failing_since_s) == failing)

    def _is_due(self) -> bool:
        every_s = RETRY_PAUSE_S if self._failing_since_s else self._flush_s
        return self._waiting(failing=False) >= SEGMENT_EVENTS or time.monotonic() - self._flushed_s >= every_s

    async def _flush(self, reader: TopicReader, stop: asyncio.Event) -> None:
        written, problem = await self._write()
        self._flushed_s = time.monotonic()
        if written:
            await reader.commit(written)
            log.info("segments written", extra={"partitions": len(written), "events": self.archived})
            await self._merge(written)
        if problem is not None and stop.is_set():
            raise problem

    async def _write(self) -> tuple[dict[int, int], Exception | None]:
        """Write a segment of each partition; return the next offsets of those written, and an error of another one."""
        written: dict[int, int] = {}
        problem: Exception | None = None
        for partition, pending in sorted(self._pending.items()):
            try:
                await asyncio.to_thread(self._append, partition, pending)
            except ArchiveTaken:
                raise
            except Exception as error:
                problem = error
                unreachable = isinstance(error, StoreUnreachable)  # by no partition
                for failing in self._pending if unreachable else (partition,):
                    self._failing_since_s.setdefault(failing, time.monotonic())
                if unreachable:
                    break
                continue
            del self._pending[partition]
            self.archived += len(pending.events)
            written[partition] = pending.next
            if self._failing_since_s.pop(partition, None) is not None:
                log.info("partition %d is archived again", partition)
        self._show(written)
        self._report(problem)
        return written, problem

    def _append(self, partition: int, pending: OffsetRange) -> None:
        # a write whose answer was lost has succeeded
        again = partition in self._failing_since_s
        if not (again and self._archive.next_offset(partition) >= pending.next):
            self._archive.append(
                partition, pending.first, pending.next, pending.events, pending.dead_letters, pending.mark
            )

    def _report(self, problem: Exception | None) -> None:
        """Log once that a partition fails: the reason names a file, whose name changes at every try."""
        failing = set(self._failing_since_s)
        if problem is not None and not failing <= self._reported:
            which = ", ".join(map(str, sorted(failing)))
            log.warning("the archive is unavailable, waiting for it (partitions %s): %s", which, reason(problem))
        self._reported = self._reported | failing if failing else set()

    async def _merge(self, partitions: Iterable[int]) -> None:
        """Merge small segments, after the commit: nothing depends on this."""
        if time.monotonic() < self._merge_again_s:
            return
        for partition in partitions:
            try:
                await asyncio.to_thread(self._archive.merge, partition)
            except Exception as error:
                self._merge_again_s = time.monotonic() + RETRY_MERGE_S
                self._log_merge("small segments are not merged; this is tried again: %s", error)
                return
        self._log_merge.reset()

    def _show(self, next_offsets: Mapping[int, int]) -> None:
        if self._metrics is None:
            return
        for partition, offset in next_offsets.items():
            self._metrics.archived.labels(str(partition)).set(offset)
            self._metrics.archive_behind.labels(str(partition)).set(0)
        for partition, since_s in self._failing_since_s.items():
            self._metrics.archive_behind.labels(str(partition)).set(time.monotonic() - since_s)
