"""The lag of the assigned partitions: records between the committed offset and the end offset, and their age."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping

from aiokafka import AIOKafkaConsumer, TopicPartition

from streamrec.health import Health
from streamrec.metrics import Metrics


class Lag:
    """Stores end offsets and committed offsets by partition, and publishes the lag in metrics and health."""

    def __init__(self, consumer: AIOKafkaConsumer, metrics: Metrics, health: Health) -> None:
        self._consumer = consumer
        self._metrics = metrics
        self._health = health
        self._revocations = 0
        self._end_offsets: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._read_ts_ms: dict[int, int] = {}

    async def fetch(self, assigned: Collection[TopicPartition]) -> None:
        """Fetch the end offsets, and the committed offsets that are not known yet.

        Raises:
            KafkaError: the broker does not answer.
        """
        revocations, begins = self._revocations, {}
        ends = await self._consumer.end_offsets(assigned)
        for partition in assigned:
            if partition.partition not in self._committed:
                committed = await self._consumer.committed(partition)
                begins[partition.partition] = (
                    await self._consumer.position(partition) if committed is None else committed
                )
        if revocations == self._revocations:  # otherwise the offsets may be of revoked partitions
            self._committed = begins | self._committed
            self._end_offsets = {partition.partition: end for partition, end in ends.items()}

    def read(self, partition: int, timestamp_ms: int) -> None:
        """Note the timestamp of the last record that was read from a partition."""
        self._read_ts_ms[partition] = timestamp_ms

    def committed(self, next_offsets: Mapping[int, int]) -> None:
        """Note committed offsets, by partition."""
        self._committed |= next_offsets
        self.publish()

    def revoked(self, partitions: Collection[TopicPartition]) -> None:
        """Forget all offsets, and remove the gauges of the revoked partitions."""
        self._revocations += 1
        self._committed, self._end_offsets = {}, {}
        for partition in partitions:
            for gauge in (self._metrics.lag_records, self._metrics.lag_seconds):
                with contextlib.suppress(KeyError):
                    gauge.remove(str(partition.partition))
        self._health.lag_records = 0

    def publish(self) -> None:
        """Set the gauges and the health to the current lag."""
        now_ms = time.time() * 1000
        total = 0
        for partition, committed in self._committed.items():
            lag = max(0, self._end_offsets.get(partition, committed) - committed)
            total += lag
            age_s = max(0.0, (now_ms - self._read_ts_ms.get(partition, now_ms)) / 1000) if lag else 0.0
            self._metrics.lag_records.labels(str(partition)).set(lag)
            self._metrics.lag_seconds.labels(str(partition)).set(age_s)
        self._health.lag_records = total
        if not total:
            self._health.progressed()
