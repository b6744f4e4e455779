"""The lag of the assigned partitions, in metrics and health."""

from __future__ import annotations

from typing import Any

from aiokafka import TopicPartition

from streamrec.health import Health
from streamrec.kafka.lag import Lag
from streamrec.metrics import Metrics

PARTITIONS = [TopicPartition("clicks", number) for number in (0, 1)]


class Offsets:
    """A consumer of partitions that end at 10; of these, records up to 8 can be read, for a transaction is open."""

    def __init__(self) -> None:
        self.during_fetch: Any = lambda: None

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        self.during_fetch()
        return dict.fromkeys(partitions, 8)

    def highwater(self, partition: TopicPartition) -> int | None:
        return 10


def new_lag() -> tuple[Lag, Metrics, Health]:
    metrics, health = Metrics(), Health(1, 1)
    return Lag(metrics, health), metrics, health


def records(metrics: Metrics, partition: int) -> float | None:
    return metrics.registry.get_sample_value("streamrec_lag_records", {"partition": str(partition)})


async def test_lag_counts_from_the_committed_offset_to_the_end_health_to_what_can_be_read() -> None:
    lag, metrics, health = new_lag()
    lag.committed({0: 3, 1: 5})
    assert (records(metrics, 0), health.lag_records) == (None, 0)  # the ends are not known yet
    await lag.fetch(Offsets(), PARTITIONS)
    lag.publish()
    assert (records(metrics, 0), records(metrics, 1), health.lag_records) == (7, 5, 8)
    lag.committed({0: 8, 1: 8})
    assert (records(metrics, 0), records(metrics, 1), health.lag_records) == (2, 2, 0)


async def test_offsets_fetched_during_a_revocation_are_dropped() -> None:
    offsets = Offsets()
    lag, metrics, health = new_lag()
    lag.committed({0: 3})
    offsets.during_fetch = lambda: lag.revoked(PARTITIONS)
    await lag.fetch(offsets, PARTITIONS)
    lag.publish()
    assert (records(metrics, 0), health.lag_records) == (None, 0)


async def test_revoked_partitions_have_no_lag() -> None:
    lag, metrics, health = new_lag()
    lag.committed({0: 3, 1: 5})
    await lag.fetch(Offsets(), PARTITIONS)
    lag.publish()
    lag.revoked(PARTITIONS)
    assert (records(metrics, 0), records(metrics, 1), health.lag_records) == (None, None, 0)
