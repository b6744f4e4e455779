"""A broker that answers an empty fetch at once must not be asked without a pause."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from streamrec.kafka import connection as kafka
from streamrec.kafka.connection import EMPTY_FETCH_S, pause_after_empty_fetches


@pytest.mark.parametrize(
    ("found", "takes_s", "pauses"),
    [(False, 0.0, [EMPTY_FETCH_S]), (True, 0.0, []), (False, 2 * EMPTY_FETCH_S, [])],
    ids=["at once and empty", "records", "empty, after a wait"],
)
async def test_only_an_answer_that_is_empty_at_once_is_followed_by_a_pause(
    found: bool, takes_s: float, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, paused = asyncio.sleep, list[float]()

    async def fetch(*request: object) -> bool:
        await wait(takes_s)
        return found

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    consumer = SimpleNamespace(_fetcher=SimpleNamespace(_proc_fetch_request=fetch))
    pause_after_empty_fetches(consumer)
    monkeypatch.setattr(kafka.asyncio, "sleep", pause)
    assert await consumer._fetcher._proc_fetch_request("assignment", 1, "request") is found
    assert paused == pauses


async def test_a_client_that_closes_in_the_pause_ends_without_an_error() -> None:
    async def fetch(*request: object) -> bool:
        return False

    consumer = SimpleNamespace(_fetcher=SimpleNamespace(_proc_fetch_request=fetch))
    pause_after_empty_fetches(consumer)
    asked = asyncio.ensure_future(consumer._fetcher._proc_fetch_request("assignment", 1, "request"))
    await asyncio.sleep(0)
    asked.cancel()
    assert await asked is False
