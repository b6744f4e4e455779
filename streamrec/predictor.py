"""[UserSequence] -> [Recommendation] on the live Engine, in a thread of its own.

Heartbeats live on the event loop and must not starve while the model runs. There is one thread, since an
Engine serves one caller at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sasrec import Engine
from streamrec.lists import POPULAR, SharedLists
from streamrec.metrics import Metrics
from streamrec.schemas import Recommendation, UserSequence
from streamrec.settings import Settings

R = TypeVar("R")


class Predictor:
    """Scores sequences; users without a known item get the popular list."""

    def __init__(self, engine: Engine, lists: SharedLists, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._lists = lists
        self._settings = settings
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        metrics.model.labels(engine.version).set(1)

    async def warm_up(self) -> None:
        """Run the model once, so that the first click does not pay for what is done only once."""
        vocab = self._engine.vocab
        warm = [[vocab.ids[i % len(vocab)] for i in range(self._engine.max_len)]]
        await self._in_thread(lambda: self._engine.recommend(warm, self._settings.top_k))

    async def predict(self, sequences: list[UserSequence]) -> list[Recommendation]:
        """A list for each sequence, in order."""
        if not sequences:
            return []
        return await self._in_thread(lambda: self._predict(sequences))

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _predict(self, sequences: list[UserSequence]) -> list[Recommendation]:
        started = time.perf_counter()
        engine, top_k = self._engine, self._settings.top_k
        rankings = engine.recommend(
            [sequence.items for sequence in sequences],
            top_k,
            users=[sequence.user_id for sequence in sequences],
            counts=[sequence.session_n for sequence in sequences],
            filter_seen=self._settings.filter_seen,
            blocked=self._lists.blocked,
        )
        recommendations = []
        for sequence, ranking in zip(sequences, rankings, strict=True):
            model = engine.version if ranking else POPULAR
            if ranking is None:
                seen = sequence.items if self._settings.filter_seen else ()
                ranking = self._lists.popular_for(seen, top_k)
            recommendations.append(
                Recommendation(
                    sequence.user_id,
                    ranking.items,
                    [round(score, 5) for score in ranking.scores],
                    model,
                    sequence.last_event_ts_ms,
                    sequence.n,
                    sequence.record_ts_ms,
                )
            )
        self._metrics.inference_seconds.observe(time.perf_counter() - started)
        self._count(sequences)
        return recommendations

    def _count(self, sequences: list[UserSequence]) -> None:
        vocab = self._engine.vocab
        new = (item for s in sequences if s.applied for item in s.items[-s.applied :])
        self._metrics.unknown_items.inc(sum(item not in vocab for item in new))
        stats = self._engine.take_stats()
        self._metrics.cache_hits.inc(stats.hits)
        self._metrics.cache_misses.inc(stats.misses)
        self._metrics.cache_evictions.inc(stats.evictions)
        self._metrics.cached_users.set(self._engine.cached_users)
