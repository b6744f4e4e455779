"""Prometheus metrics of the daemon and of retraining. Base units; never a user or item id as a label."""

from __future__ import annotations

import bisect
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_BUCKETS = (
    0.001,
    0.002,
    0.003,
    0.004,
    0.005,
    0.006,
    0.008,
    0.01,
    0.0125,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
_STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Metrics:
    """All metrics of one daemon, in a registry of their own: two daemons can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.events = Counter(
            "streamrec_events",
            "Records read, by outcome: applied, replayed, ignored, dead_letter",
            ["outcome"],
            registry=r,
        )
        for outcome in ("applied", "replayed", "ignored", "dead_letter"):
            self.events.labels(outcome)
        self.published = Counter(
            "streamrec_recommendations", "Lists written, by outcome: published, superseded", ["outcome"], registry=r
        )
        for outcome in ("published", "superseded"):
            self.published.labels(outcome)
        self.click_to_published = Histogram(
            "streamrec_click_to_published_seconds",
            "From a record's timestamp to its user's list in Redis",
            buckets=_LATENCY_BUCKETS,
            registry=r,
        )
        self.lag_records = Gauge("streamrec_lag_records", "Records not yet committed", ["partition"], registry=r)
        self.lag_seconds = Gauge(
            "streamrec_lag_seconds",
            "Age of the newest committed record where later ones wait",
            ["partition"],
            registry=r,
        )
        self.batch_events = Histogram("streamrec_batch_events", "Events a batch", buckets=_BATCH_BUCKETS, registry=r)
        self.inference_seconds = Histogram(
            "streamrec_inference_seconds", "Scoring a batch", buckets=_STEP_BUCKETS, registry=r
        )
        self.redis_seconds = Histogram(
            "streamrec_redis_seconds", "A Redis call", ["operation"], buckets=_STEP_BUCKETS, registry=r
        )
        self.cache_hits = Counter("streamrec_cache_hits", "Windows continued from the cache", registry=r)
        self.cache_misses = Counter("streamrec_cache_misses", "Windows encoded whole", registry=r)
        self.cache_evictions = Counter("streamrec_cache_evictions", "Users evicted from the cache", registry=r)
        self.cached_users = Gauge("streamrec_cached_users", "Users in the cache", registry=r)
        self.dead_letters = Counter("streamrec_dead_letters", "Records sent to the dead-letter topic", registry=r)
        self.guard_rejections = Counter(
            "streamrec_guard_rejections", "Events skipped because they had been applied before", registry=r
        )
        self.rebalances = Counter("streamrec_rebalances", "Assignments of partitions received", registry=r)
        self.unknown_items = Counter(
            "streamrec_unknown_items", "Applied events on items outside the vocabulary", registry=r
        )
        self.judged = Counter(
            "streamrec_judged_clicks",
            "Clicks judged against the list published before, by its model",
            ["model"],
            registry=r,
        )
        self.hits = Counter("streamrec_hits", "Of these, clicks in the first 10 of that list", ["model"], registry=r)
        self.reciprocal_ranks = Counter(
            "streamrec_reciprocal_ranks",
            "Sum of 1 / place of the click, where among the first 10",
            ["model"],
            registry=r,
        )
        self.popularity_hits = Counter(
            "streamrec_popularity_hits",
            "Of the same clicks, those in the first 10 of the popular list",
            ["model"],
            registry=r,
        )
        self.shadowed = Counter(
            "streamrec_shadow_sequences",
            "Sequences of sampled users for the shadow, by outcome: scored, skipped",
            ["outcome"],
            registry=r,
        )
        for outcome in ("scored", "skipped"):
            self.shadowed.labels(outcome)
        self.swaps = Counter(
            "streamrec_model_swaps", "Champions taken over, by outcome: swapped, refused", ["outcome"], registry=r
        )
        for outcome in ("swapped", "refused"):
            self.swaps.labels(outcome)
        self.model = Gauge("streamrec_model_info", "1 for the model version in use", ["version"], registry=r)
        self.model_created = Gauge(
            "streamrec_model_created_timestamp_seconds", "When the model in use was made, in Unix time", registry=r
        )

    def exposition(self) -> bytes:
        """The text that /metrics answers with."""
        return generate_latest(self.registry)


class RetrainMetrics:
    """All metrics of one `streamrec retrain`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.rounds = Counter(
            "streamrec_retrain_rounds",
            "Rounds that made a model, by outcome: promoted, refused",
            ["outcome"],
            registry=r,
        )
        for outcome in ("promoted", "refused"):
            self.rounds.labels(outcome)
        self.failures = Counter(
            "streamrec_retrain_failures",
            "Rounds that made none, by reason: training, archive, registry, redis, stopped, unexpected",
            ["reason"],
            registry=r,
        )
        for reason in ("training", "archive", "registry", "redis", "stopped", "unexpected"):
            self.failures.labels(reason)
        self.last_round = Gauge(
            "streamrec_retrain_last_round_timestamp_seconds",
            "When the last round made a model, promoted or not, in Unix time",
            registry=r,
        )

    def exposition(self) -> bytes:
        """The text that /metrics answers with."""
        return generate_latest(self.registry)


def unix_s(created_at: str) -> float:
    """Unix time of the ISO-8601 time in a model's metadata; 0 where it is none."""
    try:
        return datetime.fromisoformat(created_at).timestamp()
    except ValueError:
        return 0.0


def quantile(cumulative: list[tuple[float, float]], q: float) -> float | None:
    """The q-quantile of a histogram, interpolated as Prometheus' histogram_quantile does.

    Args:
        cumulative: (upper bound, observations up to it), by bound; the last bound is infinite.
    """
    total = cumulative[-1][1] if cumulative else 0.0
    if total <= 0:
        return None
    place = bisect.bisect_left([count for _, count in cumulative], q * total)
    upper, count = cumulative[place]
    lower, before = cumulative[place - 1] if place else (0.0, 0.0)
    if upper == float("inf") or count == before:
        return lower
    # rounded up, it could lie above the bucket
    return min(upper, lower + (upper - lower) * (q * total - before) / (count - before))
