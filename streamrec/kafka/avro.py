"""Turn Avro values in Confluent's wire format into JSON, which is then read at the configured paths as any event is.

    byte 0        0
    bytes 1 to 4  the id of the writer's schema, most significant first
    then          the datum in Avro's binary encoding

Times of logical types become RFC 3339 text, bytes become base64.

Source: https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import struct
from collections.abc import Iterable
from typing import Any

import msgspec
from aiokafka import ConsumerRecord

from streamrec.errors import BadRecord, SchemaMissing, SettingsError
from streamrec.kafka.schema_registry import SchemaRegistry
from streamrec.logs import LogOnce

log = logging.getLogger(__name__)

WIRE = struct.Struct(">bI")
MAX_SCHEMAS = 1_000  # in memory


class AvroValues:
    """Decodes values with the schemas of a registry.

    Raises:
        SettingsError: fastavro is not installed.
    """

    def __init__(self, registry: SchemaRegistry) -> None:
        if importlib.util.find_spec("fastavro") is None:
            raise SettingsError("events_schema_registry_url needs the package fastavro: pip install 'streamrec[avro]'")
        self._registry = registry
        self._schemas: dict[int, Any] = {}  # parsed, or the reason why it cannot be used
        self._log = LogOnce(log)
        self._waits = False

    async def learn(self, records: Iterable[ConsumerRecord]) -> bool:
        """Fetch the schemas that records need; return whether all are there. A missing one is logged once.

        Raises:
            SettingsError: the registry refuses the login.
        """
        for record in records:
            number = _schema_id(record.value)
            if number is None or number in self._schemas:
                continue
            try:
                await self._fetch(number)
            except SchemaMissing as error:
                place = f"partition {record.partition}, offset {record.offset}"
                self._waits = True
                self._log("records wait for schema %d, from %s on: %s", number, place, error)
                return False
        if self._waits:
            log.info("the schemas are there")
            self._log.reset()
        self._waits = False
        return True

    async def _fetch(self, number: int) -> None:
        from fastavro.schema import SchemaParseException, parse_schema

        try:
            text, referenced = await self._registry.schema(number)
            named: dict[str, Any] = {}
            for other in referenced:
                parse_schema(json.loads(other), named_schemas=named)
            schema: Any = parse_schema(json.loads(text), named_schemas=named)
        except (ValueError, KeyError, TypeError, SchemaParseException) as error:
            schema = BadRecord(f"schema {number} cannot be used: {error}")
        while len(self._schemas) >= MAX_SCHEMAS:
            del self._schemas[next(iter(self._schemas))]
        self._schemas[number] = schema

    def to_json(self, value: bytes) -> bytes:
        """Return a value as JSON.

        Raises:
            BadRecord: it is not in the wire format, or does not fit its schema.
        """
        from fastavro import schemaless_reader

        number = _schema_id(value)
        if number is None:
            raise BadRecord(f"not an Avro value in the wire format: it begins with {value[:5].hex()}")
        schema = self._schemas.get(number)
        if schema is None or isinstance(schema, BadRecord):
            raise schema or BadRecord(f"schema {number} is not known")
        try:
            return msgspec.json.encode(schemaless_reader(io.BytesIO(value[WIRE.size :]), schema))
        except Exception as error:  # any bytes
            raise BadRecord(f"the value does not fit schema {number}: {error!r}") from None


def _schema_id(value: bytes | None) -> int | None:
    """Return the id of the schema that a value needs; None if it is not in the wire format."""
    if not value or len(value) < WIRE.size or value[0]:
        return None
    return int(WIRE.unpack_from(value)[1])
