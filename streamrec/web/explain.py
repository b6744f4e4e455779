"""Why an item stands in a user's list: how far its score falls when one of his last clicks is left out.

Asked by a person who looks at the live page, so clicks go first: a few windows are encoded at a time, only
while no batch is in hand, beside the cache; who asks too much is told so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from sasrec import Engine
from streamrec.errors import Unexplained
from streamrec.schemas import UserSequence
from streamrec.serving.predictor import Predictor

CLICKS = 20  # the last ones, each left out once
AT_ONCE = 4  # windows encoded in one go, for which a click may have to wait
WAITING = 8  # questions
TIMEOUT_S = 5.0

Idle = Callable[[], Awaitable[None]]


class Effect(msgspec.Struct, frozen=True):
    """A click, and how far the score falls without it; None where the model does not see it, or sees no other."""

    item_id: str
    fall: float | None


class Why(msgspec.Struct, frozen=True):
    """The score that the model gives an item now, and what each of the last clicks, newest first, adds to it."""

    item_id: str
    score: float
    model: str
    clicks: list[Effect]


class Explainer:
    """Answers one question after another."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._questions: asyncio.Queue[tuple[UserSequence, str, asyncio.Future[Why]]] = asyncio.Queue(WAITING)

    async def ask(self, sequence: UserSequence, item_id: str) -> Why:
        """Why this user may be shown this item.

        Raises:
            Unexplained: the model does not know the item or any click, or the daemon has no time for it.
        """
        answer: asyncio.Future[Why] = asyncio.get_running_loop().create_future()
        try:
            self._questions.put_nowait((sequence, item_id, answer))
            async with asyncio.timeout(TIMEOUT_S):
                return await answer
        except (asyncio.QueueFull, TimeoutError):
            raise Unexplained("clicks go first, and there are many now; ask again in a moment") from None

    async def run(self, idle: Idle) -> None:
        """Answer until cancelled.

        Args:
            idle: returns when no batch is in hand.
        """
        while True:
            sequence, item_id, answer = await self._questions.get()
            try:
                found = await self._explain(sequence, item_id, answer, idle)
            except Exception as error:  # for who has asked; the next one may have more luck
                if not answer.done():
                    answer.set_exception(error)
            else:
                if found is not None and not answer.done():
                    answer.set_result(found)

    async def _explain(
        self, sequence: UserSequence, item_id: str, answer: asyncio.Future[Why], idle: Idle
    ) -> Why | None:
        """The answer, or None once nobody waits for it any more."""
        engine = self._predictor.engine  # the same one throughout, whatever is swapped meanwhile
        items = sequence.items
        tokens, (item,) = engine.vocab.encode(items), engine.vocab.encode([item_id])
        window = engine.window(tokens, sequence.session_n).tolist()
        if not item or not window:
            raise Unexplained("the model does not know " + ("this user's clicks" if item else "this item"))
        seen = [place for place, token in enumerate(tokens) if token][-len(window) :]  # the clicks of the window
        asked = [place for place in seen[-CLICKS:] if len(window) > 1]
        left_out = [[t for i, t in enumerate(window) if seen[i] != place] for place in asked]
        scores: list[float] = []
        windows = [window, *left_out]
        for start in range(0, len(windows), AT_ONCE):
            await idle()
            if answer.done():
                return None
            part = windows[start : start + AT_ONCE]
            scores += _scores(engine, part, item)
            await asyncio.sleep(0)
        falls = {place: round(scores[0] - score, 4) for place, score in zip(asked, scores[1:], strict=True)}
        last = range(max(0, len(tokens) - CLICKS), len(tokens))
        effects = [Effect(items[place], falls.get(place)) for place in reversed(last)]
        return Why(item_id, round(scores[0], 5), engine.version, effects)


def _scores(engine: Engine, windows: Sequence[Sequence[int]], item: int) -> list[float]:
    """Of one item after each window, as the engine scores it, and nothing is cached of it."""
    weight = engine.model.item_embedding.weight.detach()[item]
    reminder = engine.model.config.reminder
    scores = (engine.encode(windows) @ weight).tolist()
    return [score + reminder * (item in window) for score, window in zip(scores, windows, strict=True)]
