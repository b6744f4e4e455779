"""The metrics for Prometheus, and the answers to liveness and readiness probes."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from streamrec.errors import RedisRefused, RedisTakesNoWrites, RedisUnavailable, StreamrecError
from streamrec.health import Health
from streamrec.metrics import Metrics, quantile
from streamrec.redis.client import RedisClient
from streamrec.redis.watch import RedisWatch
from streamrec.settings import Settings

any_load = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
BOUNDS = [0.1, 0.5, 1.0, 2.0, math.inf]


def cumulative(observations: list[float], bounds: list[float] | None = None) -> list[tuple[float, float]]:
    return [(bound, sum(o <= bound for o in observations)) for bound in bounds or BOUNDS]


def brute_force_quantile(observations: list[float], q: float) -> float:
    """Return the value at the rank, if the observations of each bucket are spread evenly over it."""
    rank, lower, before = q * len(observations), 0.0, 0
    for upper in BOUNDS:
        inside = sum(lower < o <= upper or (lower == 0.0 and o == 0.0) for o in observations)
        if inside and before + inside >= rank:
            return lower if upper == math.inf else lower + (upper - lower) * (rank - before) / inside
        before += inside
        lower = upper
    raise AssertionError("every rank lies in a bucket")


@any_load
@given(st.lists(st.floats(0, 5), min_size=1, max_size=30), st.floats(0.001, 1))
def test_quantiles_match_brute_force(observations: list[float], q: float) -> None:
    found = quantile(cumulative(observations), q)
    assert found == pytest.approx(brute_force_quantile(observations, q), rel=1e-9, abs=1e-9)


@any_load
@given(st.lists(st.floats(0, 1.99), min_size=1, max_size=30), st.floats(0.01, 1))
@example([0.0, 0.0, 0.0], 1.0)
def test_a_quantile_lies_in_the_bucket_of_the_observation_of_that_rank(observations: list[float], q: float) -> None:
    found = quantile(cumulative(observations), q)
    assert found is not None
    exact = sorted(observations)[math.ceil(q * len(observations) - 1e-9) - 1]
    upper = next(bound for bound in BOUNDS if exact <= bound)
    assert max([0.0, *(bound for bound in BOUNDS if bound < upper)]) <= found <= upper


@any_load
@given(st.lists(st.floats(0, 5), min_size=1, max_size=30))
def test_quantiles_grow_with_q(observations: list[float]) -> None:
    found = [quantile(cumulative(observations), q / 20) or 0.0 for q in range(21)]
    assert found == sorted(found)


def test_an_empty_histogram_has_no_quantile() -> None:
    assert quantile([], 0.5) is None
    assert quantile(cumulative([]), 0.5) is None


def test_a_quantile_beyond_the_last_finite_bound_is_that_bound() -> None:
    assert quantile(cumulative([3.0, 4.0]), 0.99) == 2.0


def test_quantiles_of_a_daemons_histogram_are_found() -> None:
    metrics = Metrics()
    for value in (0.0035, 0.0035, 0.9):
        metrics.click_to_published.observe(value)
    (family,) = metrics.click_to_published.collect()
    buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
    median = quantile(buckets, 0.5)
    assert median is not None
    assert 0.003 < median <= 0.004


DOCUMENTED = [
    "streamrec_events_total",
    "streamrec_click_to_published_seconds_bucket",
    "streamrec_lag_records",
    "streamrec_lag_seconds",
    "streamrec_batch_events_bucket",
    "streamrec_inference_seconds_bucket",
    "streamrec_redis_seconds_bucket",
    "streamrec_cache_hits_total",
    "streamrec_cache_misses_total",
    "streamrec_cache_evictions_total",
    "streamrec_dead_letters_total",
    "streamrec_guard_rejections_total",
    "streamrec_rebalances_total",
    "streamrec_unknown_items_total",
    "streamrec_recommendations_total",
    "streamrec_model_info",
]


def used_metrics() -> Metrics:
    """Return metrics with a sample of every labelled metric, as in a daemon that ran for a while."""
    metrics = Metrics()
    metrics.lag_records.labels("0").set(1)
    metrics.lag_seconds.labels("0").set(1)
    metrics.redis_seconds.labels("append").observe(0.1)
    metrics.model.labels("v1").set(1)
    return metrics


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_metric_is_exposed_with_a_help_text(name: str) -> None:
    families = text_string_to_metric_families(used_metrics().exposition().decode())
    (family,) = [f for f in families if any(sample.name == name for sample in f.samples)]
    assert family.documentation


def test_no_label_names_a_user_or_an_item() -> None:
    families = text_string_to_metric_families(used_metrics().exposition().decode())
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    assert labels == {"outcome", "partition", "operation", "version", "le"}


def test_outcomes_are_exposed_before_the_first_event() -> None:
    value = Metrics().registry.get_sample_value
    for outcome in ("applied", "replayed", "ignored", "dead_letter"):
        assert value("streamrec_events_total", {"outcome": outcome}) == 0
    for outcome in ("published", "superseded"):
        assert value("streamrec_recommendations_total", {"outcome": outcome}) == 0


def test_two_daemons_in_one_process_count_separately() -> None:
    one, two = Metrics(), Metrics()
    one.rebalances.inc()
    assert two.registry.get_sample_value("streamrec_rebalances_total") == 0


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Watched:
    """A Health on a clock of the test's: liveness after 60 s, grace for a rebalance 75 s."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.health = Health(timeout_s=60, rebalance_grace_s=75, now_s=self.clock)

    def pass_s(self, seconds: float, ticking: bool = True) -> None:
        self.clock.now_s += seconds
        if ticking:
            self.health.tick()


@pytest.fixture
def watched() -> Watched:
    watched = Watched()
    watched.health.model_warm = watched.health.joined = True
    return watched


def test_a_daemon_that_just_started_is_alive_but_not_ready() -> None:
    health = Watched().health
    assert health.not_alive() is None
    assert health.not_ready() == "the model is not warm yet"
    health.model_warm = True
    assert health.not_ready() == "not joined to the consumer group yet"
    health.joined = True
    health.positions_known = False
    assert health.not_ready() == "the positions of its partitions are not known yet"
    health.positions_known = True
    assert health.not_ready() is None


def test_a_loop_that_does_not_poll_is_not_alive(watched: Watched) -> None:
    watched.pass_s(60, ticking=False)
    assert watched.health.not_alive() is None
    watched.pass_s(1, ticking=False)
    assert watched.health.not_alive() == "the loop has not polled for 61 s"
    watched.health.tick()
    assert watched.health.not_alive() is None


def test_records_that_wait_without_any_commit_are_not_alive(watched: Watched) -> None:
    watched.health.lag_records = 7
    watched.pass_s(61)
    assert watched.health.not_alive() == "7 records wait, but nothing was committed for 61 s"
    watched.health.progressed()
    assert watched.health.not_alive() is None


def test_a_quiet_topic_is_alive_for_ever(watched: Watched) -> None:
    watched.pass_s(100_000)
    assert watched.health.not_alive() is None
    assert watched.health.not_ready() is None


@pytest.mark.parametrize(
    ("away", "said"), [("redis_answers", "Redis does not answer"), ("kafka_answers", "Kafka does not answer")]
)
def test_during_an_outage_the_daemon_is_alive_but_not_ready(watched: Watched, away: str, said: str) -> None:
    watched.health.lag_records = 7
    setattr(watched.health, away, False)
    watched.pass_s(10_000)
    assert watched.health.not_alive() is None
    assert watched.health.not_ready() == said


def test_a_daemon_that_waits_to_start_or_loads_its_model_is_alive_but_not_ready() -> None:
    starting = Watched()
    starting.pass_s(10_000, ticking=False)
    assert starting.health.not_alive() is None, "it loads its model"
    starting.health.model_warm = starting.health.joined = True
    assert starting.health.not_alive() is not None
    starting.health.wait_for("Redis")
    starting.pass_s(10_000, ticking=False)
    assert starting.health.not_alive() is None
    assert starting.health.not_ready() == "waiting for Redis; the log says why"
    starting.health.wait_for("")
    starting.pass_s(60, ticking=False)
    assert starting.health.not_alive() is None, "the loop gets time to poll"
    assert starting.health.not_ready() is None


def test_a_loop_that_hangs_while_redis_is_down_is_not_alive(watched: Watched) -> None:
    watched.health.redis_answers = False
    watched.pass_s(61, ticking=False)
    assert watched.health.not_alive() is not None


def test_a_loop_that_waits_for_kafka_to_take_a_commit_is_alive(watched: Watched) -> None:
    watched.health.kafka_answers = False
    watched.pass_s(10_000, ticking=False)
    assert watched.health.not_alive() is None


@pytest.mark.parametrize("ticking", [True, False])
def test_a_rebalance_has_grace_and_then_has_none(watched: Watched, ticking: bool) -> None:
    watched.health.lag_records = 7
    watched.health.rebalancing_since_s = watched.clock.now_s
    watched.pass_s(74, ticking)
    assert watched.health.not_alive() is None
    watched.pass_s(1, ticking)
    assert watched.health.not_alive() is not None


def test_a_daemon_that_stops_is_alive_but_not_ready(watched: Watched) -> None:
    watched.health.stopping = True
    watched.health.joined = watched.health.redis_answers = False
    assert watched.health.not_ready() == "shutting down"
    assert watched.health.not_alive() is None


class RedisThatSays(RedisClient):
    """Takes the probe's writes or refuses them, as a test says."""

    error: StreamrecError | None = None

    async def probe(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def watch_of(watched: Watched, make_settings: Callable[..., Settings]) -> tuple[RedisThatSays, RedisWatch]:
    says = RedisThatSays(make_settings().redis)
    return says, RedisWatch(says, watched.health)


DOWN, FULL = RedisUnavailable("down"), RedisTakesNoWrites("full")


async def test_the_worker_gets_time_to_commit_after_redis_is_reachable_again(
    watched: Watched, watch_of: tuple[RedisThatSays, RedisWatch]
) -> None:
    says, watch = watch_of
    watched.health.lag_records, says.error = 7, DOWN
    await watch._probe()
    assert not watched.health.redis_answers
    watched.pass_s(10_000)
    says.error = None
    await watch._probe()
    assert watched.health.redis_answers
    assert watched.health.not_alive() is None
    watched.pass_s(61)
    assert watched.health.not_alive() is not None


async def test_redis_is_back_when_the_waiting_batch_has_written_and_not_before(
    watched: Watched, watch_of: tuple[RedisThatSays, RedisWatch], caplog: pytest.LogCaptureFixture
) -> None:
    _, watch = watch_of
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            watch.batch_waits(FULL)
            await watch._probe()
            assert watched.health.not_ready()
        watch.batch_continues()
        assert watched.health.not_ready() is None
        watch.batch_abandoned()
        assert watched.health.not_ready() is None
    assert [r.getMessage() for r in caplog.records if "again" in r.getMessage()] == ["Redis is reachable again"]


async def test_redis_is_not_back_when_a_batch_has_written_at_another_primary(
    watched: Watched, watch_of: tuple[RedisThatSays, RedisWatch]
) -> None:
    says, watch = watch_of
    says.error = FULL
    watch.batch_waits(FULL)
    await watch._probe()
    watch.batch_continues()
    assert watched.health.not_ready()
    says.error = None
    await watch._probe()
    assert watched.health.not_ready() is None


async def test_a_batch_that_is_abandoned_does_not_say_that_redis_is_back(
    watched: Watched, watch_of: tuple[RedisThatSays, RedisWatch]
) -> None:
    _, watch = watch_of
    watch.batch_waits(DOWN)
    watch.batch_abandoned()
    assert watched.health.not_ready()
    await watch._probe()
    assert watched.health.not_ready() is None


@pytest.mark.parametrize(("error", "is_right"), [(DOWN, False), (FULL, True), (RedisRefused("no right"), True)])
async def test_waiting_is_right_while_redis_refuses_but_not_if_only_this_batch_gets_no_answer(
    watched: Watched, watch_of: tuple[RedisThatSays, RedisWatch], error: StreamrecError, is_right: bool
) -> None:
    says, watch = watch_of
    says.error = error
    watch.batch_waits(error)
    await watch._probe()
    watched.pass_s(10_000)
    assert watched.health.not_alive() is None, "nobody can write"
    says.error = None
    for _ in range(62):  # others can write
        await watch._probe()
        watched.pass_s(1)
    assert (watched.health.not_alive() is None) is is_right
    assert watched.health.not_ready()


def test_a_folder_for_the_metrics_of_other_programs_changes_nothing(tmp_path: Path) -> None:
    code = "from streamrec.metrics import Metrics; m = Metrics(); m.rebalances.inc(); print(m.exposition().decode())"
    for folder in (tmp_path, tmp_path / "none"):
        env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert "streamrec_rebalances_total 1.0" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
