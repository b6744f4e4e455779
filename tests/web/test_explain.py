"""Why an item stands in a list: scores without one click or another, while clicks go first."""

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
from streamrec.web.explain import CLICKS, WAITING, Explainer, Why

from support.redis_access import stored


class Scene:
    """An explainer over a predictor, and whether a batch is in hand."""

    def __init__(self, model_dir: Path) -> None:
        settings = load_settings(flags={"inference_cache_bytes": 1 << 20})
        saved = load_model(model_dir)
        self.engine, self.metrics = (
            ServedModel.of(saved, settings.inference, settings.sequences.max_len).engine,
            Metrics(),
        )
        lists = SharedLists(RedisClient(settings.redis), settings.lists, settings.sequences.ttl_s, 8, saved.vocab)
        self.predictor = Predictor(self.engine, lists, settings.lists, settings.serving.rescore_users, self.metrics)
        self.explainer = Explainer(self.predictor)
        self.idle = asyncio.Event()
        self.idle.set()
        self.asked = 0

    async def wait_idle(self) -> None:
        self.asked += 1
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
    """As the list that is published would have it."""
    (ranking,) = scene.engine.recommend([items], 50, filter_seen=False)
    assert ranking is not None
    return ranking.scores[ranking.items.index(item)]


async def test_each_fall_is_the_difference_to_the_score_without_that_click(scene: Scene) -> None:
    items = ["i3", "i9", "x", "i3", "i20"]
    why = await scene.explainer.ask(user(*items), "i7")
    assert (why.item_id, why.score) == ("i7", pytest.approx(score(scene, items, "i7"), abs=1e-3))
    assert [click.item_id for click in why.clicks] == list(reversed(items))
    for place, click in enumerate(reversed(why.clicks)):
        if click.item_id == "x":
            assert click.fall is None, "the model does not know it"
        else:
            without = score(scene, items[:place] + items[place + 1 :], "i7")
            assert click.fall == pytest.approx(why.score - without, abs=1e-3)


async def test_only_clicks_of_the_window_count_and_the_only_one_has_nothing_beside_it(scene: Scene) -> None:
    items = [f"i{n}" for n in range(12)]
    why = await scene.explainer.ask(user(*items, n=12), "i40")
    window = len(scene.engine.window(scene.engine.vocab.encode(items), 12))
    assert [click.fall is None for click in why.clicks] == [False] * window + [True] * (12 - window)
    only = await scene.explainer.ask(user("i1"), "i40")
    assert [click.fall for click in only.clicks] == [None]
    many = await scene.explainer.ask(user(*items * 4, n=48), "i40")
    assert len(many.clicks) == CLICKS


async def test_nothing_is_cached_or_counted(scene: Scene) -> None:
    await scene.explainer.ask(user("i1", "i2", "i3"), "i7")
    assert scene.engine.cached_users == 0
    stats = scene.engine.take_stats()
    assert (stats.hits, stats.misses) == (0, 0)


@pytest.mark.parametrize(
    ("sequence", "item", "said"),
    [(user("i1"), "x", "does not know this item"), (user("x", "y"), "i1", "does not know this user's clicks")],
)
async def test_what_the_model_does_not_know_cannot_be_told(
    scene: Scene, sequence: UserSequence, item: str, said: str
) -> None:
    with pytest.raises(Unexplained, match=said):
        await scene.explainer.ask(sequence, item)
    assert isinstance(await scene.explainer.ask(user("i1"), "i2"), Why), "the next question is answered"


async def test_a_batch_in_hand_goes_first(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.idle.clear()
    question = asyncio.create_task(scene.explainer.ask(user("i1", "i2", "i3", "i4", "i5"), "i7"))
    await asyncio.sleep(0.05)
    assert not question.done()
    scene.idle.set()
    await question
    assert scene.asked == 2, "before each of the two handfuls of windows"
    scene.idle.clear()
    monkeypatch.setattr(explain, "TIMEOUT_S", 0.05)
    with pytest.raises(Unexplained, match="clicks go first"):
        await scene.explainer.ask(user("i1", "i2"), "i7")
    scene.idle.set()
    monkeypatch.setattr(explain, "TIMEOUT_S", 5.0)
    assert await scene.explainer.ask(user("i1", "i2"), "i7"), "who has given up is not in the way"


async def test_more_questions_than_may_wait_are_refused_at_once(scene: Scene) -> None:
    scene.idle.clear()
    waiting = [asyncio.create_task(scene.explainer.ask(user("i1", "i2"), "i7")) for _ in range(WAITING)]
    await asyncio.sleep(0.05)  # one of them is in hand by now, and one more may wait
    waiting.append(asyncio.create_task(scene.explainer.ask(user("i1", "i2"), "i7")))
    await asyncio.sleep(0)
    with pytest.raises(Unexplained, match="ask again"):
        await asyncio.wait_for(scene.explainer.ask(user("i1", "i2"), "i7"), 1)
    scene.idle.set()
    assert len(await asyncio.gather(*waiting)) == WAITING + 1
