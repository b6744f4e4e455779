"""The counters of a daemon at one moment, and what they add up to between two moments."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from streamrec.metrics import Metrics, quantile
from streamrec.serving.lists import POPULAR

Hits = tuple[int, int, int]  # judged clicks, hits, hits of the popular list on the same clicks
Cumulative = list[tuple[float, float]]  # observations up to each upper bound in seconds; the last bound is infinite


@dataclass(frozen=True, slots=True)
class Reading:
    """The counters at one moment."""

    at_s: float
    version: str  # empty during a swap
    on_hold: bool
    events: int
    lag_records: int
    lag_s: float
    latency: Cumulative
    models: dict[str, Hits]
    cache_hits: int
    cache_misses: int
    cached_users: int


def read(metrics: Metrics, at_s: float) -> Reading:
    """Read the counters; ``at_s`` is the Unix time."""
    counters = (metrics.judged, metrics.hits, metrics.popularity_hits)
    judged, hits, popularity_hits = (_values(counter) for counter in counters)
    models = {
        version: (int(clicks), int(hits.get(version, 0)), int(popularity_hits.get(version, 0)))
        for version, clicks in judged.items()
        if version != POPULAR  # clicks on the popular list would compare it with itself
    }
    return Reading(
        at_s=at_s,
        version=next(iter(_values(metrics.model)), ""),
        on_hold=bool(_value(metrics.model_on_hold)),
        events=int(_values(metrics.events)["applied"]),
        lag_records=int(sum(_values(metrics.lag_records).values())),
        lag_s=max(_values(metrics.lag_seconds).values(), default=0.0),
        latency=_cumulative(metrics.click_to_published),
        models=models,
        cache_hits=int(_value(metrics.cache_hits)),
        cache_misses=int(_value(metrics.cache_misses)),
        cached_users=int(_value(metrics.cached_users)),
    )


def events_per_s(before: Reading, last: Reading) -> float:
    """Return the rate of applied events between two readings."""
    return round((last.events - before.events) / max(last.at_s - before.at_s, 1e-3), 1)


def hits_between(before: Reading, last: Reading) -> dict[str, Hits]:
    """Return the clicks judged between two readings, by version; versions without clicks are absent."""
    found = {}
    for version, (judged, hits, popularity_hits) in last.models.items():
        then = before.models.get(version, (0, 0, 0))
        if judged < then[0]:  # the version's counters were removed meanwhile, and begun again
            then = (0, 0, 0)
        if judged > then[0]:
            found[version] = (judged - then[0], hits - then[1], popularity_hits - then[2])
    return found


def latency_between(before: Reading, last: Reading) -> Cumulative:
    """Return the latencies of the clicks between two readings."""
    return [(bound, count - then) for (bound, count), (_, then) in zip(last.latency, before.latency, strict=True)]


def quantile_ms(latency: Cumulative, q: float) -> float | None:
    """Return a quantile in milliseconds; None without observations."""
    found = quantile(latency, q)
    return None if found is None else round(found * 1000, 2)


def _values(metric: Counter | Gauge) -> dict[str, float]:
    """Return the values of a metric by its one label."""
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in metric.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def _value(metric: Counter | Gauge) -> float:
    return _values(metric).get("", 0.0)


def _cumulative(histogram: Histogram) -> Cumulative:
    return [
        (float(sample.labels["le"]), sample.value)
        for family in histogram.collect()
        for sample in family.samples
        if sample.name.endswith("_bucket")
    ]
