"""Take items that have gone out of the lists that are published already.

    wait       a moment, for items that go together and for lists that are just being published
    lock       one daemon at a time; if that daemon dies, the lock expires, and another one sweeps its own items
    skip       items that another daemon's sweep took out, if that began after this daemon refused them
    slices     each of at most 2 ms, in which Redis does nothing else, then a pause; on a cluster at every primary

A slice reads and changes lists in one call, so it overwrites no newer list; TTLs remain. Up to MOST_GONE items are
named in the call. If more go, and at the start of a daemon, all lists are compared with the table: a slice returns the
items of its lists, and is repeated with those that are refused.

While slots of a cluster move between nodes, a list may be missed; the user's next click replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from streamrec.errors import RedisRejected, RedisUnavailable
from streamrec.items.refusals import MOST_GONE, Refusals
from streamrec.logs import LogOnce
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.lock import holder_name, take_lock
from streamrec.redis.nodes import Primary, RedisArg
from streamrec.redis.script import Script

log = logging.getLogger(__name__)

SWEEP = Script(__package__, "sweep", replicated=True)
SWEPT = Script(__package__, "swept")
SLICE_S = 0.00125  # then the keys of the last SCAN are still read
LISTED_ITEMS_PER_SCAN = 2_000  # read between two looks at the clock
PAUSE_SHARE = 0.2  # of the time of a slice; until the next one arrives, Redis serves others anyway
SETTLE_S = 0.05
LOCK_TTL_MS = 5_000
RENEW_EVERY_S = 1.0
WAIT_FOR_LOCK_S = 0.05
RETRY_S = 1.0
SWEPT_TTL_S, MOST_SWEPT = 3_600, 5_000
ALL = "*"


@dataclass
class _Server:
    """How far a sweep is at a server."""

    primary: Primary
    cursor: bytes = b"0"
    run_id: bytes = b""
    names: Sequence[RedisArg] = ()  # items to take out, as JSON text
    done: bool = False


class Sweeper:
    """Sweeps published lists.

    Args:
        top_k: items in a list.
    """

    def __init__(self, redis: RedisClient, refusals: Refusals, top_k: int, metrics: Metrics) -> None:
        self._redis = redis
        self._keys = redis.keys
        self._refusals = refusals
        self._metrics = metrics
        self._scan_count = max(1, min(100, LISTED_ITEMS_PER_SCAN // top_k))
        self._name = holder_name()
        self._renewed_s = 0.0
        self._log_late = LogOnce(log)

    async def run(self) -> None:
        """Wait until items have gone, and take them out of all lists."""
        await self._refusals.has_gone.wait()
        await asyncio.sleep(SETTLE_S)
        gone = self._refusals.take_gone()
        if gone == set() or not self._refusals.refuses_any:
            return
        started_s = time.monotonic()
        try:
            changed = await self._sweep(gone)
        except (RedisUnavailable, RedisRejected) as error:
            self._refusals.put_back(gone)
            self._log_late("published lists may have items that have gone; the sweep is tried again: %s", error)
            await asyncio.sleep(RETRY_S)
            return
        self._log_late.reset()
        took_s = time.monotonic() - started_s
        self._metrics.sweep_seconds.observe(took_s)
        if changed is not None:
            items = "all" if gone is None else len(gone)
            log.info("published lists swept", extra={"items": items, "lists": changed, "seconds": round(took_s, 2)})

    async def _sweep(self, gone: set[str] | None) -> int | None:
        """Take items out of all lists; return the number of lists that had some, None if others have swept.

        Raises:
            RedisUnavailable: the sweep did not end.
            RedisRejected: a key has another type.
        """
        before = await self._begun()
        await asyncio.sleep(random.uniform(0, SETTLE_S))  # the daemons do not all begin at one moment
        while not await self._has_lock():
            await asyncio.sleep(WAIT_FOR_LOCK_S)
        try:
            swept = await self._redis.hash(self._keys.swept)
            names = None if gone is None else [name for name in map(_json, gone) if _number(swept, name) <= before]
            if names == [] or _number(swept, ALL) > before:
                return None
            number = await self._redis.run(SWEPT, [self._keys.swept], [SWEPT_TTL_S, MOST_SWEPT])
            changed = await self._pass(names)
            fields = [ALL] if names is None else names
            await self._redis.run(SWEPT, [self._keys.swept], [SWEPT_TTL_S, MOST_SWEPT, number, *fields])
            return changed
        finally:
            await self._release()

    async def _pass(self, names: list[str] | None) -> int:
        """Go through all lists once; return the number of lists that were changed."""
        servers = [_Server(primary, names=names or ()) for primary in await self._redis.primaries()]
        changed = 0
        while pending := [server for server in servers if not server.done]:
            if time.monotonic() - self._renewed_s > RENEW_EVERY_S and not await self._has_lock():
                raise RedisUnavailable("another daemon has taken the lock of the sweep")
            started_s = time.monotonic()
            calls = [(server.primary, self._slice(server, names is None)) for server in pending]
            for server, answer in zip(pending, await self._redis.run_at(SWEEP, calls), strict=True):
                changed += self._advance(server, answer, names is None)
            await asyncio.sleep((time.monotonic() - started_s) * PAUSE_SHARE)
        return changed

    def _slice(self, server: _Server, compare: bool) -> list[RedisArg]:
        """Return the arguments of the script for the next slice of a server."""
        pattern = f"{self._keys.prefix}:recs:*"
        return [server.cursor, pattern, self._scan_count, SLICE_S, int(compare), *server.names]

    def _advance(self, server: _Server, answer: tuple[bytes, bytes, int, int, list[bytes]], compare: bool) -> int:
        """Note how far a slice has come; return the number of lists that it changed.

        Raises:
            RedisUnavailable: another server has answered, for which the cursor means nothing.
        """
        run_id, cursor, _, changed, listed = answer
        if server.run_id not in (b"", run_id):
            raise RedisUnavailable("the server has restarted, or another one is the primary")
        server.run_id = run_id
        self._metrics.swept_lists.inc(changed)
        if compare:
            refused = [name for name in listed if self._is_refused(name)]
            if refused:  # once more from the same cursor
                server.names = [*refused, *server.names][:MOST_GONE]
                return changed
        server.cursor = cursor
        server.done = cursor == b"0"
        return changed

    def _is_refused(self, name: bytes) -> bool:
        try:
            return self._refusals.refuses(msgspec.json.decode(name, type=str))
        except (msgspec.MsgspecError, ValueError):  # of a damaged list
            return False

    async def _begun(self) -> int:
        return _number(await self._redis.hash(self._keys.swept), "begun")

    async def _has_lock(self) -> bool:
        self._renewed_s = time.monotonic()
        return await take_lock(self._redis, self._keys.sweep_lock, self._name, LOCK_TTL_MS) == self._name

    async def _release(self) -> None:
        with contextlib.suppress(RedisUnavailable, RedisRejected):  # it expires
            await take_lock(self._redis, self._keys.sweep_lock, self._name, 0)


def _json(item_id: str) -> str:
    return msgspec.json.encode(item_id).decode()


def _number(swept: dict[str, str], field: str) -> int:
    """Return the number of a sweep; 0 if there was none."""
    text = swept.get(field, "0")
    return int(text) if text.isdecimal() else 0
