"""The daemon of the demo: `streamrec serve`, whose page lets visitors click as users of their own.

/api/items?like=   items by title or id
/api/click         POST {"user_id": ..., "item_id": ...}: a click goes to Kafka, as from any producer

Nothing of this is in `streamrec serve`.
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
from streamrec.logs import configure_logging
from streamrec.schemas import parse_published
from streamrec.serving.lists import POPULAR
from streamrec.setting_groups import EventSettings
from streamrec.settings_sources import load_settings
from streamrec.web.page import LivePage, identifier

SHOWN_ITEMS = 24
VISITOR = re.compile(r"visitor-[0-9a-z]{4,16}")  # nobody clicks in another one's name


class DemoPage(LivePage):
    """The live page, with clicks."""

    demo = True
    _clicks: ClickProducer

    def __init__(self, events: EventSettings, *parts: Any) -> None:
        super().__init__(*parts)
        self._events = events

    def register(self, app: web.Application) -> None:
        """Add the routes, these too."""
        super().register(app)
        self.add_api(app, "/api/items", self._items)
        app.router.add_post("/api/click", self._click)
        app.cleanup_ctx.append(self._producing)

    async def _producing(self, _: web.Application) -> AsyncIterator[None]:
        async with click_producer(self._kafka, self._events) as self._clicks:
            yield

    async def _items(self, request: web.Request) -> object:
        """What fits, or what is popular where nothing was asked for."""
        like = request.query.get("like", "").strip().lower()
        found = iter(await self._popular()) if not like else self._like(like)
        return [self.named(item) for item in islice(found, SHOWN_ITEMS)]

    def _like(self, like: str) -> Iterator[str]:
        for item in self._predictor.engine.vocab.ids:
            if like in item.lower() or like in self._titles.get(item, "").lower():
                yield item

    async def _popular(self) -> list[str]:
        (value,) = await self._redis.get_many([self._keys.popular])
        return parse_published(POPULAR, value).items if value else []

    async def _click(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # which no other web site can send without asking first
            raise web.HTTPUnsupportedMediaType(text="send JSON\n")
        try:
            asked = msgspec.json.decode(await request.read(), type=dict[str, str])
            user, item = asked["user_id"], identifier(asked["item_id"])
        except (msgspec.MsgspecError, ValueError, KeyError):
            raise web.HTTPBadRequest(text='send {"user_id": ..., "item_id": ...}\n') from None
        if not VISITOR.fullmatch(user):
            raise web.HTTPForbidden(text="click as a user of your own: visitor-NAME\n")
        sent_ts_ms = int(time.time() * 1000)
        try:
            await self._clicks.send(Event(user, item, await self._stream_time_ms()))
            await self._clicks.settle()
        except StreamrecError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        return self.as_json({"user_id": user, "item_id": item, "sent_ts_ms": sent_ts_ms})

    async def _stream_time_ms(self) -> int:
        """What the stream takes for now: the clicks that are replayed are of another year.

        A click of today among them would make all that was popular in that year as good as forgotten.

        Raises:
            StreamrecError: no click has come yet.
        """
        for user in self._predictor.recent_users()[:1]:
            sequence, _ = await self._read(user)
            if sequence is not None:
                return sequence.last_event_ts_ms
        raise StreamrecError("the replay has not begun yet; click again in a moment")


def main() -> int:
    """What the demo starts; settings come from the environment."""
    adapt()
    try:
        settings = load_settings()
        configure_logging(settings.log.level, settings.log.format)
        return asyncio.run(serve(settings, page=functools.partial(DemoPage, settings.events)))
    except StreamrecError as error:
        print(f"streamrec: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
