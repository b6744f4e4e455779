"""Requests to the API of the live page."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import ClientSession


async def status(http: ClientSession, url: str, method: str = "GET", **options: Any) -> int:
    """Return the status of the response."""
    async with http.request(method, url, allow_redirects=False, **options) as answer:
        return answer.status


async def get_json(http: ClientSession, url: str) -> Any:
    """Return the JSON of a successful response."""
    async with http.get(url) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def events(http: ClientSession, url: str) -> AsyncIterator[tuple[str, Any]]:
    """Yield server-sent events as (name, value)."""
    async with http.get(url, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.content_type == "text/event-stream"
        name = ""
        async for line in answer.content:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)
