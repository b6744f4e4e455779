"""The lag of the assigned partitions, in metrics and health."""

from __future__ import annotations

from typing import Any

from aiokafka import TopicPartition

from streamrec.health import Health
from streamrec.kafka.lag import Lag
from streamrec.metrics import Metrics

PARTITIONS = [TopicPartition("clicks", number) for number in (0, 1)]


class Offsets:
    """A consumer at position 5 of each partition, whose group has committed offset 3 of partition 0 alone."""

    def __init__(self) -> None:
        self.during_fetch: Any = lambda: None

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        self.during_fetch()
        return dict.fromkeys(partitions, 10)

    async def committed(self, partition: TopicPartition) -> int | None:
        return 3 if partition.partition == 0 else None

    async def position(self, partition: TopicPartition) -> int:
        return 5


def lag_of(offsets: Offsets) -> tuple[Lag, Metrics, Health]:
    metrics, health = Metrics(), Health(1, 1)
    return Lag(offsets, metrics, health), metrics, health


def records(metrics: Metrics, partition: int) -> float | None:
    return metrics.registry.get_sample_value("streamrec_lag_records", {"partition": str(partition)})


async def test_lag_counts_from_the_committed_offset_else_from_the_position() -> None:
    lag, metrics, health = lag_of(Offsets())
    await lag.fetch(PARTITIONS)
    lag.publish()
    assert (records(metrics, 0), records(metrics, 1), health.lag_records) == (7, 5, 12)
    lag.committed({0: 10, 1: 9})
    assert (records(metrics, 0), records(metrics, 1), health.lag_records) == (0, 1, 1)


async def test_offsets_fetched_during_a_revocation_are_dropped() -> None:
    offsets = Offsets()
    lag, metrics, health = lag_of(offsets)
    offsets.during_fetch = lambda: lag.revoked(PARTITIONS)
    await lag.fetch(PARTITIONS)
    lag.publish()
    assert (records(metrics, 0), health.lag_records) == (None, 0)


async def test_revoked_partitions_have_no_lag() -> None:
    lag, metrics, health = lag_of(Offsets())
    await lag.fetch(PARTITIONS)
    lag.publish()
    lag.revoked(PARTITIONS)
    assert (records(metrics, 0), records(metrics, 1), health.lag_records) == (None, None, 0)
