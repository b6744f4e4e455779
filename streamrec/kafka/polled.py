"""Decode the records of a poll to events and dead letters; log missing offsets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiokafka import ConsumerRecord, TopicPartition

from streamrec.errors import BadRecord
from streamrec.kafka.decode import EventDecoder
from streamrec.kafka.marks import mark_of_last
from streamrec.kafka.records import Gap, Unreadable
from streamrec.schemas import ClickEvent, DeadLetter, RecordMark

log = logging.getLogger(__name__)


@dataclass
class Decoded:
    """The content of consecutive records."""

    events: list[ClickEvent] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    ignored: int = 0
    marks: dict[int, RecordMark] = field(default_factory=dict)  # of the last record, by partition

    def add(self, decoder: EventDecoder, records: Sequence[ConsumerRecord]) -> None:
        """Decode records of one partition. Gaps among them are logged, in one line."""
        gaps: list[Gap] = []
        mark = mark_of_last(records)
        if mark is not None:
            self.marks[records[-1].partition] = mark
        for record in records:
            if isinstance(record, Gap):
                gaps.append(record)
                continue
            try:
                if isinstance(record, Unreadable):
                    raise BadRecord(record.reason)
                clicks = decoder.decode(record.value, record.partition, record.offset, record.timestamp)
            except BadRecord as error:
                self.dead_letters.append(dead_letter(record, str(error)))
                continue
            if clicks:
                self.events += clicks
            else:
                self.ignored += 1
        if gaps:
            missing = sum(gap.offset - gap.first + 1 for gap in gaps)
            place = TopicPartition(gaps[0].topic, gaps[0].partition)
            warn_of_lost(
                place,
                gaps[0].first,
                gaps[-1].offset,
                missing,
                "compaction has removed them; cleanup.policy of a click topic is delete",
            )


def dead_letter(record: ConsumerRecord, reason: str) -> DeadLetter:
    """Return the dead letter of a record."""
    return DeadLetter(record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, reason)


def warn_of_lost(place: TopicPartition, first: int, last: int, missing: int, why: str) -> None:
    """Log that records between two offsets were never read, and cannot be read any more."""
    log.warning(
        "clicks are lost: %d records were not read, and are not in the topic any more: %s",
        missing,
        why,
        extra={"topic": place.topic, "partition": place.partition, "first": first, "last": last},
    )
