"""Fetch Avro schemas from a schema registry (Confluent's REST interface, which Karapace, Redpanda and others have too).

A schema never changes under its id, so each is fetched once. While one cannot be had, the records that need it wait.

Source: https://docs.confluent.io/platform/current/schema-registry/develop/api.html
"""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp

from streamrec.errors import SchemaMissing, SettingsError
from streamrec.setting_groups import SchemaRegistrySettings, TlsSettings
from streamrec.tls import SCHEMA_REGISTRY, tls_context, tls_problem

REQUEST_TIMEOUT_S = 5.0
DEEPEST_REFERENCE = 20


class SchemaRegistry:
    """Reads schemas by id."""

    def __init__(self, settings: SchemaRegistrySettings) -> None:
        self._settings = settings
        self._urls = [url.rstrip("/") for url in settings.url.split(",")]
        self._files = TlsSettings(ca_file=settings.tls_ca_file)
        self._context: ssl.SSLContext | None = None

    async def check(self) -> None:
        """Ask for nothing. Raises SchemaMissing if no registry answers, SettingsError if it refuses the login."""
        await self._get("/", "its first page")

    async def schema(self, number: int) -> tuple[str, list[str]]:
        """Return the text of an Avro schema, and the texts of those that it refers to, each before its users.

        Raises:
            SchemaMissing: the registry does not answer, or does not have it; waiting may help.
            SettingsError: the registry refuses the login.
            ValueError: the schema is none of Avro.
        """
        answer = await self._get(f"/schemas/ids/{number}", f"schema {number}")
        if (kind := answer.get("schemaType", "AVRO")) != "AVRO":
            raise ValueError(f"schema {number} is of type {kind}, not of Avro")
        referenced: dict[tuple[str, int], str] = {}
        await self._add_references(answer, referenced, 0)
        return _text_of(answer, f"schema {number}"), list(referenced.values())

    async def _add_references(self, answer: Mapping[str, Any], found: dict[tuple[str, int], str], depth: int) -> None:
        if depth > DEEPEST_REFERENCE:
            raise ValueError(f"schemas refer to each other more than {DEEPEST_REFERENCE} deep")
        for reference in answer.get("references") or ():
            place = str(reference["subject"]), int(reference["version"])
            if place not in found:
                name = f"version {place[1]} of subject {place[0]}"
                other = await self._get(f"/subjects/{quote(place[0], safe='')}/versions/{place[1]}", name)
                await self._add_references(other, found, depth + 1)
                found[place] = _text_of(other, name)

    async def _get(self, path: str, name: str) -> dict[str, Any]:
        problems = []
        for url in self._urls:
            try:
                return await self._get_from(url, path, name)
            except SchemaMissing as error:
                problems.append(str(error))
        raise SchemaMissing("; ".join(problems))

    async def _get_from(self, url: str, path: str, name: str) -> dict[str, Any]:
        settings = self._settings
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if settings.username is not None:
            login = f"{settings.username}:{settings.password.get_secret_value() if settings.password else ''}"
            headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        if self._context is None and url.startswith("https:"):
            self._context = tls_context(self._files, SCHEMA_REGISTRY)
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(REQUEST_TIMEOUT_S), headers=headers) as http,
                # a redirection would take the password elsewhere
                http.get(url + path, ssl=self._context or True, allow_redirects=False) as answer,
            ):
                status, text = answer.status, await answer.text(errors="replace")
        except TimeoutError:
            raise SchemaMissing(f"{url} does not answer within {REQUEST_TIMEOUT_S:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            why = error.__cause__ or error  # aiohttp's own errors are TLS errors without their reason
            problem = tls_problem(why, SCHEMA_REGISTRY, self._files) or f"it cannot be reached ({why})"
            raise SchemaMissing(f"{url}: {problem}") from None
        return _answer(url, name, status, text)


def _answer(url: str, name: str, status: int, text: str) -> dict[str, Any]:
    if status in (401, 403):
        raise SettingsError(
            f"the schema registry {url} refuses the login ({status}): "
            "set STREAMREC_EVENTS_SCHEMA_REGISTRY_USERNAME and ..._PASSWORD"
        )
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if status != 200 or not isinstance(found, dict):
        what = f"does not have {name}" if status == 404 else f"answers {status} for {name}"
        raise SchemaMissing(f"{url} {what}; is STREAMREC_EVENTS_SCHEMA_REGISTRY_URL right?")
    return found


def _text_of(answer: Mapping[str, Any], name: str) -> str:
    text = answer.get("schema")
    if not isinstance(text, str):
        raise SchemaMissing(f"the schema registry's answer for {name} has no schema")
    return text
