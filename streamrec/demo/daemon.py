"""The daemon of the demo: `streamrec serve` with a page that lets visitors click as new users.

| path | request | response |
|---|---|---|
| /api/items?like= | GET | items by title or id; popular items without ``like`` |
| /api/click | POST {"user_id": ..., "item_id": ...} | the click is sent to Kafka, as by any producer |

`streamrec serve` has none of this.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any

import msgspec
from aiohttp import web

from sasrec import Event
from streamrec.daemon import serve
from streamrec.errors import StreamrecError
from streamrec.kafka.replay import ClickProducer, click_producer
from streamrec.local.embedded_kafka import adapt
from streamrec.logs import configure_logging, one_line
from streamrec.schemas import parse_published
from streamrec.serving.lists import POPULAR
from streamrec.setting_groups import EventSettings
from streamrec.settings_sources import load_settings
from streamrec.web.page import LivePage, identifier

SHOWN_ITEMS = 24
VISITOR = re.compile(r"visitor-[0-9a-z]{4,16}")  # the only users that visitors may click as


class DemoPage(LivePage):
    """The live page with clicks of visitors."""

    demo = True
    _producer: ClickProducer

    def __init__(self, events: EventSettings, *parts: Any) -> None:
        super().__init__(*parts)
        self._events = events

    def register(self, app: web.Application) -> None:
        """Add the routes to an application."""
        super().register(app)
        self.add_api(app, "/api/items", self._items)
        app.router.add_post("/api/click", self._click)
        app.cleanup_ctx.append(self._producing)

    async def _producing(self, _: web.Application) -> AsyncIterator[None]:
        async with click_producer(self._kafka, self._events) as self._producer:
            yield

    async def _items(self, request: web.Request) -> object:
        like = request.query.get("like", "").strip().lower()
        found = self._matching(like) if like else iter(await self._popular())
        return [self.named(item) for item in islice(found, SHOWN_ITEMS)]

    def _matching(self, like: str) -> Iterator[str]:
        for item in self._predictor.engine.vocab.ids:
            if like in item.lower() or like in (self._names.title(item) or "").lower():
                yield item

    async def _popular(self) -> list[str]:
        (value,) = await self._redis.get_many([self._keys.popular])
        return parse_published(POPULAR, value).items if value else []

    async def _click(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # other web sites cannot send JSON without a preflight request
            raise web.HTTPUnsupportedMediaType(text="send JSON\n")
        try:
            click = msgspec.json.decode(await request.read(), type=dict[str, str])
            user, item = click["user_id"], identifier(click["item_id"])
        except (msgspec.MsgspecError, ValueError, KeyError):
            raise web.HTTPBadRequest(text='send {"user_id": ..., "item_id": ...}\n') from None
        if not VISITOR.fullmatch(user):
            raise web.HTTPForbidden(text="click as a new user: visitor-NAME\n")
        sent_ts_ms = int(time.time() * 1000)
        try:
            await self._producer.send(Event(user, item, await self._stream_time_ms()))
            await self._producer.settle()
        except StreamrecError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        return self.as_json({"user_id": user, "item_id": item, "sent_ts_ms": sent_ts_ms})

    async def _stream_time_ms(self) -> int:
        """Return the time of the newest click, since the replayed clicks are years old.

        The popular list decays with time: a click of today would empty it of everything older.

        Raises:
            StreamrecError: no click has come yet.
        """
        for user in self._predictor.recent_users()[:1]:
            sequence, _ = await self._read(user)
            if sequence is not None:
                return sequence.last_event_ts_ms
        raise StreamrecError("the replay has not started yet; click again in a moment")


def main() -> int:
    """Run the daemon with the settings of the environment; return the exit status."""
    adapt()
    try:
        settings = load_settings()
        configure_logging(settings.log.level, settings.log.format)
        return asyncio.run(serve(settings, page=functools.partial(DemoPage, settings.events)))
    except StreamrecError as error:
        print(one_line(f"streamrec: {error}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
