"""[UserSequence] -> [Recommendation] on the live Engine, in a thread of its own.

Heartbeats live on the event loop and must not starve while the model runs. There is one thread, since an
Engine serves one caller at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sasrec import Engine, Ranking, SavedModel
from streamrec.errors import SettingsError
from streamrec.lists import POPULAR, SharedLists
from streamrec.metrics import Metrics
from streamrec.schemas import Recommendation, UserSequence
from streamrec.settings import Settings
from streamrec.tokens import TokenCache

R = TypeVar("R")

WARM_UP_SEQUENCES = 64
SCORE_DIGITS = 5


def open_engine(settings: Settings, saved: SavedModel, share: float = 1.0) -> Engine:
    """The engine that serves a model under these settings, with that share of the cache.

    Raises:
        SettingsError: ``top_k_index`` asks for what is not installed.
    """
    window = min(settings.max_len or saved.model.config.max_len, saved.model.config.max_len)
    cache_bytes = int(settings.cache_bytes * share)
    choice = settings.top_k_index
    try:
        return Engine(
            saved.model, saved.vocab, version=saved.version, cache_bytes=cache_bytes, half_cache=settings.cache_half,
            max_len=window, index=choice,
        )  # fmt: skip
    except ImportError as error:
        raise SettingsError(f"top_k_index={choice}: {error}") from None


def rank(
    engine: Engine,
    sequences: Sequence[UserSequence],
    histories: Sequence[Sequence[str] | NDArray[np.int64]],
    k: int,
    settings: Settings,
    lists: SharedLists,
) -> list[tuple[Ranking, str]]:
    """What each user is to see, and whose list it is: the engine's, or the popular one where it knows no item.

    Args:
        histories: the items of each sequence, or their indices.
    """
    rankings = engine.recommend(
        histories,
        k,
        users=[sequence.user_id for sequence in sequences],
        counts=[sequence.session_n for sequence in sequences],
        filter_seen=settings.filter_seen,
        blocked=lists.blocked,
    )
    return [
        (lists.popular_for(sequence.items if settings.filter_seen else (), k), POPULAR)
        if ranking is None
        else (ranking, engine.version)
        for sequence, ranking in zip(sequences, rankings, strict=True)
    ]


class Predictor:
    """Scores sequences on the live Engine; users without a known item get the popular list."""

    def __init__(self, engine: Engine, lists: SharedLists, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._tokens = TokenCache(engine.vocab, settings.rescore_users)
        self._lists = lists
        self._settings = settings
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        metrics.model.labels(engine.version).set(1)
        self._recent: OrderedDict[str, None] = OrderedDict()  # users who clicked, the latest last
        self._latest: deque[UserSequence] = deque(maxlen=WARM_UP_SEQUENCES)

    @property
    def engine(self) -> Engine:
        """The engine that scores now; only calls that run ``in_thread`` may use it."""
        return self._engine

    @property
    def version(self) -> str:
        """The model version that scores now."""
        return self._engine.version

    def recent_users(self) -> list[str]:
        """The users who clicked lately, the latest first."""
        return list(reversed(self._recent))

    async def warm_up(self) -> None:
        """Run the model once, so that the first click does not pay for what is done only once."""
        await self.in_thread(lambda: self.warm_up_on_recent(self._engine))

    def warm_up_on_recent(self, engine: Engine) -> None:
        """Run an engine that does not serve yet once: on the latest sequences, on a full window if there are none."""
        full = [engine.vocab.ids[i % len(engine.vocab)] for i in range(engine.max_len)]
        engine.recommend([full, *(sequence.items for sequence in list(self._latest))], self._settings.top_k)

    async def swap(self, engine: Engine) -> None:
        """Put another engine in the place of the live one, between two batches; a batch in flight keeps its own."""
        await self.in_thread(lambda: self._take(engine))

    async def predict(self, sequences: list[UserSequence]) -> list[Recommendation]:
        """A list for each sequence, in order."""
        if not sequences:
            return []
        for sequence in sequences:
            if sequence.record_ts_ms:  # it clicked; it is not only scored again
                self._recent[sequence.user_id] = None
                self._recent.move_to_end(sequence.user_id)
                self._latest.append(sequence)
        while len(self._recent) > self._settings.rescore_users:
            self._recent.popitem(last=False)
        return await self.in_thread(lambda: self._predict(sequences))

    async def in_thread(self, call: Callable[[], R]) -> R:
        """Run something where the model runs: the next batch waits until it is done."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _take(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens = TokenCache(engine.vocab, self._settings.rescore_users)
        self._metrics.model.clear()
        self._metrics.model.labels(engine.version).set(1)

    def _predict(self, sequences: list[UserSequence]) -> list[Recommendation]:
        started = time.perf_counter()
        tokens = [self._tokens.encode(sequence) for sequence in sequences]
        ranked = rank(self._engine, sequences, tokens, self._settings.top_k, self._settings, self._lists)
        recommendations = [
            Recommendation(
                sequence.user_id,
                ranking.items,
                np.round(ranking.scores, SCORE_DIGITS).tolist(),
                model,
                sequence.last_event_ts_ms,
                sequence.n,
                sequence.record_ts_ms,
            )
            for sequence, (ranking, model) in zip(sequences, ranked, strict=True)
        ]
        self._metrics.inference_seconds.observe(time.perf_counter() - started)
        self._count(sequences)
        return recommendations

    def _count(self, sequences: list[UserSequence]) -> None:
        vocab = self._engine.vocab
        new = (item for sequence in sequences for item in sequence.clicks)
        self._metrics.unknown_items.inc(sum(item not in vocab for item in new))
        stats = self._engine.take_stats()
        self._metrics.cache_hits.inc(stats.hits)
        self._metrics.cache_misses.inc(stats.misses)
        self._metrics.cache_evictions.inc(stats.evictions)
        self._metrics.cached_users.set(self._engine.cached_users)
