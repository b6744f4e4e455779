"""Compute from the click topic what Redis and the dead-letter topic must contain in the end, and compare.

The daemon's decoding, appending and caching are not used: records are read with json, sequences are plain lists,
scores come from a new Engine without a cache.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sasrec import Engine, load_model
from streamrec.redis.client import RedisClient
from streamrec.schemas import PublishedList, UserSequence
from streamrec.serving.inspection import published, stored
from streamrec.settings import Settings

from support.kafka_client import read_topic
from support.sessions import current_session
from support.workload import BAD

TOLERANCE = 1e-3
LONGEST_DEAD_LETTER = 900_000


@dataclass
class Expected:
    """The expected sequence of a user, from all clicks in the order of their application."""

    max_len: int
    gap_ms: float
    all_items: list[str] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)

    def append(self, item: str, ts_ms: int) -> None:
        self.all_items.append(item)
        self.times_ms.append(ts_ms)

    @property
    def n(self) -> int:
        return len(self.all_items)

    @property
    def session_n(self) -> int:
        return self.n - current_session(self.times_ms, self.gap_ms)

    @property
    def last_event_ts_ms(self) -> int:
        return max(self.times_ms, default=0)

    @property
    def items(self) -> list[str]:
        return self.all_items[-self.session_n :][-self.max_len :]


def is_bad(record: Any) -> bool:
    return any(name == BAD for name, _ in record.headers)


def expected_sequences(records: list[Any], settings: Settings, max_len: int) -> dict[str, Expected]:
    """Return every user's sequence, from records in partition and offset order."""
    users: dict[str, Expected] = {}
    for record in records:
        if not is_bad(record):
            event = json.loads(record.value)
            ts_ms = event.get(settings.events.timestamp) or record.timestamp
            new = Expected(max_len, settings.sequences.session_gap_s * 1000)
            user = users.setdefault(str(event[settings.events.user_id]), new)
            for item in map(str, items_of(event, settings)):
                for role in role_of(event, settings).split("+"):
                    if role == "click":
                        user.append(item, ts_ms)
                    elif role == "exclude":
                        user.excluded.add(item)
    return {name: user for name, user in users.items() if user.n or user.excluded}  # some have only empty orders


def role_of(event: dict[str, Any], settings: Settings) -> str:
    """Return the role of an event."""
    kind = event.get("event_type")
    return "click" if kind is None or not settings.events.roles else settings.events.roles.get(kind, "ignore")


def items_of(event: dict[str, Any], settings: Settings) -> list[Any]:
    """Return the items of an event, or of an order of the workload, in order."""
    if "products" in event:
        return [product["id"] for product in event["products"]]
    return [event[settings.events.item_id.split("|")[0]]]


async def assert_delivered(settings: Settings) -> dict[str, Expected]:
    """Assert that each event is in Redis once, each list comes from the model, and each bad record is a dead letter.

    Return the expected sequences.
    """
    assert settings.model.dir is not None
    records = await read_topic(settings, settings.kafka.topic)
    saved = load_model(settings.model.dir)
    max_len = settings.sequences.max_len or saved.model.config.max_len
    users = expected_sequences(records, settings, max_len)
    async with RedisClient(settings.redis) as redis:
        sequences = {user: value async for user, value in stored(redis, None)}
        lists = {user: value async for user, value in published(redis, None)}
    assert_sequences(sequences, users)
    assert_lists(lists, users, settings, Engine(saved.model, saved.vocab, version=saved.version, cache_bytes=0))
    await assert_dead_letters(settings, [record for record in records if is_bad(record)])
    return users


def assert_sequences(sequences: dict[str, UserSequence | None], users: dict[str, Expected]) -> None:
    found = {u: (s.n, s.session_n, s.last_event_ts_ms, s.items) for u, s in sequences.items() if s is not None}
    wanted = {u: (e.n, e.session_n, e.last_event_ts_ms, e.items) for u, e in users.items() if e.n}
    wrong = [user for user in wanted.keys() | found.keys() if wanted.get(user) != found.get(user)]
    shown = "\n".join(f"{user}: stored {found.get(user)}, expected {wanted.get(user)}" for user in wrong[:5])
    assert not wrong, f"{len(wrong)} of {len(wanted)} users are wrong (n, session_n, last_event_ts_ms, items):\n{shown}"


def assert_lists(
    lists: dict[str, PublishedList | None], users: dict[str, Expected], settings: Settings, engine: Engine
) -> None:
    assert lists.keys() == users.keys(), lists.keys() ^ users.keys()
    for user, expected in users.items():
        value = lists[user]
        assert value is not None
        assert (value.n, value.event_ts_ms) == (expected.n, expected.last_event_ts_ms), user
        assert len(set(value.items)) == len(value.items) == len(value.scores), user
        assert not set(value.items) & expected.excluded, f"{user} has excluded items in the list"
        if not settings.lists.filter_seen or not set(value.items) & set(expected.items):
            assert_list(user, value, expected, settings, engine)
        else:
            raise AssertionError(f"{user} has seen items of the list: {value.items}, {expected.items}")


def assert_list(user: str, value: PublishedList, expected: Expected, settings: Settings, engine: Engine) -> None:
    """Assert that the list has the best scores of a new engine; equal scores may be in any order."""
    best = engine.recommend(
        [expected.items], k=len(engine.vocab), counts=[expected.session_n], filter_seen=settings.lists.filter_seen
    )[0]
    if best is None:
        assert value.model == "popular", f"{user} has no known item in the window, but model {value.model}"
        return
    assert value.model == engine.version, f"{user}: model {value.model}, expected {engine.version}"
    score_of = {i: s for i, s in zip(best.items, best.scores, strict=True) if i not in expected.excluded}
    wanted = list(score_of.values())[: settings.lists.top_k]
    assert len(value.scores) == len(wanted), user
    for item, score, at_this_place in zip(value.items, value.scores, wanted, strict=True):
        assert abs(score - at_this_place) < TOLERANCE, f"{user}: {value.scores} but a new engine gives {wanted}"
        assert abs(score - score_of[item]) < TOLERANCE, f"{user}: {item} has {score}, not {score_of[item]}"


async def assert_dead_letters(settings: Settings, bad: list[Any]) -> None:
    """Assert that the topic has each bad record at least once, with origin, reason and bytes, and nothing else."""
    origins = {(record.partition, record.offset): record for record in bad}
    found: Counter[tuple[int, int]] = Counter()
    for letter in await read_topic(settings, settings.kafka.dead_letters):
        headers = {name: value.decode() for name, value in letter.headers}
        origin = (int(headers["streamrec.partition"]), int(headers["streamrec.offset"]))
        assert origin in origins, f"{origin} is no bad record: {headers}"
        record = origins[origin]
        assert headers["streamrec.topic"] == settings.kafka.topic
        assert headers["streamrec.timestamp_ms"] == str(record.timestamp)
        assert headers["streamrec.reason"]
        assert letter.key == record.key
        if record.value is not None and len(record.value) > LONGEST_DEAD_LETTER:
            assert record.value.startswith(letter.value)
            assert headers["streamrec.cut_from_bytes"] == str(len(record.value))
        else:
            assert letter.value == record.value
        found[origin] += 1
    missing = origins.keys() - found.keys()
    assert not missing, f"{len(missing)} bad records are no dead letters: {sorted(missing)[:5]}"
