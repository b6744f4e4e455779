"""The shadow: a challenger that scores a sampled share of the users beside the champion, and publishes nothing.

It is judged on the clicks that judge what is published, so the two can be compared. A click never waits for
more than a handful of users being scored: the shadow is told of a batch once it is committed, scores only while
no batch is in hand, and leaves users out where it cannot keep up. Whatever fails in it ends it, and nothing else.
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
from streamrec.serving.judge import Judged, K
from streamrec.serving.lists import POPULAR, SharedLists
from streamrec.serving.online import OnlineCounts
from streamrec.serving.predictor import rank
from streamrec.setting_groups import ListSettings

log = logging.getLogger(__name__)

REMEMBERED_USERS = 50_000
WAITING_USERS = 1_000
AT_ONCE = 4  # users scored in one go, for which a click may have to wait


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the user would have seen after ``n`` events; ``own`` unless it is the popular list."""

    n: int
    items: list[str]
    own: bool


class Shadow:
    """Scores and is judged from ``begin`` to ``end``; before and after that it does nothing."""

    def __init__(
        self, share: float, settings: ListSettings, lists: SharedLists, counts: OnlineCounts, metrics: Metrics
    ) -> None:
        self._share = share
        self._settings = settings
        self._lists = lists
        self._counts = counts
        self._metrics = metrics
        self._engine: Engine | None = None
        self._listed: OrderedDict[str, _Listed] = OrderedDict()  # by user, the latest last
        self._waiting: OrderedDict[str, UserSequence] = OrderedDict()
        self._work = asyncio.Event()

    def begin(self, engine: Engine) -> None:
        """Let this engine be the shadow from now on."""
        self.end()
        self._engine = engine
        log.info("a shadow begins", extra={"model": engine.version, "share": self._share})

    def end(self) -> None:
        """Have no shadow any longer."""
        if self._engine is not None:
            log.info("the shadow ends", extra={"model": self._engine.version})
        self._engine = None
        self._listed.clear()
        self._waiting.clear()

    def follow(self, sequences: Sequence[UserSequence], judged: Sequence[Judged]) -> None:
        """Be judged on the clicks of a batch that is done, and have its users wait to be scored."""
        if self._engine is None:
            return
        try:
            for found in judged:
                self._judge(self._engine.version, found)
            self._ask(sequences)
        except Exception:
            self._failed()

    async def run(self, idle: Callable[[], Awaitable[None]]) -> None:
        """Score who waits, until cancelled.

        Args:
            idle: returns when no batch is in hand.
        """
        while True:
            await self._work.wait()
            await idle()
            part = [self._waiting.popitem(last=False)[1] for _ in range(min(AT_ONCE, len(self._waiting)))]
            if not self._waiting:
                self._work.clear()
            engine = self._engine
            if engine is None or not part:
                continue
            try:
                self._remember(part, self._score(engine, part))
            except Exception:
                self._failed()
            await asyncio.sleep(0)  # a batch that has come meanwhile goes first

    def _sampled(self, user_id: str) -> bool:
        # the same users in every daemon and at every start
        return zlib.crc32(user_id.encode()) < self._share * 2**32

    def _judge(self, version: str, judged: Judged) -> None:
        listed = self._listed.pop(judged.user_id, None)
        if listed is None or listed.n != judged.n:
            return  # there was no time to score him, or somebody else served him meanwhile
        if listed.own:
            self._counts.count(version, judged.clicks, listed.items, judged.popular_hits)
        self._counts.compare(version, judged.clicks, listed.items, judged.items)

    def _ask(self, sequences: Sequence[UserSequence]) -> None:
        skipped = 0
        for sequence in sequences:
            if self._sampled(sequence.user_id):
                skipped += sequence.user_id in self._waiting
                self._waiting[sequence.user_id] = sequence
                self._waiting.move_to_end(sequence.user_id)
        while len(self._waiting) > WAITING_USERS:
            self._waiting.popitem(last=False)
            skipped += 1
        self._metrics.shadowed.labels("skipped").inc(skipped)
        if self._waiting:
            self._work.set()

    def _score(self, engine: Engine, sequences: Sequence[UserSequence]) -> list[_Listed]:
        """The list of each, as the predictor would make it."""
        histories = [sequence.items for sequence in sequences]
        ranked = rank(
            engine, sequences, histories, min(K, self._settings.top_k), self._settings.filter_seen, self._lists
        )
        return [
            _Listed(sequence.n, ranking.items, own=model != POPULAR)
            for sequence, (ranking, model) in zip(sequences, ranked, strict=True)
        ]

    def _remember(self, sequences: Sequence[UserSequence], lists: Sequence[_Listed]) -> None:
        for sequence, listed in zip(sequences, lists, strict=True):
            self._listed[sequence.user_id] = listed
            self._listed.move_to_end(sequence.user_id)
        while len(self._listed) > REMEMBERED_USERS:
            self._listed.popitem(last=False)
        self._metrics.shadowed.labels("scored").inc(len(sequences))

    def _failed(self) -> None:
        log.error("the shadow has failed, and stays away until it is set again; serving goes on", exc_info=True)
        self.end()
