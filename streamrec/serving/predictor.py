"""[UserSequence] -> [Recommendation] on the live Engine.

The model runs on the event loop, a few users at a time; heartbeats, probes and fetches run in between. Calls grow to
``MAX_USERS_PER_CALL`` users while they take less than ``MAX_CALL_S``, so a slow model delays no heartbeat. A thread
would have to reacquire the interpreter lock after each of hundreds of operations while the loop decodes records.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sasrec import Engine, Ranking
from streamrec.metrics import Metrics
from streamrec.schemas import Recommendation, UserSequence
from streamrec.serving.lists import POPULAR, SharedLists
from streamrec.serving.tokens import TokenCache
from streamrec.setting_groups import ListSettings

MIN_USERS_PER_CALL, MAX_USERS_PER_CALL = 16, 256
MAX_CALL_S = 0.2  # the event loop waits for a call
MAX_WARM_UP_SEQUENCES = 64
SCORE_DIGITS = 5


def rank(
    engine: Engine,
    sequences: Sequence[UserSequence],
    histories: Sequence[Sequence[str] | NDArray[np.int64]],
    k: int,
    filter_seen: bool,
    lists: SharedLists,
) -> list[tuple[Ranking, str]]:
    """Return a list for each user and the version that made it; the popular list for users without a known item.

    Args:
        histories: the items of each sequence, or their vocabulary indices.
    """
    excluded = [sequence.excluded.items for sequence in sequences]
    rankings = engine.recommend(
        histories,
        k,
        users=[sequence.user_id for sequence in sequences],
        counts=[sequence.session_n for sequence in sequences],
        filter_seen=filter_seen,
        blocked=lists.refusals.of(engine.vocab),
        exclude=excluded if any(excluded) else None,
    )
    return [
        (lists.popular_for(sequence.unwanted(filter_seen), k), POPULAR)
        if ranking is None
        else (ranking, engine.version)
        for sequence, ranking in zip(sequences, rankings, strict=True)
    ]


class Predictor:
    """Scores sequences on the live Engine; users without a known item get the popular list."""

    def __init__(
        self, engine: Engine, lists: SharedLists, settings: ListSettings, recent_users: int, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._tokens = TokenCache(engine.vocab, recent_users)
        self._lists = lists
        self._settings = settings
        self._recent_limit = recent_users
        self._metrics = metrics
        metrics.model.labels(engine.version).set(1)
        self._users_per_call = MIN_USERS_PER_CALL
        self._recent: OrderedDict[str, None] = OrderedDict()  # users, the latest click last
        self._latest: deque[UserSequence] = deque(maxlen=MAX_WARM_UP_SEQUENCES)

    @property
    def engine(self) -> Engine:
        """The live engine; only the event loop may call it."""
        return self._engine

    @property
    def version(self) -> str:
        """The model version of the live engine."""
        return self._engine.version

    def recent_users(self) -> list[str]:
        """Return recently active users, the latest click first."""
        return list(reversed(self._recent))

    def warm_up(self, engine: Engine) -> None:
        """Run an engine on a full window and the latest sequences, so that the first click need not wait for its start.

        Another thread may call this with an engine that is not live yet.
        """
        full = [engine.vocab.ids[i % len(engine.vocab)] for i in range(engine.max_len)]
        engine.recommend([full, *(sequence.items for sequence in list(self._latest))], self._settings.top_k)

    def swap(self, engine: Engine) -> None:
        """Make another engine the live one; a batch in flight keeps its engine."""
        self._engine = engine
        self._tokens = TokenCache(engine.vocab, self._recent_limit)
        self._metrics.model.clear()
        self._metrics.model.labels(engine.version).set(1)

    async def predict(self, sequences: list[UserSequence]) -> list[Recommendation]:
        """Return a list for each sequence, in order."""
        for sequence in sequences:
            if sequence.record_ts_ms:  # the user clicked: this is not a re-scoring after a swap
                self._recent[sequence.user_id] = None
                self._recent.move_to_end(sequence.user_id)
                self._latest.append(sequence)
        while len(self._recent) > self._recent_limit:
            self._recent.popitem(last=False)
        engine, tokens = self._engine, self._tokens
        recommendations: list[Recommendation] = []
        while len(recommendations) < len(sequences):
            begin = len(recommendations)
            recommendations += self._predict(engine, tokens, sequences[begin : begin + self._users_per_call])
            await asyncio.sleep(0)
        return recommendations

    def _predict(self, engine: Engine, tokens: TokenCache, sequences: list[UserSequence]) -> list[Recommendation]:
        started = time.perf_counter()
        histories = [tokens.encode(sequence) for sequence in sequences]
        ranked = rank(engine, sequences, histories, self._settings.top_k, self._settings.filter_seen, self._lists)
        scores = iter(np.round([score for ranking, _ in ranked for score in ranking.scores], SCORE_DIGITS).tolist())
        recommendations = [
            Recommendation(
                sequence.user_id,
                ranking.items,
                list(islice(scores, len(ranking.items))),
                model,
                sequence.last_event_ts_ms,
                sequence.n,
                sequence.record_ts_ms,
                exclusions=sequence.excluded.changes,
                changes=self._lists.refusals.changes,
            )
            for sequence, (ranking, model) in zip(sequences, ranked, strict=True)
        ]
        took_s = time.perf_counter() - started
        self._metrics.inference_seconds.observe(took_s)
        self._adapt_calls(len(sequences), took_s)
        self._count(engine, sequences)
        return recommendations

    def _adapt_calls(self, users: int, took_s: float) -> None:
        if took_s > MAX_CALL_S:
            self._users_per_call = max(MIN_USERS_PER_CALL, users // 2)
        elif users == self._users_per_call and took_s < MAX_CALL_S / 2:
            self._users_per_call = min(MAX_USERS_PER_CALL, 2 * users)

    def _count(self, engine: Engine, sequences: list[UserSequence]) -> None:
        new = (item for sequence in sequences for item in sequence.clicks)
        self._metrics.unknown_items.inc(sum(item not in engine.vocab for item in new))
        stats = engine.take_stats()
        self._metrics.cache_hits.inc(stats.hits)
        self._metrics.cache_misses.inc(stats.misses)
        self._metrics.cache_evictions.inc(stats.evictions)
        self._metrics.cached_users.set(engine.cached_users)
