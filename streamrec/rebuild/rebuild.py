"""`streamrec rebuild`: Redis from the archive and what the topic holds after it, while daemons run.

read       the archive, and the topic from the archive's end to its own; nothing is committed
popular    click counts, where Redis has lost them
rebuild    users in batches, who clicked last first: the stored sequence is replaced by what all clicks make, unless it
           has changed since it was looked at
publish    the lists of these users
again      users of whom a daemon has applied clicks that were not read yet, once they are

What is stored stays if it holds as much, or a click that neither archive nor topic do. So a second run changes
nothing, and one that was killed is simply begun again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from streamrec.archive.segments import EventArchive
from streamrec.errors import StreamrecError
from streamrec.kafka.connection import ignore_abandoned_requests
from streamrec.kafka.reader import TopicReader
from streamrec.metrics import Metrics
from streamrec.rebuild.past_clicks import PastClicks
from streamrec.redis.client import RedisClient
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script
from streamrec.schemas import UserSequence, parse_published
from streamrec.serving.lists import SharedLists
from streamrec.serving.model import ServedModel, read_model
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import StoredSequence
from streamrec.settings import Settings

log = logging.getLogger(__name__)

REPLACE = Script(__package__, "replace", replicated=True)
BATCH_USERS = 256
PACE_S = 0.5  # where there is a rate a batch holds the users of so long
AGAIN_S = 60.0  # so long after the last success nobody is tried again
SAID_EVERY_S = 10.0


class Change(NamedTuple):
    """What is to stand in the place of what is stored of a user, and his list as it is."""

    user: str
    stored: bytes | None
    sequence: StoredSequence
    old_list: bytes | None


@dataclass
class Report:
    """What became of the users."""

    rebuilt: int = 0
    kept: int = 0
    ahead: int = 0
    too_old: int = 0
    lists: int = 0
    popularity: bool = False

    def __str__(self) -> str:
        return (
            f"{self.rebuilt:,} users rebuilt, {self.kept:,} kept as they were, {self.ahead:,} kept as only Redis knows "
            f"some of their clicks, {self.too_old:,} too old, {self.lists:,} lists published"
            f"{', popularity counted anew' if self.popularity else ''}"
        )


async def rebuild(settings: Settings, rate_per_s: float = 0.0, dry_run: bool = False) -> Report:
    """Bring back what Redis has lost.

    Args:
        rate_per_s: users a second; 0 is as fast as possible.
        dry_run: only say what would be done.

    Raises:
        StreamrecError: archive, topic, model or Redis cannot be used; what was done stays, and is not done again.
    """
    assert settings.archive.dir is not None
    torch.set_num_threads(settings.inference.threads)
    ignore_abandoned_requests(asyncio.get_running_loop())
    served = ServedModel.of(
        read_model(settings), settings.inference, settings.sequences.max_len, cache_bytes=0
    )  # each user is scored once
    async with RedisClient(settings.redis) as redis:
        await redis.check_format(claim=not dry_run)
        archive = EventArchive(settings.archive.dir, settings.kafka.topic_epoch)
        past = await asyncio.to_thread(PastClicks, archive, settings.sequences, served.max_len)
        log.info("archive read", extra={"clicks": len(past), "archive": archive.folder})
        async with TopicReader(settings.kafka, settings.events, past.next_offsets) as reader:
            lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, served.max_len, served.vocab)
            predictor = Predictor(served.engine, lists, settings.lists, settings.serving.rescore_users, Metrics())
            rebuilder = Rebuilder(settings, redis, past, reader, lists, predictor)
            await rebuilder.run(rate_per_s, dry_run)
            return rebuilder.report


class Rebuilder:
    """Replaces what is stored of users by what their past clicks make, and publishes their lists."""

    def __init__(
        self,
        settings: Settings,
        redis: RedisClient,
        past: PastClicks,
        reader: TopicReader,
        lists: SharedLists,
        predictor: Predictor,
    ) -> None:
        self._settings = settings
        self._keys = redis.keys
        self._redis = redis
        self._past = past
        self._reader = reader
        self._lists = lists
        self._predictor = predictor
        self._publisher = Publisher(redis, settings.lists.ttl_s, Metrics())
        self._refreshed_s = 0.0
        self._dry_run = False
        self.report = Report()

    async def run(self, rate_per_s: float, dry_run: bool) -> None:
        """All users, and the popularity."""
        self._dry_run = dry_run
        await self._read_on()
        while not await self._reader.drained():
            await self._read_on()
        log.info("topic read", extra={"topic": self._settings.kafka.topic, "clicks_in_all": len(self._past)})
        if not dry_run:
            await self._restore_popularity()
        users, again = self._past.users(), []
        size = min(BATCH_USERS, max(1, int(rate_per_s * PACE_S))) if rate_per_s else BATCH_USERS
        with _progress(len(users)) as told:
            for begin in range(0, len(users), size):
                began_s = time.monotonic()
                await self._read_on(timeout_ms=0)
                again += await self._rebuild(users[begin : begin + size])
                told(min(len(users), begin + size))
                if rate_per_s:
                    await asyncio.sleep(max(0.0, began_s + size / rate_per_s - time.monotonic()))
        await self._try_again(again)

    async def _restore_popularity(self) -> None:
        counts, counted_ms = self._past.popularity(self._settings.lists.popular_half_life_s)
        began_ms = None if self._past.has_imported else self._past.first_ts_ms
        await self._lists.refresh()
        self.report.popularity = await self._lists.restore(counts, counted_ms, began_ms)

    async def _try_again(self, users: list[str]) -> None:
        until_s = time.monotonic() + AGAIN_S
        while users and time.monotonic() < until_s:
            await self._read_on()
            left = []
            for begin in range(0, len(users), BATCH_USERS):
                left += await self._rebuild(users[begin : begin + BATCH_USERS])
            if len(left) < len(users):
                until_s = time.monotonic() + AGAIN_S
            users = left
        self.report.ahead += len(users)

    async def _read_on(self, timeout_ms: int | None = None) -> None:
        await self._reader.find_partitions()
        for stretch in (await self._reader.poll(timeout_ms)).values():
            self._past.add(stretch.events)

    async def _rebuild(self, users: list[str]) -> list[str]:
        """Some users; returns those who are to be tried again."""
        values = await self._redis.get_many([self._keys.sequence(user) for user in users])
        published = await self._redis.get_many([self._keys.recommendation(user) for user in users])
        again: list[str] = []
        changes: list[Change] = []
        to_publish: list[UserSequence] = []
        for user, value, old_list in zip(users, values, published, strict=True):
            stored = StoredSequence.decode(user, value) if value is not None else None
            whole = self._past.sequence_of(user)
            if stored is not None and not _covers(user, whole, stored):
                if self._is_unread(stored):
                    again.append(user)
                else:
                    self.report.ahead += 1
            elif stored is None and self._left_s(whole, self._settings.sequences.ttl_s) <= 0:
                self.report.too_old += 1
            elif (better := _better(stored, whole)) is not None:
                changes.append(Change(user, value, better, old_list))
            else:
                assert stored is not None
                self.report.kept += 1
                if self._wants_list(stored, old_list):
                    to_publish.append(_sequence(user, stored))
        for change, done in zip(changes, await self._replace(changes), strict=True):
            if not done:
                again.append(change.user)
                continue
            self.report.rebuilt += 1
            if change.old_list is not None or self._wants_list(change.sequence, None):
                to_publish.append(_sequence(change.user, change.sequence))
        await self._publish(to_publish)
        return again

    async def _replace(self, changes: list[Change]) -> list[bool]:
        """Compare-and-set; what a daemon has changed meanwhile stays."""
        if self._dry_run or not changes:
            return [True] * len(changes)
        calls: list[tuple[list[str], list[RedisArg]]] = []
        for change in changes:
            ttl_s = max(1, self._left_s(change.sequence, self._settings.sequences.ttl_s))
            args: list[RedisArg] = [change.stored or b"", change.sequence.encode(), ttl_s]
            calls.append(([self._keys.sequence(change.user)], args))
        return [bool(done) for (done,) in await self._redis.run_each(REPLACE, [], calls)]

    async def _publish(self, sequences: list[UserSequence]) -> None:
        self.report.lists += len(sequences)
        if self._dry_run or not sequences:
            return
        if time.monotonic() - self._refreshed_s > self._settings.lists.refresh_s:  # the blocklist may have changed
            await self._lists.refresh()
            self._refreshed_s = time.monotonic()
        await self._publisher.publish(await self._predictor.predict(sequences))

    def _is_unread(self, stored: StoredSequence) -> bool:
        """Whether a click that it holds is yet to be read; else it is in neither archive nor topic."""
        return any(offset >= self._reader.next_offsets.get(p, 0) for p, offset in stored.offsets.items())

    def _wants_list(self, sequence: StoredSequence, old_list: bytes | None) -> bool:
        """Whether the list is of fewer clicks, or missing though it would not have expired yet."""
        if old_list is None:
            return self._left_s(sequence, self._settings.lists.ttl_s) > 0
        with contextlib.suppress(StreamrecError):
            return parse_published("", old_list).n < sequence.n
        return True

    def _left_s(self, sequence: StoredSequence, ttl_s: int) -> int:
        """How long something would live yet that the last click has written."""
        return min(ttl_s, int(ttl_s - time.time() + sequence.last_event_ts_ms / 1000))


def _covers(user: str, whole: StoredSequence, stored: StoredSequence) -> bool:
    """Whether all that is stored went into the other too.

    Raises:
        StreamrecError: it is of a later topic epoch than the one that is set.
    """
    if stored.topic_epoch > whole.topic_epoch:
        raise StreamrecError(
            f"the stored sequence of user {user!r} is of topic epoch {stored.topic_epoch}, and kafka_topic_epoch is "
            f"{whole.topic_epoch}: set STREAMREC_KAFKA_TOPIC_EPOCH as the daemons have it"
        )
    if stored.topic_epoch < whole.topic_epoch:  # its offsets say nothing of this topic
        return True
    return all(whole.offsets.get(partition, -1) >= offset for partition, offset in stored.offsets.items())


def _better(stored: StoredSequence | None, whole: StoredSequence) -> StoredSequence | None:
    """What is to stand in the place of a sequence that is covered; None where it holds as much."""
    if stored is None or whole.n > stored.n:
        return whole
    if whole.kept <= stored.kept:
        return None
    # as many clicks or more were counted, but fewer items kept: max_len has grown
    if whole.n == stored.n:
        return whole
    return dataclasses.replace(whole, n=stored.n, session_n=max(stored.session_n, whole.session_n))


def _sequence(user: str, stored: StoredSequence) -> UserSequence:
    return UserSequence(user, stored.stored, stored.n, stored.session_n, stored.last_event_ts_ms)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Takes how many users are done: for a progress bar on a terminal, else for a line now and then."""
    console = Console(stderr=True)
    said_s = time.monotonic()
    with Progress(
        TextColumn("rebuild"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("users"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("rebuild", total=total)

        def told(done: int) -> None:
            nonlocal said_s
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - said_s > SAID_EVERY_S:
                said_s = time.monotonic()
                log.info("rebuilding", extra={"users": done, "of": total})

        yield told
