"""The shadow: evaluated on the same clicks as the champion, without delaying the clicks served."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sasrec import (
    Engine,
    ItemVocab,
    Ranking,
    SASRec,
    SASRecConfig,
    SavedModel,
    Sequences,
    TrainConfig,
    load_model,
    train,
)
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.registry import Registry
from streamrec.schemas import UserSequence
from streamrec.serving import shadow as shadow_module
from streamrec.serving.inspection import published
from streamrec.serving.judge import EvaluatedClicks, OnlineJudge
from streamrec.serving.lists import SharedLists
from streamrec.serving.online import OnlineCounts, OnlineFigures, read_figures
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.serving.shadow import MAX_QUEUED_USERS, MAX_USERS_PER_CALL, Shadow
from streamrec.settings import Settings

from support.daemon_process import Daemon, models, serves, versions_published
from support.kafka_client import produce_clicks, wait_caught_up
from support.redis_access import BASE_MS, batch, event, raw_redis, stored
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
RING = [f"i{n}" for n in range(60)]
USERS = [f"u{n}" for n in range(20)]
SHADOWED = "streamrec_shadow_sequences_total"


@pytest.fixture(scope="module")
def ring_model() -> SASRec:
    """After item n comes n + 1, and it knows."""
    rows = np.array([[(start + step) % 60 + 1 for step in range(9)] for start in range(60)])
    users, offsets = tuple(f"u{n}" for n in range(60)), np.arange(0, rows.size + 1, 9)
    sequences = Sequences(ItemVocab(RING), users, offsets, rows.ravel())
    config = SASRecConfig(60, max_len=8, hidden_units=32, num_blocks=1, dropout_rate=0.0)
    how = TrainConfig(epochs=40, batch_size=16, learning_rate=1e-2, loss="cross_entropy", patience=0)
    model, _ = train(config, sequences, how)
    for ranking, row in zip(Engine(model, ItemVocab(RING)).recommend([[item] for item in RING], 1), rows, strict=True):
        assert ranking is not None
        assert ranking.items == [RING[row[1] - 1]]
    return model


def guessing_model(seed: int) -> SASRec:
    torch.manual_seed(seed)
    model = SASRec(SASRecConfig(60, max_len=8, hidden_units=16, num_blocks=2, dropout_rate=0.0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    with torch.no_grad():
        model.item_embedding.weight[0].zero_()
    return model


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def of(registry: Registry, **changes: Any) -> dict[str, Any]:
    return {
        "model_dir": None,
        "registry_dir": registry.place,
        "registry_poll_s": 3600,
        "lists_refresh_s": 0.1,
    } | changes


async def figures(settings: Settings, version: str) -> OnlineFigures:
    async with RedisClient(settings.redis) as redis:
        found = await read_figures(redis, [version])
    return found.get(version, OnlineFigures())


async def logged(daemon: Daemon, text: str) -> None:
    await eventually(lambda: daemon.has_logged(text))


async def click_in_turn(daemon: Daemon, settings: Settings, step: int) -> int:
    """Every user's next item of the ring; returns in how many published lists it stood, of sampled users."""
    items = [RING[(7 * n + step) % 60] for n in range(len(USERS))]
    async with RedisClient(settings.redis) as redis:
        lists = {u: v async for u, v in published(redis, USERS) if v}
    await produce_clicks(settings, list(zip(USERS, items, strict=True)))
    await wait_caught_up(settings)
    return sum(
        u in lists and i in lists[u].items[:10] for u, i in zip(USERS, items, strict=True) if sampled(u, settings)
    )


def sampled(user: str, settings: Settings) -> bool:
    return zlib.crc32(user.encode()) / 2**32 < settings.serving.shadow_share


# --- of daemons


async def test_a_shadow_is_evaluated_on_the_same_clicks_as_the_champion(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry, ring_model: SASRec
) -> None:
    guesses = registry.publish(guessing_model(1), ItemVocab(RING))
    knows = registry.publish(ring_model, ItemVocab(RING))
    registry.promote(guesses, "first")
    registry.set_shadow(knows)  # before the daemon is there
    settings = make_settings(**of(registry, serving_shadow_share=0.6))
    daemon = start_daemon(**of(registry, serving_shadow_share=0.6))
    await daemon.wait_ready()
    await logged(daemon, f"a shadow begins model={knows} share=0.6")
    some = sum(sampled(user, settings) for user in USERS)
    assert 5 < some < len(USERS)
    champion_hits = 0
    for step in range(8):
        champion_hits += await click_in_turn(daemon, settings, step)

        async def everybody_is_scored(scored: int = some * (step + 1)) -> bool:
            return await daemon.metric(SHADOWED, outcome="scored") == scored

        await eventually(everybody_is_scored)
    assert await daemon.metric(SHADOWED, outcome="skipped") == 0
    judged = some * 7  # all but each user's first click
    assert await daemon.metric("streamrec_judged_clicks_total", model=knows) == judged
    assert await daemon.metric("streamrec_hits_total", model=knows) == judged, "it always knows"
    assert await daemon.metric("streamrec_judged_clicks_total", model=guesses) == len(USERS) * 7

    async def flushed() -> bool:
        return (await figures(settings, knows)).champion_judged == judged

    await eventually(flushed)
    found = await figures(settings, knows)
    assert (found.judged, found.hits, found.shadow_hits) == (judged, judged, judged)
    assert found.champion_hits == champion_hits < 0.5 * judged
    assert set((await versions_published(settings)).values()) == {guesses}, "a shadow publishes nothing"
    listed = models(settings, "list").stdout.splitlines()
    (line,) = (line for line in listed if line.startswith("shadow"))
    assert line.split()[1] == knows
    assert line.split()[-3:] == ["1.0000", f"{champion_hits / judged:.4f}", str(judged)]
    assert listed[0].endswith("as shadow hr@10  champion on the same clicks  same clicks")
    (known,) = (json.loads(found) for found in models(settings, "list", "--json").stdout.splitlines() if knows in found)
    assert (known["shadow"], known["champion"], known["online"]["shadow_hr@10"]) == (True, False, 1.0)
    assert daemon.lines("ERROR", "WARNING") == []


async def test_a_damaged_shadow_is_refused_and_a_good_one_begins_and_ends_while_serving_continues(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry
) -> None:
    champion, broken, good = (registry.publish(guessing_model(seed), ItemVocab(RING)) for seed in (1, 2, 3))
    registry.promote(champion, "first")
    registry.set_shadow(broken)
    weights = registry.place / "versions" / broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"rust")
    settings = make_settings(**of(registry, serving_shadow_share=1))
    daemon = start_daemon(**of(registry, serving_shadow_share=1))
    await daemon.wait_ready()
    await logged(daemon, f"the shadow {broken} is refused: ")
    await click_in_turn(daemon, settings, 0)
    assert set((await versions_published(settings)).values()) == {champion}
    assert await daemon.metric(SHADOWED) == 0
    begun = models(settings, "shadow", good)  # only the message notifies the daemon
    assert (begun.returncode, begun.stdout, begun.stderr) == (0, f"shadow: {good}\n", "")
    await logged(daemon, f"a shadow begins model={good}")
    await click_in_turn(daemon, settings, 1)

    async def scored() -> bool:
        return await daemon.metric(SHADOWED, outcome="scored") == len(USERS)

    await eventually(scored)
    assert models(settings, "shadow", "--off").stdout == "no shadow\n"
    await logged(daemon, f"the shadow ends model={good}")
    await click_in_turn(daemon, settings, 2)
    assert await daemon.metric(SHADOWED) == len(USERS)
    assert await daemon.metric("streamrec_judged_clicks_total", model=good) == 0, "forgotten with its lists"
    assert set((await versions_published(settings)).values()) == {champion}
    assert len(daemon.lines("ERROR")) == 1


async def test_a_shadow_that_becomes_champion_ends(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry
) -> None:
    old, new = (registry.publish(guessing_model(seed), ItemVocab(RING)) for seed in (1, 2))
    registry.promote(old, "first")
    where = of(registry, serving_shadow_share=1, registry_poll_s=0.1)
    settings, daemon = make_settings(**where), start_daemon(**where)
    await daemon.wait_ready()
    registry.set_shadow(new)  # no message: the daemon polls
    await logged(daemon, f"a shadow begins model={new}")
    (registry.place / "shadow.json").write_text("{")
    await logged(daemon, "the current shadow continues: ")
    await click_in_turn(daemon, settings, 0)
    registry.set_shadow(new)  # which mends it
    registry.promote(new, "better")
    await eventually(lambda: serves(daemon, new))
    await logged(daemon, f"the shadow ends model={new}")
    assert registry.shadow() is None
    await click_in_turn(daemon, settings, 1)
    assert set((await versions_published(settings)).values()) == {new}
    assert daemon.lines("ERROR")[1:] == []


# --- the part alone


@pytest.fixture(scope="module")
def saved(model_dir: Path) -> SavedModel:
    return load_model(model_dir)


class Turn:
    """Lets the shadow score a part for each permit."""

    def __init__(self) -> None:
        self._permits = asyncio.Semaphore(0)
        self._always = False

    async def idle(self) -> None:
        if not self._always:
            await self._permits.acquire()

    def once(self) -> None:
        self._permits.release()

    def always(self) -> None:
        self._always = True
        self._permits.release()


class Bench:
    """A shadow that samples all users, with its parts, on real Redis."""

    def __init__(self, saved: SavedModel, redis: RedisClient, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, 8, saved.vocab)
        self.counts = OnlineCounts(redis, self.metrics)
        self.predictor = Predictor(
            self.engine(saved), self.lists, settings.lists, settings.serving.rescore_users, self.metrics
        )
        self.shadow = Shadow(settings.serving.shadow_share, settings.lists, self.lists, self.counts, self.metrics)
        self.turn = Turn()
        self.store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, self.metrics)
        self.publisher = Publisher(redis, settings.lists.ttl_s, self.metrics)
        self.judge = OnlineJudge(self.lists, self.counts, settings.lists.filter_seen)
        self.enqueued = 0

    @staticmethod
    def engine(saved: SavedModel, kind: type[Engine] = Engine, version: str = "shadow") -> Engine:
        return kind(saved.model, saved.vocab, version=version, cache_bytes=2**20)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def outcomes(self) -> tuple[float, float]:
        """Scored, skipped."""
        return self.count(SHADOWED, outcome="scored"), self.count(SHADOWED, outcome="skipped")

    async def scored(self, number: int) -> None:
        async def enough() -> bool:
            return self.outcomes()[0] >= number

        await eventually(enough, every_s=0.001)

    async def compared(self) -> tuple[float, float, float]:
        """Return the shadow's hits, the clicks on which both were evaluated, and the hits of the published lists."""
        await self.counts.flush()
        found = await figures(self.settings, "shadow")
        return found.shadow_hits, found.champion_judged, found.champion_hits


@pytest.fixture
async def bench(saved: SavedModel, redis: RedisClient, make_settings: MakeSettings) -> AsyncIterator[Bench]:
    made = Bench(saved, redis, make_settings(serving_shadow_share=1, lists_top_k=12))
    running = asyncio.create_task(made.shadow.run(made.turn.idle))
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def sequence(user: str, items: list[str], n: int | None = None) -> UserSequence:
    count = len(items) if n is None else n
    return UserSequence(user, stored(items), count, count, BASE_MS, 1, (BASE_MS,))


def clicked(user: str, n: int, *clicks: str) -> EvaluatedClicks:
    return EvaluatedClicks(user, n, list(clicks), ["published"], clicks.count("popular"))


async def test_a_twin_of_the_champion_hits_what_the_champion_hits(
    bench: Bench, saved: SavedModel, redis: RedisClient
) -> None:
    rng, items = random.Random(1), list(saved.vocab.ids)
    async with raw_redis(bench.settings) as raw:
        await raw.sadd(Keys(bench.settings.redis.key_prefix).blocklist, *items[:5])  # type: ignore[misc]
    await bench.lists.refresh()
    bench.shadow.begin(bench.engine(saved))
    bench.turn.always()
    had_a_list, judged, offset = set(), 0, 0
    for _ in range(120):
        users = rng.sample(USERS, 3)
        events = []
        for user in users:
            clicks = [rng.choice([*items, "unknown"]) for _ in range(rng.choice((1, 1, 3)))]
            judged += len(clicks) if user in had_a_list else 0
            for click in clicks:
                events.append(event(user, click, offset))
                offset += 1
        had_a_list |= set(users)
        sequences = await bench.store.append(batch(*events))
        before = await bench.publisher.publish(await bench.predictor.predict(sequences))
        bench.enqueued += len(sequences)
        bench.shadow.follow(sequences, bench.judge.evaluate(sequences, before))
        await bench.scored(bench.enqueued)
    shadow_hits, both_judged, champion_hits = await bench.compared()
    assert shadow_hits == champion_hits > 10
    assert both_judged == judged


async def test_it_scores_no_user_while_a_batch_is_processed_and_only_a_few_per_call(
    bench: Bench, saved: SavedModel
) -> None:
    bench.shadow.begin(bench.engine(saved))
    bench.shadow.follow([sequence(user, ["i1"]) for user in USERS], [])
    for _ in range(3):  # serving is not delayed
        await bench.predictor.predict([sequence("ann", ["i1"])])
    assert bench.outcomes() == (0, 0)
    bench.turn.once()
    await bench.scored(1)
    await bench.predictor.predict([sequence("ann", ["i1"])])
    assert bench.outcomes() == (MAX_USERS_PER_CALL, 0)
    bench.turn.always()
    await bench.scored(len(USERS))


async def test_a_shadow_that_cannot_keep_up_skips_the_users_who_waited_longest(bench: Bench, saved: SavedModel) -> None:
    bench.shadow.begin(bench.engine(saved))
    users = [f"u{n}" for n in range(MAX_QUEUED_USERS + 10)]
    bench.shadow.follow([sequence(user, ["i1"]) for user in users], [])
    bench.shadow.follow([sequence("u11", ["i1", "i2"])], [])
    assert bench.outcomes() == (0, 11)
    bench.turn.always()
    await bench.scored(MAX_QUEUED_USERS)
    bench.shadow.follow([], [clicked(user, 1, "i3") for user in users[:20]])
    assert (await bench.compared())[1] == 9, "of the first 20 ten were left out, and one has clicked twice"


async def test_a_list_without_all_earlier_clicks_is_not_evaluated(bench: Bench, saved: SavedModel) -> None:
    bench.shadow.begin(bench.engine(saved))
    bench.turn.once()
    bench.shadow.follow([sequence("ann", ["i1"])], [])
    await bench.scored(1)
    bench.shadow.follow([sequence("ann", ["i1", "i2", "i3"])], [clicked("ann", 2, "i3")])
    assert (await bench.compared())[1] == 0, "another daemon has served the second click"
    bench.turn.once()
    await bench.scored(2)
    bench.shadow.follow([sequence("ann", ["i1", "i2", "i3", "i4", "i5"])], [clicked("ann", 3, "i4", "i5")])
    assert (await bench.compared())[1] == 2
    bench.shadow.follow([], [clicked("ann", 3, "i4", "i5")])
    assert (await bench.compared())[1] == 2, "a list is evaluated once"


async def test_the_number_of_stored_lists_is_limited(
    bench: Bench, saved: SavedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_module, "MAX_STORED_LISTS", 5)
    bench.shadow.begin(bench.engine(saved))
    bench.turn.always()
    for user in USERS:
        bench.shadow.follow([sequence(user, ["i1"])], [])
    await bench.scored(len(USERS))
    bench.shadow.follow([], [clicked(user, 1, "i2") for user in USERS])
    assert (await bench.compared())[1] == 5


async def test_a_user_without_a_known_item_would_see_the_popular_list(bench: Bench, saved: SavedModel) -> None:
    bench.shadow.begin(bench.engine(saved))
    bench.turn.always()
    bench.shadow.follow([sequence("ann", ["unknown"])], [])
    await bench.scored(1)
    bench.shadow.follow([], [clicked("ann", 1, "i0")])  # the most popular item
    assert await bench.compared() == (1, 1, 0)
    assert bench.count("streamrec_judged_clicks_total", model="shadow") == 0, "it is not its own list"


class EngineThatFails(Engine):
    def recommend(self, *args: Any, **options: Any) -> list[Ranking | None]:
        raise RuntimeError("out of memory")


async def test_a_shadow_that_fails_ends_with_one_line_and_serving_continues(
    bench: Bench, saved: SavedModel, caplog: pytest.LogCaptureFixture
) -> None:
    bench.shadow.begin(bench.engine(saved, EngineThatFails))
    bench.turn.always()
    bench.shadow.follow([sequence(user, ["i1"]) for user in USERS], [])

    async def has_said_so() -> bool:
        return any("the shadow has failed" in record.message for record in caplog.records)

    await eventually(has_said_so)
    bench.shadow.follow([sequence(user, ["i1"]) for user in USERS], [clicked("ann", 1, "i1")])
    assert len(await bench.predictor.predict([sequence("ann", ["i1"])])) == 1
    assert bench.outcomes() == (0, 0)
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1
    bench.shadow.begin(bench.engine(saved))
    bench.shadow.follow([sequence("ann", ["i1"])], [])
    await bench.scored(1)


async def test_a_batch_that_the_shadow_cannot_evaluate_is_served(
    bench: Bench, saved: SavedModel, caplog: pytest.LogCaptureFixture
) -> None:
    bench.shadow.begin(bench.engine(saved))
    bench.shadow.follow([sequence("\ud800", ["i1"])], [])  # no id that the decoder lets through
    assert "the shadow has failed" in caplog.text


async def test_a_shadow_is_not_evaluated_on_the_lists_of_the_previous_one(bench: Bench, saved: SavedModel) -> None:
    bench.turn.always()
    bench.shadow.begin(bench.engine(saved, version="before"))
    bench.shadow.follow([sequence("ann", ["i1"])], [])
    await bench.scored(1)
    bench.shadow.begin(bench.engine(saved))
    bench.shadow.follow([], [clicked("ann", 1, "i2")])
    assert await bench.compared() == (0, 0, 0)


async def test_without_a_shadow_nothing_is_done(bench: Bench) -> None:
    bench.turn.always()
    bench.shadow.follow([sequence("ann", ["i1"])], [clicked("ann", 0, "i1")])
    await bench.predictor.predict([sequence("ann", ["i1"])])
    assert bench.outcomes() == (0, 0)
    assert await bench.compared() == (0, 0, 0)
