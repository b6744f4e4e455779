"""Explain an item of a user's list: how far its score falls when one of the user's last clicks is left out.

People ask for explanations on the live page, so clicks go first: a few windows are encoded at a time, only between
two batches, without the cache. Requests beyond a short queue are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from sasrec import Engine
from streamrec.errors import Unexplained
from streamrec.schemas import UserSequence
from streamrec.serving.predictor import Predictor

MAX_CLICKS = 20  # the newest ones; each is left out once
WINDOWS_PER_ENCODE = 4  # a click may have to wait for these
MAX_WAITING = 8  # requests
TIMEOUT_S = 5.0

WaitIdle = Callable[[], Awaitable[None]]


class ClickEffect(msgspec.Struct, frozen=True):
    """A click, and how far the score falls without it.

    ``fall`` is None if the model does not see the click, or sees no other.
    """

    item_id: str
    fall: float | None


class Explanation(msgspec.Struct, frozen=True):
    """The current score of an item, and the effect of each of the last clicks, newest first.

    ``n``: events of the user when the score was computed.
    """

    item_id: str
    score: float
    model: str
    n: int
    clicks: list[ClickEffect]


class Explainer:
    """Explains one item at a time, in the order of the requests."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._requests: asyncio.Queue[tuple[UserSequence, str, asyncio.Future[Explanation]]] = asyncio.Queue(
            MAX_WAITING
        )

    async def explain(self, sequence: UserSequence, item_id: str) -> Explanation:
        """Explain the score of an item for a user.

        Raises:
            Unexplained: the model does not know the item or any click, or the daemon is too busy.
        """
        result: asyncio.Future[Explanation] = asyncio.get_running_loop().create_future()
        try:
            self._requests.put_nowait((sequence, item_id, result))
            async with asyncio.timeout(TIMEOUT_S):
                return await result
        except (asyncio.QueueFull, TimeoutError):
            raise Unexplained("the daemon is busy with clicks, which go first; try again in a moment") from None

    async def run(self, wait_idle: WaitIdle) -> None:
        """Explain until cancelled.

        Args:
            wait_idle: waits until no batch is being processed.
        """
        while True:
            sequence, item_id, result = await self._requests.get()
            try:
                explanation = await self._explain(sequence, item_id, result, wait_idle)
            except Exception as error:  # it belongs to this request; later ones are answered
                if not result.done():
                    result.set_exception(error)
            else:
                if explanation is not None and not result.done():
                    result.set_result(explanation)

    async def _explain(
        self, sequence: UserSequence, item_id: str, result: asyncio.Future[Explanation], wait_idle: WaitIdle
    ) -> Explanation | None:
        """Return the explanation, or None if the request has timed out."""
        engine = self._predictor.engine  # one engine for all windows, even if a model is swapped meanwhile
        items = sequence.items
        tokens, (item,) = engine.vocab.encode(items), engine.vocab.encode([item_id])
        window = engine.window(tokens, sequence.session_n).tolist()
        if not item or not window:
            raise Unexplained("the model does not know " + ("this user's clicks" if item else "this item"))
        seen = [place for place, token in enumerate(tokens) if token][-len(window) :]  # places of the window's clicks
        left_out = [place for place in seen[-MAX_CLICKS:] if len(window) > 1]
        windows = [window, *([t for t, at in zip(window, seen, strict=True) if at != place] for place in left_out)]
        scores: list[float] = []
        for start in range(0, len(windows), WINDOWS_PER_ENCODE):
            await wait_idle()
            if result.done():
                return None
            scores += _scores(engine, windows[start : start + WINDOWS_PER_ENCODE], item)
            await asyncio.sleep(0)
        falls = {place: round(scores[0] - score, 4) for place, score in zip(left_out, scores[1:], strict=True)}
        newest = range(max(0, len(tokens) - MAX_CLICKS), len(tokens))
        effects = [ClickEffect(items[place], falls.get(place)) for place in reversed(newest)]
        return Explanation(item_id, round(scores[0], 5), engine.version, sequence.n, effects)


def _scores(engine: Engine, windows: Sequence[Sequence[int]], item: int) -> list[float]:
    """Return the engine's score of an item after each window, and cache nothing."""
    weight = engine.model.item_embedding.weight.detach()[item]
    reminder = engine.model.config.reminder
    scores = (engine.encode(windows) @ weight).tolist()
    return [score + reminder * (item in window) for score, window in zip(scores, windows, strict=True)]
