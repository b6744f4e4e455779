"""Start the parts of a daemon, and wait for what may come by itself.

    HTTP port         first, so that probes see a daemon that waits
    Redis             a server that is there, with data of our format
    Kafka             a broker that is there, and our topics
    model             a given directory is read before all else; a registry may get its first champion later
    items             the whole table of items, if there is one
    page, producer    and last the member of the consumer group

A wrong setting is an error at once. A missing server or champion is waited for (waiting.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from streamrec.errors import NoChampion, RedisRejected, StoreUnreachable
from streamrec.health import Health
from streamrec.items.refusals import Refusals
from streamrec.items.source import ItemSource, item_source, refusals_of
from streamrec.kafka.connection import connection_options, ignore_abandoned_requests
from streamrec.kafka.consumer import REBALANCE_MARGIN_S, ClickConsumer
from streamrec.kafka.producer import Producer
from streamrec.kafka.topics import COMPACTED, ensure_topics
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.watch import RedisWatch
from streamrec.registry import Registry
from streamrec.schemas import DeadLetter
from streamrec.serving.judge import OnlineJudge
from streamrec.serving.lists import SharedLists, most_unwanted
from streamrec.serving.model import ServedModel, first_champion
from streamrec.serving.online import OnlineCounts
from streamrec.serving.parts import ServingParts
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.serving.shadow import Shadow
from streamrec.serving.topic_marks import TopicMarks
from streamrec.serving.worker import Worker
from streamrec.settings import Settings
from streamrec.stop_signals import stop_signals
from streamrec.waiting import until_there
from streamrec.web.explain import Explainer
from streamrec.web.history import History
from streamrec.web.page import PageMaker
from streamrec.web.server import WebServer
from streamrec.web.titles import ItemNames, read_titles

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 4.0
REDIS, KAFKA, CHAMPION = "Redis", "Kafka", "the first champion of the registry"
ITEMS = "the table of items"
R = TypeVar("R")


@dataclass(frozen=True)
class Daemon:
    """The running parts of a daemon."""

    parts: ServingParts
    consumer: ClickConsumer
    worker: Worker
    history: History
    explainer: Explainer
    marks: TopicMarks
    items: ItemSource | None


class Startup:
    """Starts the parts of one daemon.

    Args:
        page: makes the page of the HTTP port.
        clients: closes what was started, in reverse order.
        stop: set by a signal.
        patient: wait for what is missing; otherwise it is an error.
    """

    def __init__(
        self,
        settings: Settings,
        page: PageMaker,
        clients: contextlib.AsyncExitStack,
        stop: asyncio.Event,
        patient: bool,
    ) -> None:
        self._settings = settings
        self._page = page
        self._clients = clients
        self._stop = stop
        self._patient = patient
        self._letters: Producer | None = None  # these two are there before the loops
        self._history: History | None = None
        self._metrics = Metrics()
        liveness_s, rebalance_s = settings.serving.liveness_timeout_s, settings.kafka.rebalance_timeout_s
        self._health = Health(liveness_s, rebalance_s + REBALANCE_MARGIN_S)

    async def run(self) -> Daemon:
        """Start all parts in order.

        Raises:
            Stopped: a signal came while the daemon waited.
            StreamrecError: the daemon cannot start.
        """
        settings = self._settings
        torch.set_num_threads(settings.inference.threads)
        ignore_abandoned_requests(asyncio.get_running_loop())
        connection_options(settings.kafka)  # a wrong file is an error before the wait for a server
        titles = await asyncio.to_thread(_titles, settings.http.titles) if settings.http.titles else {}
        redis = await self._clients.enter_async_context(RedisClient(settings.redis, self._metrics))
        web = WebServer(settings.http, self._metrics, self._health, chosen="http_port" in settings.given)
        http = await web.start()
        self._clients.push_async_callback(web.stop)
        log.info("starting", extra={"http": http, "pid": os.getpid()})
        served = await self._there_already()
        await self._until(REDIS, lambda: _answers(redis))
        await self._until(KAFKA, self._create_topics)
        served = served or await self._first_champion()
        refusals = refusals_of(settings.items)
        items = await self._read_items(refusals)
        await refusals.prepare(served.vocab)
        parts = await self._start_serving(redis, served, refusals)
        history, explainer = History(parts.metrics, parts.health), Explainer(parts.predictor)
        self._history = history
        try:
            names = ItemNames(titles, refusals.table)
            await web.show(self._page(settings.kafka, redis, parts.predictor, history, explainer, names))
        except Exception as error:  # clicks, metrics and probes do without the page
            log.warning("the live page is not served: %s", error)
        marks = TopicMarks(settings.kafka, redis, settings.sequences.ttl_s)
        consumer = await self._start_consumer(history, marks)
        judge = OnlineJudge(parts.lists, parts.counts, settings.lists.filter_seen)
        where = {"topic": settings.kafka.topic, "group": settings.kafka.group, "redis": settings.redis.address}
        log.info("serving", extra={**where, "http": http, "pid": os.getpid()})
        return Daemon(parts, consumer, Worker(consumer, parts, judge), history, explainer, marks, items)

    async def _until(self, name: str, attempt: Callable[[], Awaitable[R]]) -> R:
        """Repeat an attempt until what it needs is there."""
        if not self._patient:
            return await attempt()
        with stop_signals(self._stop, lambda name: log.info("stopping", extra={"signal": name})):
            return await until_there(name, attempt, self._stop, self._health.wait_for)

    async def _there_already(self) -> ServedModel | None:
        """Return the model, None if the registry has no champion or is away."""
        try:
            return await self._load()
        except (NoChampion, StoreUnreachable):
            if self._patient:
                return None
            raise

    async def _first_champion(self) -> ServedModel:
        assert self._settings.registry.dir is not None
        registry = Registry(self._settings.registry.dir)
        await self._until(CHAMPION, lambda: asyncio.to_thread(first_champion, registry))
        return await self._until(CHAMPION, self._load)

    async def _load(self) -> ServedModel:
        """Read the model and make its engine, in a thread: probes are answered meanwhile."""
        served = await asyncio.to_thread(ServedModel.open, self._settings)
        folder = self._settings.registry.dir or self._settings.model.dir
        log.info("model loaded", extra={"model": served.version, "items": len(served.vocab), "dir": folder})
        return served

    async def _create_topics(self) -> None:
        kafka = self._settings.kafka
        for topic in await ensure_topics(kafka, (kafka.topic, kafka.dead_letters)):
            log.info("topic created", extra={"topic": topic, "partitions": kafka.partitions})
        items = self._settings.items.topic
        if items and await ensure_topics(kafka, (items,), COMPACTED):
            log.info("topic created", extra={"topic": items, "partitions": kafka.partitions, **COMPACTED})

    async def _read_items(self, refusals: Refusals) -> ItemSource | None:
        """Read the whole table of items, if there is one."""
        settings = self._settings
        source = item_source(settings.items, settings.kafka, refusals, self._metrics, self._send_letters)
        if source is not None:
            self._clients.push_async_callback(_stop_in_time, source.aclose)
            self._health.wait_for(ITEMS)
            await self._until(ITEMS, source.read)
            self._health.wait_for("")
        return source

    async def _send_letters(self, letters: Collection[DeadLetter]) -> None:
        """Send dead letters of items."""
        assert self._letters is not None and self._history is not None
        await self._letters.send_dead_letters(letters)
        self._metrics.dead_letters.inc(len(letters))
        for letter in letters:
            self._history.dead_letter(letter)

    async def _start_serving(self, redis: RedisClient, served: ServedModel, refusals: Refusals) -> ServingParts:
        """Make the parts that score and publish, and warm up the model."""
        settings, metrics = self._settings, self._metrics
        metrics.model_created.set(served.created_s)
        unwanted = most_unwanted(served.max_len, settings.exclude_ttl_s)
        lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, unwanted, served.vocab, refusals)
        await self._until(REDIS, lambda: _first_refresh(lists))
        counts = OnlineCounts(redis, metrics)
        counts.serve(served.version)
        predictor = Predictor(served.engine, lists, settings.lists, settings.serving.rescore_users, metrics)
        await asyncio.to_thread(predictor.warm_up, served.engine)
        gc.collect()
        gc.freeze()  # a full collection of all these objects would delay clicks by 0.1 s
        self._health.model_warm = True
        return ServingParts(
            metrics,
            self._health,
            redis,
            RedisWatch(redis, self._health),
            lists,
            predictor,
            SequenceStore(
                redis,
                settings.sequences,
                settings.kafka.topic_epoch,
                served.max_len,
                metrics,
                settings.exclude_ttl_s,
            ),
            Publisher(redis, settings.lists.ttl_s, metrics, refusals, settings.exclude_ttl_s > 0),
            counts,
            Shadow(settings.serving.shadow_share, settings.lists, lists, counts, metrics),
        )

    async def _start_consumer(self, history: History, marks: TopicMarks) -> ClickConsumer:
        """Start the producer of dead letters, and join the group."""
        settings = self._settings

        def note(letters: Sequence[DeadLetter]) -> None:
            for letter in letters:
                history.dead_letter(letter)

        async def producer() -> Producer:
            # a dead letter may be duplicated, but never blocks the rest
            new = Producer(settings.kafka, idempotent=False)
            await new.start()
            self._clients.push_async_callback(_stop_in_time, new.stop)
            return new

        async def consumer() -> ClickConsumer:
            new = ClickConsumer(settings.kafka, settings.events, letters, marks, self._metrics, self._health, note)
            await new.start()
            self._clients.push_async_callback(_stop_in_time, new.stop)
            return new

        letters = self._letters = await self._until(KAFKA, producer)
        return await self._until(KAFKA, consumer)


def _titles(path: Path) -> dict[str, str]:
    """Return the titles of the page; none if they cannot be read, since clicks do without them."""
    try:
        return read_titles(path)
    except Exception as error:
        log.warning("the page shows item ids without titles: %s", error)
        return {}


async def _answers(redis: RedisClient) -> None:
    await redis.ping()
    await redis.check_format()


async def _first_refresh(lists: SharedLists) -> None:
    await lists.read_blocklist()  # lists with blocked items must not be published
    with contextlib.suppress(RedisRejected):  # clicks are served without counts; the next refresh warns
        await lists.refresh()


async def _stop_in_time(stop: Callable[[], Awaitable[None]]) -> None:
    """Stop a client, but do not wait for a broker that does not answer: unacknowledged events are redelivered.

    In a task of its own: a client that is closed cancels its tasks, at times including its caller.
    """
    closing = asyncio.ensure_future(stop())
    done, _ = await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
    if not done:
        closing.cancel()
        done, _ = await asyncio.wait((closing,), timeout=1.0)
    if done and not closing.cancelled():
        closing.result()
