"""Events in Avro: schemas come from a registry, records wait for them, and no bytes stop the daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from hypothesis import given
from hypothesis import strategies as st

from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.errors import BadRecord, SettingsError
from streamrec.kafka.decode import EventDecoder
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import stored
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.decoding import NOW_MS, RECORD_MS
from support.kafka_client import member, produce_to, read_topic, wait_caught_up
from support.served_schemas import ServedSchemas, wire
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
ONE = {"kafka_partitions": 1}
PLAIN = {
    "type": "record",
    "name": "Click",
    "fields": [
        {"name": "user_id", "type": ["null", "string"]},
        {"name": "item_id", "type": ["long", "string"]},
        {"name": "timestamp", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "event_type", "type": {"type": "enum", "name": "Kind", "symbols": ["view", "scroll"]}},
        {"name": "more", "type": {"type": "map", "values": "bytes"}, "default": {}},
    ],
}


def event(user: str | None = "ann", item: int | str = "i1", kind: str = "view", at_ms: int = NOW_MS) -> dict[str, Any]:
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    return {"user_id": user, "item_id": item, "timestamp": at, "event_type": kind, "more": {"a": b"\xff"}}


@pytest.fixture
async def served() -> AsyncIterator[ServedSchemas]:
    schemas = ServedSchemas()
    async with schemas.up():
        yield schemas


def decoder_of(served: ServedSchemas, **settings: Any) -> EventDecoder:
    given = Settings.of(events_schema_registry_url=served.url, **settings)
    return EventDecoder(given.events, lambda: float(NOW_MS))


def record(value: bytes | None) -> ConsumerRecord:
    return ConsumerRecord("clicks", 0, 7, RECORD_MS, 0, None, value, None, -1, -1, ())


async def clicks(decoder: EventDecoder, value: bytes | None) -> list[tuple[str, str, int]]:
    assert await decoder.prepare([record(value)])
    return [(c.user_id, c.item_id, c.timestamp_ms) for c in decoder.decode(value, 0, 7, RECORD_MS)]


async def test_the_fields_of_an_avro_record_are_read_as_those_of_json(served: ServedSchemas) -> None:
    served.add(300, PLAIN)
    decoder = decoder_of(served, events_roles={"view": "click"})
    assert await clicks(decoder, wire(300, PLAIN, event())) == [("ann", "i1", NOW_MS)]
    assert await clicks(decoder, wire(300, PLAIN, event(item=5))) == [("ann", "5", NOW_MS)]
    assert await clicks(decoder, wire(300, PLAIN, event(user=None, kind="scroll"))) == []
    with pytest.raises(BadRecord, match="user_id"):
        await clicks(decoder, wire(300, PLAIN, event(user=None)))
    assert served.asked == ["/schemas/ids/300"], "once"


async def test_paths_lists_and_schemas_in_other_schemas(served: ServedSchemas) -> None:
    product = {"type": "record", "name": "shop.Product", "fields": [{"name": "id", "type": "string"}]}
    order = {
        "type": "record",
        "name": "Order",
        "fields": [
            {"name": "who", "type": {"type": "record", "name": "Who", "fields": [{"name": "id", "type": "string"}]}},
            {"name": "products", "type": {"type": "array", "items": "shop.Product"}},
        ],
    }
    references = [{"name": "shop.Product", "subject": "shop/product", "version": 2}]
    served.add(1, order, references=references)
    served.by_version["shop/product", 2] = {"schema": json.dumps(product)}
    decoder = decoder_of(served, events_user_id="who.id", events_item_id="products[].id")
    value = wire(1, order, {"who": {"id": "ann"}, "products": [{"id": "a"}, {"id": "b"}]}, product)
    assert [item for _, item, _ in await clicks(decoder, value)] == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"user_id": "ann", "item_id": "i"}', "it begins with 7b22757365"),
        (b"\0\0\0\0", "not an Avro value"),
        (b"\0\0\0\x01\x2c", "does not fit schema 300"),
        (b"\0\0\0\0\x02...", "schema 2 is of type PROTOBUF"),
        (b"\0\0\0\0\x03...", "schema 3 cannot be used"),
        (b"\0\0\0\0\x04...", "schema 4 cannot be used"),
        (b"", "no value"),
    ],
)
async def test_what_is_no_event_is_a_bad_record_with_the_reason(
    value: bytes, reason: str, served: ServedSchemas
) -> None:
    served.add(300, PLAIN)
    served.add(2, PLAIN, schemaType="PROTOBUF")
    served.add(3, {"type": "nonsense"})
    served.by_id[4] = {"schema": "no JSON"}
    decoder = decoder_of(served)
    assert await decoder.prepare([record(value)])
    with pytest.raises(BadRecord, match=reason):
        decoder.decode(value, 0, 7, RECORD_MS)


async def test_a_refused_login_ends_with_the_settings_name_and_a_password_is_sent(served: ServedSchemas) -> None:
    served.login = ("ann", "s3cret")
    served.add(300, PLAIN)
    value = wire(300, PLAIN, event())
    with pytest.raises(SettingsError, match="STREAMREC_EVENTS_SCHEMA_REGISTRY_USERNAME") as refused:
        await decoder_of(
            served, events_schema_registry_username="ann", events_schema_registry_password="wr0ng"
        ).prepare([record(value)])
    assert "wr0ng" not in str(refused.value)
    decoder = decoder_of(served, events_schema_registry_username="ann", events_schema_registry_password="s3cret")
    assert await clicks(decoder, value) == [("ann", "i1", NOW_MS)]


async def test_the_next_registry_is_asked_if_the_first_does_not_answer(served: ServedSchemas) -> None:
    served.add(300, PLAIN)
    given = Settings.of(events_schema_registry_url=f"http://127.0.0.1:1,{served.url}")
    decoder = EventDecoder(given.events, lambda: float(NOW_MS))
    assert await clicks(decoder, wire(300, PLAIN, event())) == [("ann", "i1", NOW_MS)]


@given(data=st.binary(max_size=40))
def test_any_bytes_are_clicks_or_a_bad_record(data: bytes) -> None:
    served = ServedSchemas()
    served.add(300, PLAIN)
    decoder = decoder_of(served)
    assert decoder._avro is not None

    async def schema(number: int) -> tuple[str, list[str]]:
        return served.by_id[number]["schema"], []

    decoder._avro._registry.schema = schema  # type: ignore[method-assign]
    value = b"\0\0\0\x01\x2c" + data
    assert asyncio.run(decoder.prepare([record(value)]))
    try:
        decoder.decode(value, 0, 7, RECORD_MS)
    except BadRecord as error:
        assert str(error)


async def test_records_wait_for_a_registry_that_is_away_and_for_a_schema_that_it_lacks(
    start_daemon: StartDaemon, make_settings: MakeSettings, redis: RedisClient, tmp_path: Any
) -> None:
    served = ServedSchemas()
    where = ONE | {"events_schema_registry_url": served.url}
    settings = make_settings(**where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    values = [wire(1, PLAIN, event(item="a")), wire(2, PLAIN, event(item="b")), b"bad", wire(1, PLAIN, event(item="c"))]
    for value in values:
        await produce_to(settings, 0, value)
    await eventually(lambda: daemon.has_logged("records wait for schema 1, from partition 0, offset 0 on"))
    assert "cannot be reached" in daemon.output
    assert (await daemon.get("/readyz"))[0] == 503 and (await daemon.get("/livez"))[0] == 200
    async with served.up():
        served.add(1, PLAIN)
        await eventually(lambda: daemon.has_logged("does not have schema 2"))
        assert await daemon.metric(EVENTS) <= 1
        async with member(settings):  # the records that wait are read again after a rebalance
            pass
        served.add(2, PLAIN)
        await daemon.wait_handled(3)
        await wait_caught_up(settings)
        (ann,) = [sequence async for _, sequence in stored(redis, ["ann"]) if sequence]
        assert (ann.n, ann.items) == (3, ["a", "b", "c"])
        assert len(await read_topic(settings, settings.kafka.dead_letters)) == 1
        await daemon.wait_ready()
        archiver = Archiver(settings.kafka, settings.events, EventArchive(tmp_path), 1.0)
        await archiver.run(asyncio.Event(), burst=True)
        assert archiver.archived == 3
