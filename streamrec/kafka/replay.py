"""Produce the events of a file to Kafka, keyed by user, so that the clicks of a user stay in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import islice
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from sasrec import Columns, DataFileError, Event, read_events
from streamrec.errors import StreamrecError
from streamrec.kafka.producer import Producer
from streamrec.kafka.topics import ensure_topics
from streamrec.setting_groups import EventSettings, KafkaSettings

MAX_IN_FLIGHT = 5_000  # records; sending waits while more are unacknowledged


class ClickProducer:
    """Produces click events under the configured field names."""

    def __init__(self, producer: Producer, topic: str, events: EventSettings) -> None:
        self._producer = producer
        self._topic = topic
        self._events = events
        self._encoder = msgspec.json.Encoder()
        self._in_flight: list[asyncio.Future[object]] = []

    async def send(self, event: Event) -> None:
        """Queue one event; first wait for acknowledgements if too many are outstanding."""
        value: dict[str, object] = {self._events.user_id: event.user_id, self._events.item_id: event.item_id}
        if event.timestamp_ms is not None:
            value[self._events.timestamp] = event.timestamp_ms
        if event.event_type is not None:
            value[self._events.type] = event.event_type
        sent = await self._producer.send(self._topic, event.user_id.encode(), self._encoder.encode(value))
        self._in_flight.append(sent)
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            await self.settle()

    async def settle(self) -> None:
        """Wait until all queued events are acknowledged."""
        sent, self._in_flight = self._in_flight, []
        await self._producer.settle(sent)


@contextlib.asynccontextmanager
async def click_producer(kafka: KafkaSettings, events: EventSettings) -> AsyncIterator[ClickProducer]:
    """Yield a started ClickProducer; at the end wait for acknowledgements and close it."""
    producer = Producer(kafka)
    await producer.start()
    try:
        clicks = ClickProducer(producer, kafka.topic, events)
        yield clicks
        await clicks.settle()
    finally:
        await producer.stop()


class Pacer:
    """Spaces events evenly in time.

    Args:
        rate_per_s: events per second; 0 is as fast as possible.
    """

    def __init__(self, rate_per_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._rate_per_s = rate_per_s
        self._now_s = now_s
        self._start_s = now_s()
        self._count = 0

    async def wait(self) -> None:
        """Wait until the next event is due."""
        if self._rate_per_s:
            ahead_s = self._start_s + self._count / self._rate_per_s - self._now_s()
            if ahead_s > 0:
                await asyncio.sleep(ahead_s)
        self._count += 1


async def replay(
    kafka: KafkaSettings,
    fields: EventSettings,
    path: Path,
    rate_per_s: float,
    columns: Columns,
    limit: int | None,
) -> int:
    """Produce the events of a file; return their number.

    Raises:
        KafkaUnavailable: no broker answers.
        StreamrecError: the file cannot be read; the events before the bad row were sent.
    """
    if not path.exists():
        raise StreamrecError(f"there is no file {path}")
    console = Console(stderr=True)
    for topic in await ensure_topics(kafka, (kafka.topic,)):
        console.print(f"topic {topic} created with {kafka.partitions} partitions", highlight=False)
    sent = 0
    pacer = Pacer(rate_per_s)
    with _progress_bar(console) as bar:
        task = bar.add_task("replay", total=path.stat().st_size if path.is_file() else None, events="")
        bounds = fields.bounds(time.time() * 1000)  # the daemon would make a dead letter of other events
        events: Iterable[Event] = read_events(path, columns, lambda at: bar.update(task, completed=at), bounds=bounds)
        try:
            async with click_producer(kafka, fields) as clicks:
                for event in islice(events, limit):
                    await pacer.wait()
                    await clicks.send(event)
                    sent += 1
                    if sent % 100 == 0:
                        bar.update(task, events=f"{sent:,} events")
        except DataFileError as error:
            raise StreamrecError(f"{error} ({sent:,} events before it were sent)") from error
        bar.update(task, events=f"{sent:,} events")
    return sent


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("replay"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[events]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
