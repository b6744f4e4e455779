"""Prometheus metrics of the daemon and of retraining. Base units; never a user or item id as a label."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import values as storage_of_values

# dense where clicks are usually published, within 50 ms, since quantiles are interpolated
_FAST = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05)
_SLOW = (0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_LATENCY_BUCKETS = _FAST + _SLOW
_STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class _MetricSet:
    """Metrics in a registry of their own, so that two daemons can run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # PROMETHEUS_MULTIPROC_DIR, which is for other programs, would store the values in files of its folder
        storage_of_values.ValueClass = storage_of_values.MutexValue

    def exposition(self) -> bytes:
        """Return the text of /metrics."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, **labels: Sequence[str]) -> Counter:
        """Make a counter.

        Args:
            labels: at most one label, and its values that start at 0 (none: a value appears with its first count).
        """
        counter = Counter(name, meaning, list(labels), registry=self.registry)
        for values in labels.values():
            for value in values:
                counter.labels(value)
        return counter

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, meaning, labels, registry=self.registry, buckets=buckets)


class ProcessMetrics(_MetricSet):
    """Metrics of every process: its start, and its loops (supervisor.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.started = self._gauge("streamrec_start_timestamp_seconds", "Time when the process started, in Unix time")
        self.started.set_to_current_time()
        self.loop_failures = self._counter(
            "streamrec_loop_failures", "Failed steps of the loops beside the clicks", loop=()
        )
        self.loop_failing = self._gauge(
            "streamrec_loop_failing", "1 while a loop beside the clicks fails; the log says why", "loop"
        )


class Metrics(ProcessMetrics):
    """All metrics of a daemon. Over 40 lines: the constructor is one list of declarations."""

    def __init__(self) -> None:
        super().__init__()
        counter, gauge, histogram = self._counter, self._gauge, self._histogram

        self.events = counter(
            "streamrec_events",
            "Clicks read from Kafka, by outcome: applied, replayed (applied before); exclusions without a click: "
            "excluded; and records without either: ignored, dead_letter",
            outcome=("applied", "replayed", "excluded", "ignored", "dead_letter"),
        )
        self.dead_letters = counter("streamrec_dead_letters", "Records sent to the dead-letter topic")
        self.guard_rejections = counter(
            "streamrec_guard_rejections", "Redelivered events that were skipped because they had been applied"
        )
        self.unknown_items = counter("streamrec_unknown_items", "Applied events whose item the model does not know")
        self.batch_events = histogram("streamrec_batch_events", "Clicks per batch", _BATCH_BUCKETS)
        self.rebalances = counter("streamrec_rebalances", "Rebalances that assigned partitions to this daemon")
        self.lag_records = gauge("streamrec_lag_records", "Records that are not committed yet", "partition")
        self.lag_seconds = gauge(
            "streamrec_lag_seconds", "Age of the newest committed record; 0 if no record waits", "partition"
        )

        self.published = counter(
            "streamrec_recommendations",
            "Computed lists, by outcome: published, superseded (Redis had a list from more events)",
            outcome=("published", "superseded"),
        )
        self.click_to_published = histogram(
            "streamrec_click_to_published_seconds",
            "Time from the timestamp of a record to the user's new list in Redis, once a record",
            _LATENCY_BUCKETS,
        )
        self.inference_seconds = histogram(
            "streamrec_inference_seconds", "Time to compute the lists of a batch", _STEP_BUCKETS
        )
        self.redis_seconds = histogram("streamrec_redis_seconds", "Time of a call to Redis", _STEP_BUCKETS, "operation")

        self.cache_hits = counter("streamrec_cache_hits", "Windows that continued from the cache")
        self.cache_misses = counter("streamrec_cache_misses", "Windows that were encoded from their first item")
        self.cache_evictions = counter("streamrec_cache_evictions", "Users evicted from the cache")
        self.cached_users = gauge("streamrec_cached_users", "Users in the cache")

        self.judged = counter(
            "streamrec_judged_clicks",
            "Clicks that were compared with the list published before them, by the model of that list (the last 8, "
            "popular, other)",
            model=(),
        )
        self.hits = counter("streamrec_hits", "Compared clicks on one of the first 10 items of their list", model=())
        self.reciprocal_ranks = counter(
            "streamrec_reciprocal_ranks",
            "Sum of 1 / rank over the compared clicks on one of the first 10 items",
            model=(),
        )
        self.popularity_hits = counter(
            "streamrec_popularity_hits",
            "Compared clicks on one of the first 10 items of the popular list, for comparison",
            model=(),
        )
        self.shadowed = counter(
            "streamrec_shadow_sequences",
            "Sequences of sampled users for the shadow, by outcome: scored, skipped (no time to score them)",
            outcome=("scored", "skipped"),
        )

        self.items = gauge("streamrec_items", "Items in the table of items")
        self.bad_items = counter("streamrec_bad_items", "Records or lines that were no items")

        self.swept_lists = counter(
            "streamrec_swept_lists", "Published lists that a sweep of this daemon took items out of"
        )
        self.sweep_seconds = histogram(
            "streamrec_sweep_seconds", "Time from items that go to the end of the sweep of published lists", _SLOW
        )

        self.swaps = counter(
            "streamrec_model_swaps",
            "New champions, by outcome: swapped, refused (could not be loaded)",
            outcome=("swapped", "refused"),
        )
        self.model = gauge("streamrec_model_info", "1 for the model version in use", "version")
        self.model_on_hold = gauge(
            "streamrec_model_on_hold", "1 while a person holds the champion: no round of retraining promotes"
        )
        self.model_created = gauge(
            "streamrec_model_created_timestamp_seconds", "Time when the model in use was made, in Unix time"
        )


class RetrainMetrics(ProcessMetrics):
    """All metrics of a `streamrec retrain`."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = self._counter(
            "streamrec_retrain_rounds",
            "Rounds that made a model, by outcome: promoted, refused (by the gate), overtaken (the champion was "
            "changed meanwhile, or is on hold)",
            outcome=("promoted", "refused", "overtaken"),
        )
        self.failures = self._counter(
            "streamrec_retrain_failures",
            "Rounds without a model, by reason: training, archive, registry, store, redis, stopped, unexpected",
            reason=("training", "archive", "registry", "store", "redis", "stopped", "unexpected"),
        )
        self.last_round = self._gauge(
            "streamrec_retrain_last_round_timestamp_seconds",
            "Time when the last round made a model, promoted or not, in Unix time",
        )
        self.on_hold = self._gauge(
            "streamrec_retrain_on_hold", "1 while a person holds the champion: no round promotes"
        )
        self.archived = self._gauge(
            "streamrec_archive_next_offset", "Offset after the last archived record", "partition"
        )
        self.archive_behind = self._gauge(
            "streamrec_archive_unwritten_seconds",
            "For how long records of a partition have been read and could not be archived",
            "partition",
        )


def unix_s(created_at: str) -> float:
    """Return the Unix time of an ISO 8601 time in a model's metadata; 0 if it is not one."""
    try:
        return datetime.fromisoformat(created_at).timestamp()
    except ValueError:
        return 0.0


def quantile(cumulative: list[tuple[float, float]], q: float) -> float | None:
    """Return the q-quantile of a histogram, interpolated like Prometheus' histogram_quantile; None if it is empty.

    Args:
        cumulative: pairs of upper bound and number of observations up to it, in order; the last bound is infinite.
    """
    total = cumulative[-1][1] if cumulative else 0.0
    if total <= 0:
        return None
    place = bisect.bisect_left([count for _, count in cumulative], q * total)
    upper, count = cumulative[place]
    lower, before = cumulative[place - 1] if place else (0.0, 0.0)
    if upper == float("inf") or count == before:
        return lower
    # min: rounding could lift the result above the bucket
    return min(upper, lower + (upper - lower) * (q * total - before) / (count - before))
