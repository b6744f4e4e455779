"""The live page of a daemon, and its API. All of it only reads.

| path | response |
|---|---|
| /, /page/... | the page and its files |
| /api/live | server-sent events: the past hour first, then an update every TICK_S |
| /api/user?id= | a user's last clicks and published list |
| /api/why?id=&item= | how far the score of an item of that list falls without each of the user's last clicks |
| /api/users?like= | users with recent clicks |
| /api/dead-letters | the last dead letters with their reasons, newest first |
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from streamrec.errors import BadRecord, StreamrecError
from streamrec.kafka import decode
from streamrec.redis.client import RedisClient
from streamrec.schemas import PublishedList, UserSequence, parse_published
from streamrec.serving.predictor import Predictor
from streamrec.serving.sequences import parse_sequence
from streamrec.setting_groups import KafkaSettings
from streamrec.web.access import STATIC_FOLDER
from streamrec.web.explain import MAX_CLICKS, Explainer
from streamrec.web.history import History, Received
from streamrec.web.titles import ItemNames

MAX_VIEWERS = 32
SEND_TIMEOUT_S = 10.0  # a connection that accepts nothing for this time is closed
SHOWN_USERS = 12
PageMaker = Callable[[KafkaSettings, RedisClient, Predictor, History, Explainer, ItemNames], "LivePage"]
Handler = Callable[[web.Request], Awaitable[object]]


class LivePage:
    """The handlers of the page.

    Args:
        names: titles and categories of items.
    """

    demo = False

    def __init__(
        self,
        kafka: KafkaSettings,
        redis: RedisClient,
        predictor: Predictor,
        history: History,
        explainer: Explainer,
        names: ItemNames,
    ) -> None:
        self._kafka = kafka
        self._keys = redis.keys
        self._redis = redis
        self._predictor = predictor
        self._history = history
        self._explainer = explainer
        self._names = names
        self._read_lock = asyncio.Lock()  # one read at a time: clicks need the connections to Redis
        self._viewers = 0
        self._closing = False
        self._encoder = msgspec.json.Encoder()

    def register(self, app: web.Application) -> None:
        """Add the routes to an application."""
        files = {file.name: file for file in STATIC_FOLDER.iterdir() if file.suffix in (".js", ".css", ".svg")}

        async def file(request: web.Request) -> web.StreamResponse:
            path = files.get(request.match_info["name"])
            if path is None:
                raise web.HTTPNotFound
            return web.FileResponse(path)

        async def page(_: web.Request) -> web.StreamResponse:
            return web.FileResponse(STATIC_FOLDER / "index.html")

        app.router.add_get("/", page)
        app.router.add_get("/page/{name}", file)
        app.router.add_get("/api/live", self._live)
        self.add_api(app, "/api/user", self._user)
        self.add_api(app, "/api/why", self._why)
        self.add_api(app, "/api/users", self._users)
        self.add_api(app, "/api/dead-letters", self._dead_letters)
        app.on_shutdown.append(self._shut_down)

    def add_api(self, app: web.Application, path: str, handler: Handler) -> None:
        """Answer a GET with the handler's result as JSON."""

        async def respond(request: web.Request) -> web.Response:
            try:
                return self.as_json(await handler(request))
            except StreamrecError as error:
                raise web.HTTPServiceUnavailable(text=f"{error}\n") from None

        app.router.add_get(path, respond)

    def as_json(self, value: object) -> web.Response:
        """Return a response that must not be cached."""
        return web.Response(
            body=self._encoder.encode(value), content_type="application/json", headers={"Cache-Control": "no-store"}
        )

    async def _live(self, request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        if self._viewers >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_VIEWERS} pages are open already; close one\n")
        response = web.StreamResponse(headers=headers)
        self._viewers += 1
        try:
            await response.prepare(request)
            await self._send(response, "about", self._about())
            received = Received()
            while not self._closing:
                await self._send(response, "live", self._history.update(received))
                await self._history.wait_tick()
        except (ConnectionError, TimeoutError):  # the page was closed, or accepts nothing
            pass
        finally:
            self._viewers -= 1
        return response

    async def _send(self, response: web.StreamResponse, event: str, value: object) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await response.write(b"event: %s\ndata: %s\n\n" % (event.encode(), self._encoder.encode(value)))

    def _about(self) -> dict[str, object]:
        return {
            "topic": self._kafka.topic,
            "group": self._kafka.group,
            "demo": self.demo,
            "titles": len(self._names),
        }

    async def _user(self, request: web.Request) -> object:
        user = identifier(request.query.get("id", ""))
        sequence, published = await self._read(user)
        return {
            "user_id": user,
            "now_ms": int(time.time() * 1000),
            "clicks": [self.named(item) for item in reversed(sequence.items[-MAX_CLICKS:])] if sequence else [],
            "n": sequence.n if sequence else 0,
            "last_event_ts_ms": sequence.last_event_ts_ms if sequence else None,
            "list": None
            if published is None
            else {
                "items": [
                    self.named(item) | {"score": score}
                    for item, score in zip(published.items, published.scores, strict=False)
                ],
                "model": published.model,
                "n": published.n,
                "published_ts_ms": published.published_ts_ms,
            },
        }

    async def _why(self, request: web.Request) -> object:
        sequence, published = await self._read(identifier(request.query.get("id", "")))
        item = request.query.get("item") or (published.items[0] if published and published.items else "")
        if sequence is None or published is None or item not in published.items:
            raise web.HTTPNotFound(text="no list with this item is published for this user\n")
        why = await self._explainer.explain(sequence, item)
        clicks = [self.named(click.item_id) | {"fall": click.fall} for click in why.clicks]
        return self.named(why.item_id) | {"score": why.score, "model": why.model, "n": why.n, "clicks": clicks}

    async def _users(self, request: web.Request) -> object:
        like = request.query.get("like", "").lower()
        found = (user for user in self._predictor.recent_users() if like in user.lower())
        return [user for user, _ in zip(found, range(SHOWN_USERS), strict=False)]

    async def _dead_letters(self, _: web.Request) -> object:
        return self._history.dead_letters()

    async def _read(self, user: str) -> tuple[UserSequence | None, PublishedList | None]:
        keys = [self._keys.sequence(user), self._keys.recommendation(user)]
        async with self._read_lock:
            stored, published = await self._redis.get_many(keys)
        return (
            None if stored is None else parse_sequence(user, stored),
            None if published is None else parse_published(user, published),
        )

    def named(self, item_id: str) -> dict[str, Any]:
        """Return an item id with its title, None if the title is not known, and with its categories if it has any."""
        categories = self._names.categories(item_id)
        named = {"id": item_id, "title": self._names.title(item_id)}
        return named | ({"categories": categories} if categories else {})

    async def _shut_down(self, _: web.Application) -> None:
        self._closing = True
        self._history.notify()


def identifier(text: str) -> str:
    """Return the text if it is a valid user or item id.

    Raises:
        HTTPBadRequest: it is not.
    """
    try:
        return decode.identifier("id", text)
    except BadRecord:
        raise web.HTTPBadRequest(text=f"an id is 1 to {decode.MAX_ID_BYTES} bytes of UTF-8, without NUL\n") from None
