"""Await conditions instead of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

R = TypeVar("R")


async def eventually(check: Callable[[], Awaitable[R]], timeout_s: float = 30.0, every_s: float = 0.05) -> R:
    """Wait until ``check`` returns a truthy answer, and return it."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = await check()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"did not become true within {timeout_s} s; last answer: {answer!r}")
        await asyncio.sleep(every_s)
