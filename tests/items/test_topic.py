"""The items topic, on a real broker: read whole, followed, bad records, and a topic that was created again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import pytest

from streamrec.errors import KafkaUnavailable
from streamrec.items.refusals import Refusals
from streamrec.items.table import ItemTable
from streamrec.items.topic import ItemTopic
from streamrec.kafka.topics import COMPACTED, ensure_topics
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter
from streamrec.settings import Settings

from support.kafka_client import admin, raw_producer
from support.servers import apache_kafka_home
from support.waiting import eventually

MakeSettings = Callable[..., Settings]


class Bench:
    """A source under test, and its topic."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        kafka = settings.kafka.model_copy(update={"topic": f"{settings.kafka.topic}-items"})
        self.kafka = kafka
        self.letters: list[DeadLetter] = []
        self.kafka_takes_letters = True
        self.refusals = Refusals(ItemTable())
        self.source = ItemTopic(kafka, self.refusals, Metrics(), self._send)

    async def _send(self, letters: Collection[DeadLetter]) -> None:
        if not self.kafka_takes_letters:
            raise KafkaUnavailable("away")
        self.letters += letters

    async def create(self) -> None:
        await ensure_topics(self.kafka, (self.kafka.topic,), COMPACTED)

    async def send(self, *records: tuple[bytes, bytes | None], partition: int | None = None) -> None:
        async with raw_producer(self.settings) as producer:
            for key, value in records:
                await producer.send_and_wait(self.kafka.topic, value, key=key, partition=partition)

    @property
    def table(self) -> dict[str, Any]:
        table = self.refusals.table
        assert table is not None
        values = {item: table.value(item) for item in list(table._rows)}
        return {item: json.loads(value or b"") for item, value in values.items()}

    async def follow_until(self, check: Callable[[], bool], timeout_s: float = 40.0) -> None:
        async def step() -> bool:
            await self.source.follow()
            return check()

        await eventually(step, timeout_s)


@pytest.fixture
async def bench(make_settings: MakeSettings) -> AsyncIterator[Bench]:
    found = Bench(make_settings(kafka_partitions=3))
    await found.create()
    yield found
    await found.source.aclose()


def item(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


async def test_the_topic_is_read_whole_and_followed(bench: Bench) -> None:
    await bench.send(*((f"i{n}".encode(), item(title=f"T{n}")) for n in range(50)), (b"i7", None), (b"i8", item(n=8)))
    await bench.source.read()
    assert len(bench.table) == 49 and "i7" not in bench.table and bench.table["i8"] == {"n": 8}
    assert bench.refusals.refuses("i7") and not bench.refusals.refuses("i8")
    bench.refusals.take_gone()
    await bench.send((b"i8", item(available=False)), (b"i9", None), (b"new", item(title="new")))
    await bench.follow_until(lambda: "new" in bench.table and bench.refusals.refuses("i9"))
    await bench.follow_until(lambda: bench.refusals.refuses("i8"))
    assert bench.refusals.take_gone() == {"i8", "i9"}


async def test_a_bad_record_is_a_dead_letter_and_the_former_row_stays(bench: Bench) -> None:
    await bench.send((b"a", item(title="A")), (b"a", b"{"), (b"\xff", item()), (b"", item()), partition=1)
    await bench.source.read()
    assert bench.table == {"a": {"title": "A"}}
    await bench.send((b"a", item(available="yes")), (b"b", item()), partition=1)
    bench.kafka_takes_letters = False
    await bench.follow_until(lambda: "b" in bench.table)
    assert bench.table["a"] == {"title": "A"} and not bench.letters
    bench.kafka_takes_letters = True
    await bench.follow_until(lambda: len(bench.letters) == 4)
    assert [(letter.partition, letter.offset, letter.key) for letter in bench.letters] == [
        (1, 1, b"a"),
        (1, 2, b"\xff"),
        (1, 3, b""),
        (1, 4, b"a"),
    ]
    assert "not an item" in bench.letters[0].reason and "UTF-8" in bench.letters[1].reason


@pytest.mark.parametrize("records", [1, 30])
async def test_a_topic_that_was_created_again_is_read_whole(
    bench: Bench, records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    apache_kafka_home()
    monkeypatch.setattr("streamrec.kafka.table.CHECK_EVERY_S", 0.2)
    await bench.send(*((f"i{n}".encode(), item(n=n)) for n in range(10)), partition=0)
    await bench.source.read()
    bench.refusals.take_gone()
    async with admin(bench.settings) as client:
        await client.delete_topics([bench.kafka.topic])

    async def created() -> bool:
        with contextlib.suppress(Exception):
            await bench.create()  # or our consumer has, by its request for metadata
            await bench.send((b"i3", item(n="new")), partition=0)
            return True
        return False

    await eventually(created)
    await bench.send(*((f"j{n}".encode(), item()) for n in range(records - 1)), partition=0)
    wanted = {"i3": {"n": "new"}} | {f"j{n}": {} for n in range(records - 1)}
    await bench.follow_until(lambda: bench.table == wanted, 60)
    assert bench.refusals.take_gone() == {f"i{n}" for n in range(10) if n != 3}


async def test_new_partitions_are_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    apache_kafka_home()
    monkeypatch.setattr("streamrec.kafka.table.CHECK_EVERY_S", 0.2)
    await bench.send((b"a", item()), partition=0)
    await bench.source.read()
    async with admin(bench.settings) as client:
        from aiokafka.admin import NewPartitions

        await client.create_partitions({bench.kafka.topic: NewPartitions(5)})
    await eventually(lambda: _sent(bench))
    await bench.follow_until(lambda: "b" in bench.table)


async def _sent(bench: Bench) -> bool:
    with contextlib.suppress(Exception):
        await asyncio.wait_for(bench.send((b"b", item()), partition=4), 5)
        return True
    return False
