"""Explanations of an item in a list: scores with one click left out, computed only while no batch is processed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sasrec import load_model
from streamrec.errors import Unexplained
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.schemas import UserSequence
from streamrec.serving.lists import SharedLists
from streamrec.serving.model import ServedModel
from streamrec.serving.predictor import Predictor
from streamrec.settings_sources import load_settings
from streamrec.web import explain
from streamrec.web.explain import MAX_CLICKS, MAX_WAITING, Explainer, Explanation

from support.redis_access import stored


class Scene:
    """An explainer over a predictor. ``idle`` is set while no batch is processed."""

    def __init__(self, model_dir: Path) -> None:
        settings = load_settings(flags={"inference_cache_bytes": 1 << 20})
        saved = load_model(model_dir)
        self.engine = ServedModel.of(saved, settings.inference, settings.sequences.max_len).engine
        self.metrics = Metrics()
        lists = SharedLists(RedisClient(settings.redis), settings.lists, settings.sequences.ttl_s, 8, saved.vocab)
        self.predictor = Predictor(self.engine, lists, settings.lists, settings.serving.rescore_users, self.metrics)
        self.explainer = Explainer(self.predictor)
        self.idle = asyncio.Event()
        self.idle.set()
        self.waits = 0

    async def wait_idle(self) -> None:
        self.waits += 1
        await self.idle.wait()


@pytest.fixture
async def scene(model_dir: Path) -> AsyncIterator[Scene]:
    made = Scene(model_dir)
    task = asyncio.create_task(made.explainer.run(made.wait_idle))
    yield made
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def user(*items: str, n: int | None = None) -> UserSequence:
    return UserSequence("ann", stored(items), n or len(items), n or len(items), 0)


def score(scene: Scene, items: list[str], item: str) -> float:
    """Return the score that a published list would show."""
    (ranking,) = scene.engine.recommend([items], 50, filter_seen=False)
    assert ranking is not None
    return ranking.scores[ranking.items.index(item)]


async def test_each_fall_is_the_difference_to_the_score_without_that_click(scene: Scene) -> None:
    items = ["i3", "i9", "x", "i3", "i20"]
    why = await scene.explainer.explain(user(*items), "i7")
    assert (why.item_id, why.score, why.n) == ("i7", pytest.approx(score(scene, items, "i7"), abs=1e-3), 5)
    assert [click.item_id for click in why.clicks] == list(reversed(items))
    for place, click in enumerate(reversed(why.clicks)):
        if click.item_id == "x":
            assert click.fall is None, "the model does not know it"
        else:
            without = score(scene, items[:place] + items[place + 1 :], "i7")
            assert click.fall == pytest.approx(why.score - without, abs=1e-3)


async def test_clicks_outside_the_window_and_an_only_click_have_no_effect(scene: Scene) -> None:
    items = [f"i{n}" for n in range(12)]
    why = await scene.explainer.explain(user(*items, n=12), "i40")
    window = len(scene.engine.window(scene.engine.vocab.encode(items), 12))
    assert [click.fall is None for click in why.clicks] == [False] * window + [True] * (12 - window)
    only = await scene.explainer.explain(user("i1"), "i40")
    assert [click.fall for click in only.clicks] == [None]
    many = await scene.explainer.explain(user(*items * 4, n=48), "i40")
    assert len(many.clicks) == MAX_CLICKS


async def test_an_explanation_changes_neither_cache_nor_statistics(scene: Scene) -> None:
    await scene.explainer.explain(user("i1", "i2", "i3"), "i7")
    assert scene.engine.cached_users == 0
    stats = scene.engine.take_stats()
    assert (stats.hits, stats.misses) == (0, 0)


@pytest.mark.parametrize(
    ("sequence", "item", "message"),
    [(user("i1"), "x", "does not know this item"), (user("x", "y"), "i1", "does not know this user's clicks")],
)
async def test_unknown_items_and_clicks_cannot_be_explained(
    scene: Scene, sequence: UserSequence, item: str, message: str
) -> None:
    with pytest.raises(Unexplained, match=message):
        await scene.explainer.explain(sequence, item)
    assert isinstance(await scene.explainer.explain(user("i1"), "i2"), Explanation), "the next request is answered"


async def test_the_current_batch_goes_first(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.idle.clear()
    request = asyncio.create_task(scene.explainer.explain(user("i1", "i2", "i3", "i4", "i5"), "i7"))
    await asyncio.sleep(0.05)
    assert not request.done()
    scene.idle.set()
    await request
    assert scene.waits == 2, "once before each of the two groups of windows"
    scene.idle.clear()
    monkeypatch.setattr(explain, "TIMEOUT_S", 0.05)
    with pytest.raises(Unexplained, match="busy with clicks, which go first"):
        await scene.explainer.explain(user("i1", "i2"), "i7")
    scene.idle.set()
    monkeypatch.setattr(explain, "TIMEOUT_S", 5.0)
    assert await scene.explainer.explain(user("i1", "i2"), "i7"), "a request that timed out does not block later ones"


async def test_requests_beyond_the_queue_are_refused_at_once(scene: Scene) -> None:
    scene.idle.clear()
    waiting = [asyncio.create_task(scene.explainer.explain(user("i1", "i2"), "i7")) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0.05)  # one of them is being answered by now, so one more may wait
    waiting.append(asyncio.create_task(scene.explainer.explain(user("i1", "i2"), "i7")))
    await asyncio.sleep(0)
    with pytest.raises(Unexplained, match="try again in a moment"):
        await asyncio.wait_for(scene.explainer.explain(user("i1", "i2"), "i7"), 1)
    scene.idle.set()
    assert len(await asyncio.gather(*waiting)) == MAX_WAITING + 1
