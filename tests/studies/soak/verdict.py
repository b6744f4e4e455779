"""Compare topic, Redis, dead letters and archive in the end, by the oracle, which shares no code with the daemon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasrec import Engine
from streamrec.archive.segments import EventArchive
from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.schemas import PublishedList, UserSequence
from streamrec.serving.inspection import published, stored
from streamrec.settings import Settings

from studies.soak.feed import numbers_in
from support.oracle import Expected, assert_list, expected_sequences, is_bad
from support.topic_files import StoredRecord, read_topic_files


@dataclass(frozen=True)
class Verdict:
    """Counts; all but the first group and the copies of dead letters should be 0."""

    clicks: int
    users: int
    bad_records: int
    lists_by_version: int
    dead_letter_copies: int  # a crash between dead letter and commit makes one
    numbers_missing: int  # records that were acknowledged and are not in the topic
    numbers_twice: int  # records that the producer of the soak wrote twice
    lost: int
    doubled: int
    wrong_sequences: int
    wrong_lists: int
    dead_letters_missing: int
    dead_letters_wrong: int  # of no bad record, or with another content
    archive_lost: int
    archive_doubled: int

    @property
    def right(self) -> bool:
        """Whether no click was lost or doubled, and nothing else is wrong."""
        return not any(
            (
                self.numbers_missing,
                self.lost,
                self.doubled,
                self.wrong_sequences,
                self.wrong_lists,
                self.dead_letters_missing,
                self.dead_letters_wrong,
                self.archive_lost,
                self.archive_doubled,
            )
        )


async def judge(settings: Settings, logs: Path, numbers: int, note: Callable[[str], None]) -> Verdict:
    """Return the verdict.

    Args:
        logs: ``log.dirs`` of the broker.
        numbers: records that were acknowledged.
        note: gets a line about each wrong sequence, list and dead letter.
    """
    records = read_topic_files(logs, settings.kafka.topic)
    letters = read_topic_files(logs, settings.kafka.dead_letters)
    assert settings.sequences.max_len is not None and settings.archive.dir is not None
    users = expected_sequences(records, settings, settings.sequences.max_len)
    async with RedisClient(settings.redis) as redis:
        sequences = {user: value async for user, value in stored(redis, None)}
        lists = {user: value async for user, value in published(redis, None)}
    bad = [record for record in records if is_bad(record)]
    clicks = len(records) - len(bad)
    found = numbers_in(records)
    archived = EventArchive(settings.archive.dir).stats().events
    return Verdict(
        clicks=clicks,
        users=len(users),
        bad_records=len(bad),
        lists_by_version=len({value.model for value in lists.values() if value}),
        numbers_missing=sum(number not in found for number in range(numbers)),
        numbers_twice=sum(times > 1 for times in found.values()),
        **judged_sequences(sequences, users, note),
        wrong_lists=wrong_lists(lists, users, settings, note),
        **judged_letters(letters, bad, note),
        archive_lost=max(0, clicks - archived),
        archive_doubled=max(0, archived - clicks),
    )


def judged_sequences(
    sequences: dict[str, UserSequence | None], users: dict[str, Expected], note: Callable[[str], None]
) -> dict[str, int]:
    lost = doubled = wrong = 0
    for user in sequences.keys() | users.keys():
        found, wanted = sequences.get(user), users.get(user)
        more = (found.n if found else 0) - (wanted.n if wanted else 0)
        lost, doubled = lost + max(0, -more), doubled + max(0, more)
        left = found and (found.n, found.session_n, found.last_event_ts_ms, found.items)
        right = wanted and (wanted.n, wanted.session_n, wanted.last_event_ts_ms, wanted.items)
        if left != right:
            wrong += 1
            note(f"sequence of {user}: stored {left}, expected {right}")
    return {"lost": lost, "doubled": doubled, "wrong_sequences": wrong}


def wrong_lists(
    lists: dict[str, PublishedList | None],
    users: dict[str, Expected],
    settings: Settings,
    note: Callable[[str], None],
) -> int:
    """Return the number of users whose list is not the one that its model gives for all their clicks."""
    assert settings.registry.dir is not None
    registry, engines = Registry(settings.registry.dir), dict[str, Engine]()
    # of the soak itself; a round of retraining knows more items, with which fewer users get the popular list
    first = registry.versions()[0].version

    def engine_of(version: str) -> Engine:
        version = first if version == "popular" else version
        if version not in engines:
            saved = registry.load(version)
            engines[version] = Engine(saved.model, saved.vocab, version=saved.version, cache_bytes=0)
        return engines[version]

    wrong = 0
    for user in lists.keys() | users.keys():
        value, expected = lists.get(user), users.get(user)
        try:
            assert value is not None and expected is not None, f"list {value}, sequence {expected}"
            found, wanted = (value.n, value.event_ts_ms), (expected.n, expected.last_event_ts_ms)
            assert found == wanted, f"n and newest click {found}, expected {wanted}"
            assert not set(value.items) & set(expected.items), "an item that the user has seen"
            assert len(set(value.items)) == len(value.items) == len(value.scores), "an item twice"
            assert_list(user, value, expected, settings, engine_of(value.model))
        except AssertionError as error:
            wrong += 1
            note(f"list of {user} by {value.model if value else None}: {error}")
    return wrong


def judged_letters(letters: Iterable[StoredRecord], bad: Iterable[Any], note: Callable[[str], None]) -> dict[str, int]:
    origins = {(record.partition, record.offset): record for record in bad}
    found: Counter[tuple[int, int]] = Counter()
    wrong = 0
    for letter in letters:
        headers = {name: (value or b"").decode() for name, value in letter.headers}
        origin = int(headers["streamrec.partition"]), int(headers["streamrec.offset"])
        record = origins.get(origin)
        if (
            record is None
            or not headers["streamrec.reason"]
            or (letter.key, letter.value) != (record.key, record.value)
        ):
            wrong += 1
            note(f"dead letter of {origin}: {letter}, expected {record}")
        else:
            found[origin] += 1
    missing = origins.keys() - found.keys()
    for origin in missing:
        note(f"no dead letter of {origin}: {origins[origin]}")
    return {
        "dead_letters_missing": len(missing),
        "dead_letters_wrong": wrong,
        "dead_letter_copies": found.total() - len(found),
    }
