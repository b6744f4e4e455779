"""`streamrec rebuild`: restore Redis from the archive and the clicks that the topic has after it, while daemons run.

read       the archive, and the topic from the archive's end to its own; nothing is committed
popular    restore click counts if Redis has lost some
rebuild    users in batches, the latest click first: replace the stored sequence by one made from all past clicks,
           unless it has changed since it was read
publish    new lists for these users
retry      users with clicks that a daemon has applied and the rebuild has not read yet

A stored sequence is not replaced if it is as complete, or has a click that archive and topic lack. So a second run
changes nothing, and after a crash the rebuild is simply started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from sasrec.data.times import EARLIEST_MS
from streamrec.archive.segments import EventArchive
from streamrec.errors import RedisRefused, RedisRejected, RedisUnavailable, StreamrecError
from streamrec.items.source import followed_items
from streamrec.kafka.connection import ignore_abandoned_requests
from streamrec.kafka.reader import TopicReader
from streamrec.logs import LogOnce
from streamrec.metrics import Metrics
from streamrec.rebuild.choice import includes, replacement
from streamrec.rebuild.past_clicks import PastClicks
from streamrec.rebuild.report import Report, show_progress
from streamrec.redis.client import RedisClient
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script
from streamrec.schemas import EventBatch, UserSequence, parse_published
from streamrec.serving.lists import SharedLists, most_unwanted
from streamrec.serving.model import ServedModel, read_model
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore, StoredSequence
from streamrec.settings import Settings

log = logging.getLogger(__name__)

REPLACE = Script(__package__, "replace", replicated=True, control=("", "value", 60))
MAX_BATCH_USERS, MAX_BATCH_EXCLUSIONS = 256, 1_000
RATED_BATCH_S = 0.5  # with a rate limit, a batch has the users of this time
REDIS_TIMEOUT_S, REDIS_PAUSE_S = 60.0, 0.5  # a Redis that does not answer ends the rebuild after this time
RETRY_TIMEOUT_S = 60.0  # retries end this long after the last one that succeeded
R = TypeVar("R")


class Change(NamedTuple):
    """The value to replace, the sequence to store instead, and the user's published list."""

    user: str
    value: bytes | None
    sequence: StoredSequence
    published: bytes | None


async def rebuild(settings: Settings, rate_per_s: float = 0.0, dry_run: bool = False) -> Report:
    """Restore sequences, lists and click counts that Redis has lost; return the report.

    Args:
        rate_per_s: users per second; 0: as fast as possible.
        dry_run: change nothing, only report.

    Raises:
        StreamrecError: archive, topic, model or Redis cannot be used. A second run continues from there.
    """
    assert settings.archive.dir is not None
    torch.set_num_threads(settings.inference.threads)
    ignore_abandoned_requests(asyncio.get_running_loop())
    # no cache: each user is scored once
    served = ServedModel.of(read_model(settings), settings.inference, settings.sequences.max_len, cache_bytes=0)
    async with RedisClient(settings.redis) as redis:
        await redis.check_format(claim=not dry_run)
        archive = EventArchive(settings.archive.dir, settings.kafka.topic_epoch)
        bounds = settings.events.bounds(time.time() * 1000)
        past = await asyncio.to_thread(PastClicks, archive, settings.sequences, served.max_len, bounds)
        log.info("archive read", extra={"clicks": len(past), "archive": str(archive.store)})
        unwanted = most_unwanted(served.max_len, settings.exclude_ttl_s)
        async with (
            followed_items(settings.items, settings.kafka) as refusals,
            TopicReader(settings.kafka, settings.events, past.next_offsets, archive.marks()) as reader,
        ):
            lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, unwanted, served.vocab, refusals)
            predictor = Predictor(served.engine, lists, settings.lists, settings.serving.rescore_users, Metrics())
            rebuilder = Rebuilder(settings, redis, past, reader, lists, predictor)
            await rebuilder.run(rate_per_s, dry_run)
            return rebuilder.report


class Rebuilder:
    """Replaces stored sequences by those that the past clicks make, and publishes lists."""

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
        ttl_s = self._exclude_ttl_s = settings.exclude_ttl_s
        self._publisher = Publisher(redis, settings.lists.ttl_s, Metrics(), lists.refusals, excludes=ttl_s > 0)
        epoch = settings.kafka.topic_epoch  # max_len is of no use: it appends exclusions, never a click
        self._store = SequenceStore(redis, settings.sequences, epoch, 1, Metrics(), ttl_s)
        self._refreshed_s = 0.0
        self._dry_run = False
        self._log_waits = LogOnce(log)
        self.report = Report()

    async def run(self, rate_per_s: float, dry_run: bool) -> None:
        """Restore the click counts and all users."""
        self._dry_run = dry_run
        await self._read_topic()
        while not await self._reader.drained():
            await self._read_topic()
        log.info("topic read", extra={"topic": self._settings.kafka.topic, "clicks_in_all": len(self._past)})
        if not dry_run:
            await self._patiently(self._restore_popularity)
        if self._exclude_ttl_s:
            await self._restore_exclusions()
        users, unread = self._past.users(), []
        size = min(MAX_BATCH_USERS, max(1, int(rate_per_s * RATED_BATCH_S))) if rate_per_s else MAX_BATCH_USERS
        with show_progress(len(users)) as update:
            for begin in range(0, len(users), size):
                began_s = time.monotonic()
                await self._read_topic(timeout_ms=0)
                unread += await self._patiently(partial(self._rebuild, users[begin : begin + size]))
                update(min(len(users), begin + size))
                if rate_per_s:
                    await asyncio.sleep(max(0.0, began_s + size / rate_per_s - time.monotonic()))
        await self._retry(unread)

    async def _restore_popularity(self) -> None:
        counts, counted_ms = self._past.popularity(self._settings.lists.popular_half_life_s)
        first_ms = None if self._past.has_imported else self._past.first_ts_ms
        if first_ms is not None and first_ms < EARLIEST_MS:  # as of 1970 the model's own counts would be nothing today
            first_ms = counted_ms
        await self._refresh_lists()
        try:
            self.report.popularity = await self._lists.restore(counts, counted_ms, first_ms)
        except RedisRejected as error:
            log.warning("the click counts are not restored: %s", error)

    async def _restore_exclusions(self) -> None:
        """Note past exclusions again, which changes only those that Redis has lost, before any list is published."""
        found = self._past.exclusions(since_ms=(time.time() - self._exclude_ttl_s) * 1000)
        self.report.exclusions = len({event.user_id for event in found})
        for begin in range(0, 0 if self._dry_run else len(found), MAX_BATCH_EXCLUSIONS):
            batch = EventBatch(found[begin : begin + MAX_BATCH_EXCLUSIONS])
            sequences = await self._patiently(partial(self._store.append, batch, self._refuse))
            await self._patiently(partial(self._publish_missing, [s for s in sequences if not s.n]))

    async def _publish_missing(self, sequences: list[UserSequence]) -> None:
        """Publish the lists of users who have never clicked and have no list."""
        lists = await self._redis.get_many([self._keys.recommendation(s.user_id) for s in sequences])
        await self._publish([s for s, value in zip(sequences, lists, strict=True) if value is None])

    async def _refresh_lists(self) -> None:
        await self._lists.read_blocklist()  # lists with blocked items must not be published
        with contextlib.suppress(RedisRejected):  # ``_restore_popularity`` has warned
            await self._lists.refresh()

    async def _retry(self, users: list[str]) -> None:
        """Rebuild users whose clicks were not all read, until none is left or nothing changes for a while."""
        until_s = time.monotonic() + RETRY_TIMEOUT_S
        while users and time.monotonic() < until_s:
            await self._read_topic()
            unread = []
            for begin in range(0, len(users), MAX_BATCH_USERS):
                unread += await self._patiently(partial(self._rebuild, users[begin : begin + MAX_BATCH_USERS]))
            if len(unread) < len(users):
                until_s = time.monotonic() + RETRY_TIMEOUT_S
            users = unread
        self.report.ahead += len(users)

    async def _patiently(self, step: Callable[[], Awaitable[R]]) -> R:
        """Run a step; repeat it for some time while Redis takes no writes: it may be failing over."""
        until_s = time.monotonic() + REDIS_TIMEOUT_S
        while True:
            before = dataclasses.replace(self.report, refused=set(self.report.refused))
            try:
                return await step()
            except RedisUnavailable as error:
                if isinstance(error, RedisRefused) or time.monotonic() > until_s:
                    raise
                self._log_waits("%s; waiting for it", error)
                self.report = before
            await asyncio.sleep(REDIS_PAUSE_S)

    async def _read_topic(self, timeout_ms: int | None = None) -> None:
        await self._reader.find_partitions()
        for records in (await self._reader.poll(timeout_ms)).values():
            self._past.add(records.events)

    async def _rebuild(self, users: list[str]) -> list[str]:
        """Rebuild some users; return those to retry."""
        values = await self._redis.get_many([self._keys.sequence(user) for user in users])
        published = await self._redis.get_many([self._keys.recommendation(user) for user in users])
        retry: list[str] = []
        changes: list[Change] = []
        to_publish: list[UserSequence] = []
        for user, value, old_list in zip(users, values, published, strict=True):
            try:
                stored = StoredSequence.decode(user, value) if value is not None else None
            except StreamrecError as error:
                self._refuse(user, error)
                continue
            rebuilt = self._past.sequence_of(user)
            if stored is not None and not includes(user, rebuilt, stored):
                if self._is_unread(stored):
                    retry.append(user)
                else:
                    self.report.ahead += 1
            elif stored is None and _ttl_left_s(rebuilt, self._settings.sequences.ttl_s) <= 0:
                self.report.too_old += 1
            elif (sequence := replacement(stored, rebuilt)) is not None:
                changes.append(Change(user, value, sequence, old_list))
            else:
                assert stored is not None
                self.report.unchanged += 1
                if self._needs_list(stored, old_list):
                    to_publish.append(stored.for_user(user))
        for change, done in zip(changes, await self._replace(changes), strict=True):
            if isinstance(done, RedisRejected):
                self._refuse(change.user, done)
                continue
            if not done:
                retry.append(change.user)
                continue
            self.report.rebuilt += 1
            if change.published is not None or self._needs_list(change.sequence, None):
                to_publish.append(change.sequence.for_user(change.user))
        await self._publish(to_publish)
        return retry

    async def _replace(self, changes: list[Change]) -> list[bool | RedisRejected]:
        """Store the sequences, compare-and-set; return for each whether it was stored, or why it never can be."""
        if self._dry_run or not changes:
            return [True] * len(changes)
        calls: list[tuple[list[str], list[RedisArg]]] = []
        for change in changes:
            ttl_s = max(1, _ttl_left_s(change.sequence, self._settings.sequences.ttl_s))
            args: list[RedisArg] = [change.value or b"", change.sequence.encode(), ttl_s]
            calls.append(([self._keys.sequence(change.user)], args))
        replies = await self._redis.run_each(REPLACE, [], calls)
        return [reply if isinstance(reply, RedisRejected) else bool(reply[0]) for reply in replies]

    async def _publish(self, sequences: list[UserSequence]) -> None:
        self.report.lists += len(sequences)
        if self._dry_run or not sequences:
            return
        if time.monotonic() - self._refreshed_s > self._settings.lists.refresh_s:  # the blocklist may have changed
            await self._refresh_lists()
            self._refreshed_s = time.monotonic()
        if self._exclude_ttl_s:
            sequences = await self._store.read([sequence.user_id for sequence in sequences], self._refuse)
        await self._publisher.publish(await self._predictor.predict(sequences), self._refuse)

    def _refuse(self, user: str, error: StreamrecError) -> None:
        """Leave a user alone whose data can never be read or written; the others are rebuilt."""
        if user not in self.report.refused:
            log.warning("user left alone: %s", error)
        self.report.refused.add(user)

    def _is_unread(self, stored: StoredSequence) -> bool:
        """Return whether the topic has a click of the sequence that was not read yet."""
        return any(offset >= self._reader.next_offsets.get(p, 0) for p, offset in stored.offsets.items())

    def _needs_list(self, sequence: StoredSequence, published: bytes | None) -> bool:
        """Return whether the list has fewer clicks than the sequence, or is missing although its TTL is not over."""
        if published is None:
            return _ttl_left_s(sequence, self._settings.lists.ttl_s) > 0
        with contextlib.suppress(StreamrecError):
            return parse_published("", published).n < sequence.n
        return True


def _ttl_left_s(sequence: StoredSequence, ttl_s: int) -> int:
    """Return the seconds that remain of a TTL which began at the newest click; all of it if no click has a time."""
    newest_ms = sequence.last_event_ts_ms
    return ttl_s if newest_ms < EARLIEST_MS else min(ttl_s, int(ttl_s - time.time() + newest_ms / 1000))
