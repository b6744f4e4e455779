"""The lag of the assigned partitions: offsets between the committed one and the end, and the age of the last record.

Records of an open transaction count for the metric. They cannot be read yet, so they are no reason for a restart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError

from streamrec.health import Health
from streamrec.metrics import Metrics


class Lag:
    """Stores end offsets and committed offsets by partition, and publishes the lag in metrics and health."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._metrics = metrics
        self._health = health
        self._revocations = 0
        self._readable_ends: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._read_ts_ms: dict[int, int] = {}

    async def fetch(self, consumer: AIOKafkaConsumer, assigned: Collection[TopicPartition]) -> None:
        """Fetch the end offsets.

        Raises:
            KafkaError: the broker does not answer.
        """
        revocations = self._revocations
        ends = await consumer.end_offsets(assigned)  # up to the first open transaction
        if revocations != self._revocations:  # the offsets may be of revoked partitions
            return
        self._readable_ends = {place.partition: end for place, end in ends.items()}
        self._ends = dict(self._readable_ends)
        for place in assigned:
            with contextlib.suppress(AssertionError, IllegalStateError):  # no longer assigned
                self._ends[place.partition] = max(self._ends[place.partition], consumer.highwater(place) or 0)

    def read(self, partition: int, timestamp_ms: int) -> None:
        """Note the timestamp of the last record that was read from a partition; -1: it has none."""
        if timestamp_ms >= 0:
            self._read_ts_ms[partition] = timestamp_ms

    def committed(self, next_offsets: Mapping[int, int]) -> None:
        """Note committed offsets, by partition."""
        self._committed |= next_offsets
        self.publish()

    def is_behind(self, partition: int, position: int) -> bool:
        """Return whether a position is beyond the committed offset."""
        return position > self._committed.get(partition, position)

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Forget all offsets, and remove the gauges of the revoked partitions."""
        self._revocations += 1
        self._committed, self._ends, self._readable_ends = {}, {}, {}
        for partition in partitions:
            for gauge in (self._metrics.lag_records, self._metrics.lag_seconds):
                with contextlib.suppress(KeyError):
                    gauge.remove(str(partition.partition))
        self._health.lag_records = 0

    def publish(self) -> None:
        """Set the gauges and the health to the current lag."""
        now_ms = time.time() * 1000
        known = self._committed.keys() & self._ends.keys()
        waiting = 0
        for partition in known:
            committed = self._committed[partition]
            waiting += max(0, self._readable_ends[partition] - committed)
            lag = max(0, self._ends[partition] - committed)
            age_s = max(0.0, (now_ms - self._read_ts_ms.get(partition, now_ms)) / 1000) if lag else 0.0
            self._metrics.lag_records.labels(str(partition)).set(lag)
            self._metrics.lag_seconds.labels(str(partition)).set(age_s)
        self._health.lag_records = waiting
        if not waiting and len(known) == len(self._committed):
            self._health.progressed()
