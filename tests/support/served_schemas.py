"""Schemas served over HTTP as a schema registry serves them: no registry can be installed from the package index here.

Source: https://docs.confluent.io/platform/current/schema-registry/develop/api.html
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from fastavro import parse_schema, schemaless_writer

from streamrec.local.process import free_port


@dataclass
class ServedSchemas:
    """A registry: schemas by id, or by subject and version; it may be away, or want a password."""

    port: int = field(default_factory=free_port)
    by_id: dict[int, dict[str, Any]] = field(default_factory=dict)
    by_version: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    login: tuple[str, str] | None = None
    status: int = 200
    asked: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, number: int, schema: dict[str, Any], **more: Any) -> None:
        self.by_id[number] = {"schema": json.dumps(schema)} | more

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """Serve while the block runs."""
        app = web.Application()
        app.router.add_get("/", self._root)
        app.router.add_get("/schemas/ids/{id}", self._of_id)
        app.router.add_get("/subjects/{subject}/versions/{version}", self._of_version)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        try:
            yield
        finally:
            await runner.cleanup()

    async def _root(self, request: web.Request) -> web.Response:
        return self._answer(request, {"is": "up"})

    async def _of_id(self, request: web.Request) -> web.Response:
        return self._answer(request, self.by_id.get(int(request.match_info["id"])))

    async def _of_version(self, request: web.Request) -> web.Response:
        place = request.match_info["subject"], int(request.match_info["version"])
        return self._answer(request, self.by_version.get(place))

    def _answer(self, request: web.Request, found: dict[str, Any] | None) -> web.Response:
        self.asked.append(request.path)
        login = base64.b64encode(":".join(self.login or ()).encode()).decode()
        if self.login and request.headers.get("Authorization") != f"Basic {login}":
            return web.json_response({"error_code": 401}, status=401)
        if self.status != 200:
            return web.Response(text="<html>no</html>", status=self.status)
        return web.json_response(found or {"error_code": 40403}, status=200 if found else 404)


def wire(number: int, schema: Any, value: Any, *referenced: Any) -> bytes:
    """Return a value in Confluent's wire format."""
    named: dict[str, Any] = {}
    for other in referenced:
        parse_schema(other, named_schemas=named)
    data = io.BytesIO()
    schemaless_writer(data, parse_schema(schema, named_schemas=named), value)
    return b"\0" + number.to_bytes(4, "big") + data.getvalue()
