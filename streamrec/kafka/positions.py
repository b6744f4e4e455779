"""The offsets from which partitions are read.

    the group has no commit at all     auto_offset_reset: the beginning or, by `begin_at_end`, the end
    a partition has no commit          its beginning: it was added later
    the commit is of an earlier epoch  its beginning: the topic was created again
    the offset is no longer there      the first that is, with a warning

A start is committed when the partition is assigned, so that a crash or a rebalance does not decide again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError, OffsetOutOfRangeError
from aiokafka.structs import OffsetAndMetadata

from streamrec.errors import KafkaUnavailable, RedisUnavailable
from streamrec.health import Health
from streamrec.kafka.connection import BROKER_TIMEOUT_S, NO_RIGHT, connection_options, kafka_error, start_client
from streamrec.kafka.lag import Lag
from streamrec.kafka.marks import later_epoch
from streamrec.kafka.polled import warn_of_lost
from streamrec.kafka.records import READING
from streamrec.kafka.topics import topic_partitions
from streamrec.schemas import RecordMark
from streamrec.setting_groups import KafkaSettings

log = logging.getLogger(__name__)

COMMIT_PASSED_EVERY_S = 1.0
COMMIT_MARK = re.compile(r"streamrec topic epoch (\d+)")


async def begin_at_end(kafka: KafkaSettings) -> None:
    """Commit the ends of all partitions for a group that has no commit. Its members do this before they join.

    Raises:
        KafkaUnavailable: no broker answers. KafkaForbidden: a right is missing.
    """
    count = (await topic_partitions(kafka, (kafka.topic,)))[kafka.topic]
    partitions = [TopicPartition(kafka.topic, number) for number in range(count)]
    consumer = AIOKafkaConsumer(**connection_options(kafka), **READING, group_id=kafka.group)
    await start_client(kafka, consumer)
    try:
        async with asyncio.timeout(BROKER_TIMEOUT_S):  # the client would try again without end
            if await committed(consumer, partitions):
                return
            ends = await consumer.end_offsets(partitions)
            # not consumer.commit: it would first assign and fetch
            await vars(consumer)["_coordinator"].commit_offsets(
                None, {place: OffsetAndMetadata(end, _mark(kafka)) for place, end in ends.items()}
            )
        log.info("a new group begins at the end of the topic", extra={"group": kafka.group, "topic": kafka.topic})
    except CommitFailedError:
        pass  # the group has members, which have committed
    except (KafkaError, OSError) as error:
        raise kafka_error(kafka, error) from error
    finally:
        await consumer.stop()


def _mark(kafka: KafkaSettings) -> str:
    """Return the metadata of a commit, which COMMIT_MARK reads."""
    return f"streamrec topic epoch {kafka.topic_epoch}"


async def committed(
    consumer: AIOKafkaConsumer, partitions: Collection[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Return the commits of those partitions that have one, in one request."""
    found: dict[TopicPartition, OffsetAndMetadata] = await vars(consumer)["_coordinator"].fetch_committed_offsets(
        list(partitions)
    )
    return found


class Marks(Protocol):
    """Marks of earlier records of the topic (serving/topic_marks.py)."""

    async def check(self, partitions: Collection[int]) -> None:
        """Compare partitions of the topic with their marks."""

    def note(self, marks: Mapping[int, RecordMark]) -> None:
        """Note the last committed record of partitions."""


class Positions:
    """The positions and commits of a member of the group."""

    def __init__(
        self, kafka: KafkaSettings, consumer: AIOKafkaConsumer, marks: Marks, lag: Lag, health: Health
    ) -> None:
        self._kafka = kafka
        self._consumer = consumer
        self._marks = marks
        self._lag = lag
        self._health = health
        self._unsettled: frozenset[TopicPartition] = frozenset()
        self._passed_s = 0.0

    @property
    def settled(self) -> bool:
        """Whether all assigned partitions are read from where they must be."""
        return not self._unsettled

    def assigned(self, partitions: Collection[TopicPartition]) -> None:
        """Note the partitions that ``settle`` has to place."""
        self._unsettled = frozenset(partitions)
        self._health.positions_known = self.settled

    async def settle(self) -> None:
        """Place newly assigned partitions where they are read from, and commit the starts that the group lacks.

        If Kafka does not answer, they remain unsettled.

        Raises:
            KafkaForbidden: a right is missing. TopicChanged: the topic is not the one that was read before.
        """
        assigned = self._unsettled
        if not assigned:
            return
        try:
            async with asyncio.timeout(BROKER_TIMEOUT_S):
                found = self._of_this_epoch(await committed(self._consumer, assigned))
            await self._marks.check([place.partition for place in assigned])
            async with asyncio.timeout(BROKER_TIMEOUT_S):
                begins = await self._consumer.beginning_offsets(assigned - found.keys())
        except (KafkaUnavailable, RedisUnavailable):
            return
        except (KafkaError, OSError) as error:
            if isinstance(error, NO_RIGHT):
                raise kafka_error(self._kafka, error) from error
            return
        if assigned != self._unsettled:  # a rebalance came in between
            return
        try:
            for place, offset in (found | begins).items():
                self._consumer.seek(place, offset)
            self._lag.committed({place.partition: offset for place, offset in found.items()})
            await self.commit({place.partition: offset for place, offset in begins.items()})
        except (KafkaUnavailable, IllegalStateError):
            return
        if assigned == self._unsettled:
            self.assigned(())

    def _of_this_epoch(self, commits: Mapping[TopicPartition, OffsetAndMetadata]) -> dict[TopicPartition, int]:
        """Return the offsets of the commits that are of this topic, not of one that it was created again after.

        Raises:
            SettingsError: a daemon with a later topic epoch has committed.
        """
        offsets = {}
        for place, commit in commits.items():
            mark = COMMIT_MARK.fullmatch(commit.metadata)  # other tools commit without
            epoch = int(mark[1]) if mark else self._kafka.topic_epoch
            if epoch > self._kafka.topic_epoch:
                raise later_epoch(self._kafka, f"the commits of group {self._kafka.group}", epoch)
            if epoch == self._kafka.topic_epoch:
                offsets[place] = commit.offset
        return offsets

    async def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Commit offsets, by partition; a commit that a rebalance has overtaken is dropped.

        Raises:
            KafkaUnavailable: the offsets were not written; try again. KafkaForbidden: a right is missing.
        """
        if not next_offsets:
            return
        offsets = {TopicPartition(self._kafka.topic, number): offset for number, offset in next_offsets.items()}
        try:
            async with asyncio.timeout(BROKER_TIMEOUT_S):  # the client would try again without end
                await self._consumer.commit({place: (offset, _mark(self._kafka)) for place, offset in offsets.items()})
        except (CommitFailedError, IllegalStateError):
            log.info("commit refused after a rebalance; the events will be redelivered, and skipped")
            return
        except (KafkaError, OSError) as error:
            self._health.kafka_takes_commits = False
            raise kafka_error(self._kafka, error) from error
        self._health.kafka_takes_commits = True
        self._health.progressed()
        self._lag.committed(next_offsets)

    async def commit_passed(self, at_once: bool) -> None:
        """Commit what needed no work: control records, aborted transactions, offsets that retention has removed.

        Only between batches: all that was polled has been handled.
        """
        now_s = self._health.now_s()
        if now_s - self._passed_s < COMMIT_PASSED_EVERY_S and not at_once:
            return
        self._passed_s = now_s
        with contextlib.suppress(KafkaUnavailable, IllegalStateError):  # the next one includes these offsets
            offsets = {place.partition: await self._consumer.position(place) for place in self._consumer.assignment()}
            await self.commit({number: o for number, o in offsets.items() if self._lag.is_behind(number, o)})

    async def drained(self) -> bool:
        """Return whether the group is joined and every assigned partition read to its end."""
        assigned = list(self._consumer.assignment())
        if not self._health.joined:
            return False
        try:
            async with asyncio.timeout(BROKER_TIMEOUT_S):
                ends = await self._consumer.end_offsets(assigned) if assigned else {}
                return all([await self._consumer.position(partition) >= ends[partition] for partition in assigned])
        except (KafkaError, OSError):  # unreachable, or a rebalance began: try after the next poll
            return False

    async def after(self, place: TopicPartition, records: Sequence[ConsumerRecord]) -> int:
        """Return the offset after polled records, and after the control records that follow them."""
        try:
            position: int = await self._consumer.position(place)
        except IllegalStateError:  # revoked
            return int(records[-1].offset) + 1
        return position

    async def move_into_range(self, error: OffsetOutOfRangeError) -> None:
        """Continue at the first offset that the topic still has; without an answer, the next poll fails again."""
        with contextlib.suppress(KafkaError, IllegalStateError, OSError):
            await move_into_range(self._consumer, error)


async def move_into_range(consumer: AIOKafkaConsumer, error: OffsetOutOfRangeError) -> None:
    """Continue at the first offset that the topic still has, and log the lost offsets.

    Raises:
        KafkaError, TimeoutError: Kafka does not answer.
    """
    async with asyncio.timeout(BROKER_TIMEOUT_S):
        for place, offset in error.args[0].items():
            begin = (await consumer.beginning_offsets([place]))[place]
            end = (await consumer.end_offsets([place]))[place]
            if offset < begin:
                warn_of_lost(place, offset, begin - 1, begin - offset, "retention or a deletion has removed them")
            else:
                log.warning(
                    "the topic ends before the next offset: it was cut back or created again. All that it has is read",
                    extra={"topic": place.topic, "partition": place.partition, "next": offset, "end": end},
                )
            consumer.seek(place, begin)
