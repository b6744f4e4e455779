"""The shadow: a challenger that scores a sampled share of the users beside the champion and publishes nothing.

Its lists are evaluated on the clicks on which the published lists are, so the two can be compared. A click waits at
most for ``MAX_USERS_PER_CALL`` users to be scored: the shadow gets a batch after its commit, scores only while no batch
is processed, and skips users if it cannot keep up. An error in the shadow ends the shadow and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sasrec import Engine
from streamrec.metrics import Metrics
from streamrec.schemas import UserSequence
from streamrec.serving.judge import EvaluatedClicks, K
from streamrec.serving.lists import POPULAR, SharedLists
from streamrec.serving.online import OnlineCounts
from streamrec.serving.predictor import rank
from streamrec.setting_groups import ListSettings

log = logging.getLogger(__name__)

MAX_STORED_LISTS = 50_000
MAX_QUEUED_USERS = 1_000
MAX_USERS_PER_CALL = 4  # a click may have to wait for these


@dataclass(frozen=True, slots=True)
class _ShadowList:
    """The list that the shadow would have published after ``n`` events; not ``own`` if it is the popular list."""

    n: int
    items: list[str]
    own: bool


class Shadow:
    """Scores sampled users and evaluates their clicks between ``begin`` and ``end``; idle otherwise."""

    def __init__(
        self, share: float, settings: ListSettings, lists: SharedLists, counts: OnlineCounts, metrics: Metrics
    ) -> None:
        self._share = share
        self._settings = settings
        self._lists = lists
        self._counts = counts
        self._metrics = metrics
        self._engine: Engine | None = None
        self._shadow_lists: OrderedDict[str, _ShadowList] = OrderedDict()  # by user, the latest last
        self._queue: OrderedDict[str, UserSequence] = OrderedDict()
        self._queue_filled = asyncio.Event()

    def begin(self, engine: Engine) -> None:
        """Make this engine the shadow, in the place of any other."""
        self.end()
        self._engine = engine
        self._counts.serve(engine.version)
        log.info("a shadow begins", extra={"model": engine.version, "share": self._share})

    def end(self) -> None:
        """End the shadow, if there is one."""
        if self._engine is not None:
            log.info("the shadow ends", extra={"model": self._engine.version})
        self._engine = None
        self._shadow_lists.clear()
        self._queue.clear()

    def follow(self, sequences: Sequence[UserSequence], evaluated: Sequence[EvaluatedClicks]) -> None:
        """Evaluate the clicks of a committed batch, and queue its users to be scored."""
        if self._engine is None:
            return
        try:
            for clicks in evaluated:
                self._evaluate(self._engine.version, clicks)
            self._enqueue(sequences)
        except Exception:
            self._fail()

    async def run(self, wait_idle: Callable[[], Awaitable[None]]) -> None:
        """Score queued users until cancelled.

        Args:
            wait_idle: returns when no batch is being processed.
        """
        while True:
            await self._queue_filled.wait()
            await wait_idle()
            users = [self._queue.popitem(last=False)[1] for _ in range(min(MAX_USERS_PER_CALL, len(self._queue)))]
            if not self._queue:
                self._queue_filled.clear()
            engine = self._engine
            if engine is None or not users:
                continue
            try:
                self._store(users, self._score(engine, users))
            except Exception:
                self._fail()
            await asyncio.sleep(0)  # a new batch comes first

    def _is_sampled(self, user_id: str) -> bool:
        # a hash, so that every daemon samples the same users, also after a restart
        return zlib.crc32(user_id.encode()) < self._share * 2**32

    def _evaluate(self, version: str, evaluated: EvaluatedClicks) -> None:
        shadow_list = self._shadow_lists.pop(evaluated.user_id, None)
        if shadow_list is None or shadow_list.n != evaluated.n:
            return  # the user was skipped, or another daemon has served the user meanwhile
        if shadow_list.own:
            self._counts.count(version, evaluated.clicks, shadow_list.items, evaluated.popular_hits)
        self._counts.compare(version, evaluated.clicks, shadow_list.items, evaluated.items)

    def _enqueue(self, sequences: Sequence[UserSequence]) -> None:
        skipped = 0
        for sequence in sequences:
            if self._is_sampled(sequence.user_id):
                skipped += sequence.user_id in self._queue
                self._queue[sequence.user_id] = sequence
                self._queue.move_to_end(sequence.user_id)
        while len(self._queue) > MAX_QUEUED_USERS:
            self._queue.popitem(last=False)
            skipped += 1
        self._metrics.shadowed.labels("skipped").inc(skipped)
        if self._queue:
            self._queue_filled.set()

    def _score(self, engine: Engine, sequences: Sequence[UserSequence]) -> list[_ShadowList]:
        """Return a list for each sequence, made as the predictor makes it."""
        histories = [sequence.items for sequence in sequences]
        ranked = rank(
            engine, sequences, histories, min(K, self._settings.top_k), self._settings.filter_seen, self._lists
        )
        return [
            _ShadowList(sequence.n, ranking.items, own=model != POPULAR)
            for sequence, (ranking, model) in zip(sequences, ranked, strict=True)
        ]

    def _store(self, sequences: Sequence[UserSequence], shadow_lists: Sequence[_ShadowList]) -> None:
        for sequence, shadow_list in zip(sequences, shadow_lists, strict=True):
            self._shadow_lists[sequence.user_id] = shadow_list
            self._shadow_lists.move_to_end(sequence.user_id)
        while len(self._shadow_lists) > MAX_STORED_LISTS:
            self._shadow_lists.popitem(last=False)
        self._metrics.shadowed.labels("scored").inc(len(sequences))

    def _fail(self) -> None:
        log.error("the shadow has failed and ends until it is set again; serving continues", exc_info=True)
        self.end()
