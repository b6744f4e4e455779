"""`streamrec replay` produces the events of a file, keyed by user, in order, at a rate."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamrec.kafka.replay
from sasrec import Columns, Event
from streamrec.errors import KafkaUnavailable, StreamrecError
from streamrec.kafka.connection import kafka_error
from streamrec.kafka.decode import EventDecoder
from streamrec.kafka.producer import Producer
from streamrec.kafka.replay import ClickProducer, Pacer, click_producer, replay
from streamrec.kafka.topics import topic_partitions
from streamrec.settings import Settings

from support.kafka_client import read_topic

MakeSettings = Callable[..., Settings]
BASE_S = 1_700_000_000
EVENTS = [Event(str(user), str(100 + step), (BASE_S + step) * 1000) for step in range(6) for user in (1, 2, 3)]


def rows(line: str, header: str = "", unit_ms: bool = True) -> str:
    lines = [line.format(u=e.user_id, i=e.item_id, t=(e.timestamp_ms or 0) // (1 if unit_ms else 1000)) for e in EVENTS]
    return header + "\n".join(lines) + "\n"


FORMATS = {
    "clicks.csv": rows("{u},{i},{t}", "user_id,item_id,timestamp\n"),
    "semicolons.csv": rows("{t};x;{i};{u}", "timestamp;shop;item_id;user_id\n"),
    "clicks.tsv": rows("{u}\t{i}\t{t}", "user_id\titem_id\ttimestamp\n"),
    "clicks.jsonl": rows('{{"user_id": {u}, "item_id": "{i}", "timestamp": {t}, "more": [1]}}'),
    "ratings.dat": rows("{u}::{i}::5::{t}", unit_ms=False),
    "u.data": rows("{u}\t{i}\t3\t{t}", unit_ms=False),
    "ratings.csv": rows("{u},{i},4.5,{t}", "userId,movieId,rating,timestamp\n", unit_ms=False),
    "clicks.inter": rows("{u}\t{i}\t{t}", "user_id:token\titem_id:token\ttimestamp:float\n", unit_ms=False),
}


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return path


async def run(settings: Settings, path: Path, limit: int | None = None, columns: Columns | None = None) -> int:
    return await replay(settings.kafka, settings.events, path, 0, columns or Columns(), limit)


async def events_in(settings: Settings) -> list[Event]:
    """Return the events of the topic as the daemon decodes them, partition by partition."""
    decoder = EventDecoder(settings.events)
    found = []
    for record in await read_topic(settings, settings.kafka.topic):
        event = decoder.decode(record.value, record.partition, record.offset, record.timestamp)
        assert event is not None
        assert record.key == event.user_id.encode()
        found.append(Event(event.user_id, event.item_id, event.timestamp_ms))
    return found


def by_user(events: list[Event]) -> dict[str, list[Event]]:
    found = defaultdict(list)
    for event in events:
        found[event.user_id].append(event)
    return dict(found)


async def test_columns_of_other_names_are_named(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(kafka_partitions=1)
    path = write(tmp_path, "views.csv", f"visitor;sku;at\nann;x;{BASE_S}\nbob;y;{BASE_S + 1}\n")
    columns = Columns(user="visitor", item="sku", timestamp="at", timestamp_unit="s")
    assert await run(settings, path, columns=columns) == 2
    assert await events_in(settings) == [Event("ann", "x", BASE_S * 1000), Event("bob", "y", (BASE_S + 1) * 1000)]


@pytest.mark.parametrize("name", [*FORMATS, "clicks.csv.gz"])
async def test_events_of_every_format_arrive_keyed_by_user_and_in_order(
    make_settings: MakeSettings, tmp_path: Path, name: str
) -> None:
    settings = make_settings()
    assert await run(settings, write(tmp_path, name, FORMATS[name.removesuffix(".gz")])) == len(EVENTS)
    assert by_user(await events_in(settings)) == by_user(EVENTS)


async def test_a_missing_topic_is_created_and_reported(
    make_settings: MakeSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings(kafka_partitions=3)
    path = write(tmp_path, "clicks.csv", FORMATS["clicks.csv"])
    await run(settings, path)
    assert capsys.readouterr().err == f"topic {settings.kafka.topic} created with 3 partitions\n"
    assert await topic_partitions(settings.kafka, [settings.kafka.topic, "none"]) == {
        settings.kafka.topic: 3,
        "none": 0,
    }
    await run(settings, path)
    assert capsys.readouterr().err == ""
    assert len(await events_in(settings)) == 2 * len(EVENTS)


async def test_thousands_of_events_keep_each_users_order(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings, count = make_settings(), 12_000  # more than may be in flight
    lines = "".join(f"u{k % 97},{k},{BASE_S * 1000 + k}\n" for k in range(count))
    assert await run(settings, write(tmp_path, "many.csv", f"user_id,item_id,timestamp\n{lines}")) == count
    found = by_user(await events_in(settings))
    assert found == by_user([Event(f"u{k % 97}", str(k), BASE_S * 1000 + k) for k in range(count)])


async def test_events_without_a_timestamp_are_sent_without_one(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings()
    path = write(tmp_path, "clicks.csv", "user_id,item_id\nann,a\n")
    with pytest.raises(StreamrecError, match=r"column TIMESTAMP is missing; .*--in-file-order .* \(0 events before it"):
        await run(settings, path)
    await run(settings, path, columns=Columns(in_file_order=True))
    (record,) = await read_topic(settings, settings.kafka.topic)
    assert json.loads(record.value) == {"user_id": "ann", "item_id": "a"}


async def test_event_types_are_sent_under_the_configured_name(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(events_type="kind")
    path = write(tmp_path, "clicks.csv", "user_id,item_id,timestamp,event_type\nann,a,1700000000000,buy\n")
    await run(settings, path)
    (record,) = await read_topic(settings, settings.kafka.topic)
    assert json.loads(record.value)["kind"] == "buy"


async def test_field_names_are_the_configured_ones(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(events_user_id="visitor", events_item_id="sku", events_timestamp="at")
    await run(settings, write(tmp_path, "clicks.csv", "user_id,item_id,timestamp\nann,é,1700000000000\n"))
    (record,) = await read_topic(settings, settings.kafka.topic)
    assert json.loads(record.value) == {"visitor": "ann", "sku": "é", "at": BASE_S * 1000}


@pytest.mark.parametrize("limit", [1, 5, 1_000])
async def test_a_limit_sends_the_first_events(make_settings: MakeSettings, tmp_path: Path, limit: int) -> None:
    settings = make_settings()
    sent = await run(settings, write(tmp_path, "clicks.csv", FORMATS["clicks.csv"]), limit)
    assert sent == min(limit, len(EVENTS))
    assert by_user(await events_in(settings)) == by_user(EVENTS[:limit])


@pytest.mark.parametrize(
    ("name", "bad_row", "why"),
    [
        ("clicks.csv", "7,8\n", r"clicks.csv:4: 3 columns expected, got 2"),
        ("clicks.csv", ",8,9\n", r"clicks.csv:4: user_id is empty"),
        ("clicks.csv", "7,8,noon\n", r"clicks.csv:4: timestamp 'noon'"),
        ("clicks.jsonl", "{oops\n", r"clicks.jsonl:3: not JSON"),
        (
            "clicks.jsonl",
            '{"user_id": "\\ud800", "item_id": "i", "timestamp": 1}\n',
            r"clicks.jsonl:3: user_id .* holds half",
        ),
        (
            "clicks.jsonl",
            '{"user_id": "u", "item_id": "\\ud800", "timestamp": 1}\n',
            r"clicks.jsonl:3: item_id .* holds half",
        ),
    ],
    ids=["short row", "empty id", "no time", "no JSON", "half a character in the user", "half a character in the item"],
)
async def test_a_bad_row_is_named_and_events_before_it_were_sent(
    make_settings: MakeSettings, tmp_path: Path, name: str, bad_row: str, why: str
) -> None:
    settings = make_settings()
    lines = FORMATS[name].splitlines(keepends=True)
    before = 3 if name.endswith(".csv") else 2  # with the header or without
    path = write(tmp_path, name, "".join([*lines[:before], bad_row, *lines[before:]]))
    with pytest.raises(StreamrecError, match=rf"{why}.* \(2 events before it were sent\)"):
        await run(settings, path)
    assert by_user(await events_in(settings)) == by_user(EVENTS[:2])


@pytest.mark.parametrize(
    ("content", "why"), [("", "is empty"), ("what,is,this\n1,2,3\n", "no known format"), (None, "there is no file")]
)
async def test_a_file_without_events_is_refused(
    make_settings: MakeSettings, tmp_path: Path, content: str | None, why: str
) -> None:
    path = tmp_path / "clicks.csv" if content is None else write(tmp_path, "clicks.csv", content)
    with pytest.raises(StreamrecError, match=why):
        await run(make_settings(), path)


async def test_a_folder_is_refused(make_settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(StreamrecError, match=re.escape(str(tmp_path))):
        await run(make_settings(), tmp_path)


async def test_an_unreachable_broker_is_one_clear_error(
    make_settings: MakeSettings, tmp_path: Path, unused_tcp_port: int
) -> None:
    settings = make_settings(kafka_bootstrap_servers=f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(KafkaUnavailable, match=f"Kafka at 127.0.0.1:{unused_tcp_port} cannot be reached"):
        await run(settings, write(tmp_path, "clicks.csv", FORMATS["clicks.csv"]))


async def test_a_record_that_kafka_refuses_is_one_clear_error(make_settings: MakeSettings, tmp_path: Path) -> None:
    path = write(tmp_path, "clicks.jsonl", json.dumps({"user_id": "ann", "item_id": "x" * 2_000_000}))
    with pytest.raises(StreamrecError, match=r"Kafka at .* larger than"):
        await run(make_settings(), path, columns=Columns(in_file_order=True))


class ProducerThatLosesAcknowledgements(Producer):
    """Accepts records; all acknowledgements are lost."""

    async def send(self, topic: str, key: bytes, value: bytes) -> Any:
        lost = asyncio.get_running_loop().create_future()
        lost.set_exception(OSError("connection lost"))
        return lost


async def test_an_event_that_is_not_acknowledged_is_an_error(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamrec.kafka.replay, "Producer", ProducerThatLosesAcknowledgements)
    with pytest.raises(KafkaUnavailable, match="connection lost"):
        async with click_producer(make_settings().kafka, make_settings().events) as clicks:
            await clicks.send(EVENTS[0])


class ProducerThatNeverAcknowledges(Producer):
    """Accepts records; counts the unacknowledged ones."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.kafka)
        self.waiting = self.most_waiting = 0

    async def send(self, topic: str, key: bytes, value: bytes) -> Any:
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)

    async def settle(self, sent: Any) -> None:
        self.waiting = 0


async def test_unacknowledged_events_are_bounded(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamrec.kafka.replay, "MAX_IN_FLIGHT", 10)
    producer = ProducerThatNeverAcknowledges(make_settings())
    clicks = ClickProducer(producer, make_settings().kafka.topic, make_settings().events)
    for _ in range(25):
        await clicks.send(EVENTS[0])
    assert (producer.most_waiting, producer.waiting) == (10, 5)
    await clicks.settle()
    assert producer.waiting == 0
    await producer.stop()


class Clock:
    """A clock that advances only by ``sleep`` or by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 50.0
        monkeypatch.setattr("streamrec.kafka.replay.asyncio.sleep", self.sleep)

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize("rate_per_s", [0.5, 3.0, 300.0, 1e6])
async def test_events_are_sent_at_the_rate(monkeypatch: pytest.MonkeyPatch, rate_per_s: float) -> None:
    clock = Clock(monkeypatch)
    pacer, times = Pacer(rate_per_s, clock), []
    for _ in range(50):
        await pacer.wait()
        times.append(clock.now_s)
    assert times == pytest.approx([50.0 + k / rate_per_s for k in range(50)])


async def test_a_late_sender_catches_up_and_the_rate_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pacer, times = Pacer(10, clock), []
    for k in range(40):
        await pacer.wait()
        times.append(clock.now_s)
        clock.now_s += 2.0 if k == 5 else 0.0  # a slow acknowledgement
    assert times[6:26] == [times[6]] * 20
    assert times[-1] == pytest.approx(50.0 + 39 / 10)


async def test_rate_0_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pacer = Pacer(0, clock)
    for _ in range(1_000):
        await pacer.wait()
    assert clock.now_s == 50.0


def test_a_kafka_error_without_a_text_is_named_by_its_class(make_settings: MakeSettings) -> None:
    assert str(kafka_error(make_settings().kafka, OSError())).endswith(": OSError")


@pytest.mark.parametrize(
    ("time", "says"),
    [(BASE_S, "looks like seconds"), (BASE_S * 10**6, "looks like microseconds"), (0, "before 1973-03-03")],
)
async def test_a_time_that_the_daemon_would_refuse_is_not_sent(
    make_settings: MakeSettings, tmp_path: Path, time: int, says: str
) -> None:
    settings = make_settings(kafka_partitions=1)
    path = write(tmp_path, "clicks.csv", f"user_id,item_id,timestamp\nu,i,{BASE_S * 1000}\nu,j,{time}\n")
    with pytest.raises(StreamrecError, match=f"clicks.csv:3: timestamp {time}.*{says}.*1 events before it were sent"):
        await run(settings, path)
    if not time:
        assert await run(settings.but(events_min_timestamp_ms=0), path) == 2
