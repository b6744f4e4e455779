"""What the replay guard knows of the topic: for each partition, the last record that was read under it.

The guard skips events at or below the offsets that it has applied. In a topic that was created again these are other
events. So each daemon stores a mark of the last record of its partitions, and compares it with the topic when a
partition is assigned to it. The stored value is `TOPIC_EPOCH OFFSET TIMESTAMP_MS CHECKSUM`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

from streamrec.errors import RedisRefused, RedisRejected, RedisUnavailable
from streamrec.kafka.marks import check_topic, later_epoch
from streamrec.logs import LogOnce
from streamrec.redis.client import RedisClient
from streamrec.schemas import RecordMark
from streamrec.setting_groups import KafkaSettings

log = logging.getLogger(__name__)

STORE_EVERY_S = 2.0


class TopicMarks:
    """The marks of one daemon.

    Args:
        ttl_s: that of the sequences, with which the guard expires.
    """

    def __init__(self, kafka: KafkaSettings, redis: RedisClient, ttl_s: int) -> None:
        self._kafka = kafka
        self._redis = redis
        self._ttl_s = ttl_s
        self._unstored: dict[int, RecordMark] = {}

    def note(self, marks: Mapping[int, RecordMark]) -> None:
        """Note the last committed record of partitions."""
        self._unstored |= marks

    async def check(self, partitions: Collection[int]) -> None:
        """Compare partitions of the topic with their marks.

        Raises:
            TopicChanged: the topic was created again, or cut back.
            SettingsError: another daemon uses a later topic epoch.
            KafkaUnavailable, RedisUnavailable: try again.
        """
        values = await self._redis.get_many([self._redis.keys.topic_mark(number) for number in partitions])
        marks: dict[int, RecordMark] = {}
        for number, value in zip(partitions, values, strict=True):
            epoch, _, text = (value or b"").decode(errors="replace").partition(" ")
            mark = RecordMark.parse(text)
            if mark is None or not epoch.isdecimal():
                continue
            if int(epoch) > self._kafka.topic_epoch:
                raise later_epoch(self._kafka, "the data in Redis", int(epoch))
            if int(epoch) == self._kafka.topic_epoch:
                marks[number] = mark
        await check_topic(self._kafka, marks)

    async def store(self) -> None:
        """Write the marks that changed. Raises RedisUnavailable; the next call writes them."""
        while self._unstored:
            partition, mark = next(iter(self._unstored.items()))
            value = f"{self._kafka.topic_epoch} {mark}".encode()
            await self._redis.set(self._redis.keys.topic_mark(partition), value, self._ttl_s)
            if self._unstored.get(partition) == mark:
                del self._unstored[partition]

    async def run(self) -> None:
        """Store marks regularly."""
        warning = LogOnce(log)
        while True:
            await asyncio.sleep(STORE_EVERY_S)
            try:
                await self.store()
                warning.reset()
            except (RedisRefused, RedisRejected) as error:
                warning("a topic that is created again may not be noticed: %s", error)
            except RedisUnavailable:  # the probe warns
                pass
