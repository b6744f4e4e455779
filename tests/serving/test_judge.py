"""Online quality: each click judged once, against the list that was there before it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from sasrec import ItemVocab
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import Recommendation, StoredItems, UserSequence
from streamrec.serving.judge import OnlineJudge
from streamrec.serving.lists import SharedLists
from streamrec.serving.online import OnlineCounts
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings

from support.redis_access import BASE_MS, batch, event, raw_redis, under

MakeSettings = Callable[..., Settings]
POPULAR = ItemVocab([f"p{n}" for n in range(30)], list(range(30, 0, -1)))


class Bench:
    """Store, publisher and judge on real Redis; lists are given, not computed."""

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self.metrics = Metrics()
        redis = under(redis, settings)
        self.store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 50, self.metrics)
        self.publisher = Publisher(redis, settings.lists.ttl_s, self.metrics)
        counts = OnlineCounts(redis, self.metrics)
        self.judge = OnlineJudge(
            SharedLists(redis, settings.lists, settings.sequences.ttl_s, 50, POPULAR),
            counts,
            settings.lists.filter_seen,
        )
        self.offset = 0

    async def click(self, user: str, *items: str, then: list[str] | None = None, model: str = "m1") -> None:
        """Process a batch of clicks, and publish a list after it."""
        events = [event(user, item, self.offset + n, BASE_MS + self.offset + n) for n, item in enumerate(items)]
        self.offset += len(items)
        await self.handle(await self.store.append(batch(*events)), then or [], model)

    async def handle(self, sequences: list[UserSequence], then: list[str], model: str) -> None:
        lists = [Recommendation(s.user_id, then, [1.0] * len(then), model, s.last_event_ts_ms, s.n) for s in sequences]
        self.judge.evaluate(sequences, await self.publisher.publish(lists))

    def counted(self, model: str) -> tuple[float, float, float, float]:
        """Return clicks evaluated, hits, reciprocal ranks, popularity hits."""
        names = ("judged_clicks", "hits", "reciprocal_ranks", "popularity_hits")
        values = [self.metrics.registry.get_sample_value(f"streamrec_{n}_total", {"model": model}) for n in names]
        judged, hits, ranks, popular = (value or 0.0 for value in values)
        return judged, hits, ranks, popular


@pytest.fixture
def bench(redis: RedisClient, make_settings: MakeSettings) -> Bench:
    return Bench(redis, make_settings())


async def test_a_click_is_evaluated_against_the_list_published_before_it(bench: Bench) -> None:
    await bench.click("ann", "a", then=["b", "c", "d"], model="m1")
    await bench.click("ann", "c", then=["x"], model="m2")
    await bench.click("ann", "c", then=["c"], model="m2")
    assert bench.counted("m1") == (1, 1, 0.5, 0)
    assert bench.counted("m2") == (1, 0, 0, 0), "the list that came after the click does not count"


async def test_only_the_first_ten_places_count(bench: Bench) -> None:
    await bench.click("ann", "a", then=[f"i{n}" for n in range(20)])
    await bench.click("ann", "i9", "i10")
    assert bench.counted("m1") == (2, 1, 0.1, 0)


async def test_clicks_of_users_without_a_list_are_evaluated_against_the_popular_list(bench: Bench) -> None:
    await bench.click("ann", "p1", then=["z"])
    await bench.click("bob", "nothing like it", then=["z"])
    assert bench.counted("popular") == (2, 1, 0.5, 1)


async def test_the_popular_list_is_evaluated_too_without_the_items_seen(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    prefix = make_settings().redis.key_prefix
    for filter_seen, hits in ((True, 2), (False, 1)):
        settings = make_settings(lists_filter_seen=filter_seen, redis_key_prefix=f"{prefix}-{filter_seen}")
        bench = Bench(redis, settings)
        await bench.click("ann", "p0", "p1", then=["z"])
        await bench.click("ann", "p11", then=["z"])  # the tenth popular item that is not seen
        await bench.click("ann", "p2", then=["z"])
        assert bench.counted("m1")[3] == hits


async def test_clicks_of_one_batch_saw_the_same_list(bench: Bench) -> None:
    await bench.click("ann", "a", then=["b", "c"])
    await bench.click("ann", "b", "c", "d", then=["d"])
    assert bench.counted("m1") == (3, 2, 1.5, 0)


async def test_a_replay_is_not_evaluated_again(bench: Bench) -> None:
    await bench.click("ann", "a", then=["b"])
    await bench.click("ann", "b", then=["b"])
    bench.offset -= 1
    await bench.click("ann", "b", then=["b"])
    assert bench.counted("m1") == (1, 1, 1.0, 0)


async def test_a_list_that_already_counts_the_click_is_not_evaluated(bench: Bench) -> None:
    await bench.click("ann", "a", then=["b"])
    sequences = await bench.store.append(batch(event("ann", "c", 10, BASE_MS + 10)))
    lists = [Recommendation("ann", ["c"], [1.0], "m1", BASE_MS + 10, sequences[0].n)]
    await bench.publisher.publish(lists)  # the reply is lost, so the list is published again
    bench.judge.evaluate(sequences, await bench.publisher.publish(lists))
    assert bench.counted("m1") == (0, 0, 0, 0)


@pytest.mark.parametrize("value", ["garbage", "{}", json.dumps({"items": 5})])
async def test_a_list_that_cannot_be_read_is_not_evaluated(
    redis: RedisClient, make_settings: MakeSettings, value: str
) -> None:
    settings = make_settings()
    bench = Bench(redis, settings)
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).recommendation("ann"), value)
    await bench.click("ann", "a", then=["b"])
    await bench.click("ann", "b", then=["b"])
    assert bench.counted("m1") == (1, 1, 1.0, 0)


async def test_the_figures_of_a_long_stream_match_a_plain_count(bench: Bench) -> None:
    rng = random.Random(3)
    items = [f"i{n}" for n in range(12)]
    shown: dict[str, tuple[str, list[str]]] = {}
    expected: dict[str, Counter[str]] = {}
    for step in range(300):
        user, clicked = f"u{rng.randrange(8)}", [rng.choice(items) for _ in range(rng.choice((1, 1, 1, 3)))]
        if user in shown:
            model, listed = shown[user]
            counts = expected.setdefault(model, Counter())
            counts["judged"] += len(clicked)
            counts["hits"] += sum(click in listed[:10] for click in clicked)
            ranks: Any = sum(1 / (listed.index(click) + 1) for click in clicked if click in listed[:10])
            counts["ranks"] += ranks
        shown[user] = (f"m{step // 100}", rng.sample(items, 11))
        await bench.click(user, *clicked, then=shown[user][1], model=shown[user][0])
    for model, counts in expected.items():
        judged, hits, ranks, _ = bench.counted(model)
        assert (judged, hits) == (counts["judged"], counts["hits"])
        assert ranks == pytest.approx(counts["ranks"])


def labels_of(metrics: Metrics) -> set[str]:
    return {
        sample.labels["model"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "model" in sample.labels
    }


@pytest.mark.parametrize("served", [True, False])
async def test_only_the_last_few_model_versions_have_metrics_of_their_own(
    redis: RedisClient, make_settings: MakeSettings, served: bool
) -> None:
    metrics = Metrics()
    counts = OnlineCounts(under(redis, make_settings()), metrics)
    counts.serve("champion")
    for number in range(720):
        if served:
            counts.serve(f"v{number}")
        counts.count(f"v{number}", ["a"], ["a"], 1)
        counts.count("champion", ["a"], ["b"], 0)
    counts.count("x" * 1_000, ["a"], ["a"], 0)
    counts.count("popular", ["a"], ["a"], 1)
    named = {f"v{number}" for number in (range(713, 720) if served else range(7))}
    assert labels_of(metrics) == {"champion", "popular", "other", *named}
    judged = {label: metrics.judged.labels(label)._value.get() for label in labels_of(metrics)}
    assert (judged["champion"], judged["popular"]) == (720, 1)
    assert sum(judged.values()) == (720 + 7 + 2 if served else 720 + 720 + 2)


async def test_a_version_that_is_served_is_never_pushed_out_by_names_that_redis_has(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    metrics = Metrics()
    counts = OnlineCounts(under(redis, make_settings()), metrics)
    for number in range(20):
        counts.count(f"junk{number}", ["a"], ["a"], 0)
    for number in range(8):
        counts.serve(f"v{number}")
    for number in range(20, 40):
        counts.count(f"junk{number}", ["a"], ["a"], 0)
    assert labels_of(metrics) == {"other", *(f"v{number}" for number in range(8))}


@pytest.mark.parametrize("name", ["", "\ud800", "é", "a\nb", "\x1b[31m", "x" * 65])
async def test_a_model_name_that_is_none_breaks_neither_metrics_nor_figures(
    redis: RedisClient, make_settings: MakeSettings, name: str
) -> None:
    metrics = Metrics()
    counts = OnlineCounts(under(redis, make_settings()), metrics)
    counts.count(name, ["a"], ["a"], 0)
    counts.compare(name, ["a"], ["a"], ["a"])
    await counts.flush()
    assert labels_of(metrics) == {"other"}
    assert b'streamrec_judged_clicks_total{model="other"} 1.0' in metrics.exposition()


@pytest.mark.parametrize(
    "value",
    [
        b'{"items": ["\xff"], "scores": [1.0], "model": "m", "event_ts_ms": 1, "published_ts_ms": 1, "n": 1}',
        b'{"items": ["\\ud800"], "scores": [1.0], "model": "\\ud800", "event_ts_ms": 1, "published_ts_ms": 1, "n": 1}',
        b'{"x": ' + b"[" * 100_000,
        b"\xff",
    ],
    ids=["no UTF-8", "half a surrogate pair", "nested", "a byte"],
)
async def test_a_list_that_another_program_wrote_ends_nothing(bench: Bench, value: bytes) -> None:
    sequences = [UserSequence("ann", StoredItems.of(["a", "b"]), 2, 2, BASE_MS, applied=1)]
    assert len(bench.judge.evaluate(sequences, [value])) <= 1
    assert bench.counted("m1") == (0, 0, 0, 0)
    assert bench.metrics.exposition()


async def test_a_fault_in_judging_is_one_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SharedLists, "popular_hits", lambda *_: 1 / 0)
    for _ in range(3):
        await bench.click("ann", "a", then=["b"])
    assert [record.getMessage() for record in caplog.records] == [
        "the clicks of a batch are not judged: ZeroDivisionError('division by zero')"
    ]


async def test_names_of_models_do_not_fill_the_memory_while_redis_is_away(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    counts = OnlineCounts(under(redis, make_settings()), Metrics())
    for number in range(5_000):
        counts.count(f"junk{number}", ["a"], ["a"], 0)
    assert len(counts._pending) == 1_000
