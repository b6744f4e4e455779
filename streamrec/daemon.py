"""`streamrec serve`: start the parts, run the worker, shut down.

Startup: model, Redis, HTTP, topics, group. SIGTERM or SIGINT: not ready -> stop fetching -> finish the current batch,
with a deadline -> commit -> leave the group -> close Redis. A second signal exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamrec.errors import RedisRefused, RedisUnavailable, StreamrecError
from streamrec.health import Health
from streamrec.kafka.connection import ignore_abandoned_requests
from streamrec.kafka.consumer import REBALANCE_MARGIN_S, ClickConsumer
from streamrec.kafka.producer import Producer
from streamrec.kafka.topics import ensure_topics
from streamrec.logs import LogOnce
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.schemas import DeadLetter
from streamrec.serving.follower import ChampionFollower
from streamrec.serving.judge import OnlineJudge
from streamrec.serving.lists import SharedLists
from streamrec.serving.model import ServedModel
from streamrec.serving.online import OnlineCounts
from streamrec.serving.parts import ServingParts
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.serving.shadow import Shadow
from streamrec.serving.worker import Worker
from streamrec.settings import Settings
from streamrec.stop_signals import stop_signals
from streamrec.web.explain import Explainer
from streamrec.web.history import History
from streamrec.web.page import LivePage, PageMaker
from streamrec.web.server import WebServer
from streamrec.web.titles import read_titles

log = logging.getLogger(__name__)

PROBE_EVERY_S = 2.0
CLOSE_TIMEOUT_S = 4.0


@dataclass(frozen=True)
class Daemon:
    """The running parts of a daemon."""

    parts: ServingParts
    consumer: ClickConsumer
    worker: Worker
    history: History
    explainer: Explainer


async def serve(settings: Settings, burst: bool = False, page: PageMaker = LivePage) -> int:
    """Run the daemon until a signal stops it; return the exit status.

    Args:
        burst: stop once the topic is drained.
        page: makes the page of the HTTP port.

    Raises:
        StreamrecError: the daemon cannot start, or must not continue.
    """
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as clients:  # closed in reverse order
        daemon = await _start(settings, page, clients)
        async with _background(_background_work(settings, daemon)):
            with stop_signals(stop, lambda name: _on_signal(daemon, name)):
                serving = asyncio.create_task(daemon.worker.run(stop, burst), name="worker")
                await _run(serving, stop)
                if not await _shut_down(daemon, serving, settings.serving.shutdown_timeout_s):
                    return 1
            outcome = "drained" if burst and not stop.is_set() else "stopped"
            log.info(outcome, extra={"events": daemon.worker.handled_events})
            return 0


async def _start(settings: Settings, page: PageMaker, clients: contextlib.AsyncExitStack) -> Daemon:
    """Start the parts in order: model and Redis, page, topics and consumer."""
    torch.set_num_threads(settings.inference.threads)
    ignore_abandoned_requests(asyncio.get_running_loop())
    parts = await _start_serving(settings, clients)
    history, explainer = History(parts.metrics, parts.health), Explainer(parts.predictor)
    http = await _start_page(settings, parts, page, history, explainer, clients)
    consumer = await _start_consumer(settings, parts, history, clients)
    judge = OnlineJudge(parts.lists, parts.counts, settings.lists.filter_seen)
    log.info(
        "serving",
        extra={
            "topic": settings.kafka.topic,
            "group": settings.kafka.group,
            "redis": settings.redis.address,
            "http": http,
            "pid": os.getpid(),
        },
    )
    return Daemon(parts, consumer, Worker(consumer, parts, judge), history, explainer)


async def _run(serving: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Wait until the worker ends or a signal comes."""
    signalled = asyncio.create_task(stop.wait())
    await asyncio.wait((serving, signalled), return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()


async def _shut_down(daemon: Daemon, serving: asyncio.Task[None], timeout_s: float) -> bool:
    """Finish the current batch and flush the counts; return whether the batch was finished in time."""
    if daemon.worker.idle:  # no batch to finish, and a poll may wait for a rebalance to end
        serving.cancel()
    done, _ = await asyncio.wait((serving,), timeout=timeout_s)
    if not done:
        serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    if not done:
        log.error("the current batch was not finished in time; it is not committed and will be redelivered")
        return False
    with contextlib.suppress(RedisUnavailable):
        await daemon.parts.lists.refresh()
        await daemon.parts.counts.flush()
    return True


def _on_signal(daemon: Daemon, name: str) -> None:
    log.info("stopping: the current batch is finished first", extra={"signal": name})
    daemon.parts.health.stopping = True


async def _start_serving(settings: Settings, clients: contextlib.AsyncExitStack) -> ServingParts:
    """Load and warm up the model, connect to Redis."""
    served = ServedModel.open(settings)
    folder = settings.registry.dir or settings.model.dir
    log.info("model loaded", extra={"model": served.version, "items": len(served.vocab), "dir": folder})
    metrics = Metrics()
    metrics.model_created.set(served.created_s)
    health = Health(settings.serving.liveness_timeout_s, settings.kafka.rebalance_timeout_s + REBALANCE_MARGIN_S)
    redis = await clients.enter_async_context(RedisClient(settings.redis, metrics))
    await redis.ping()
    await redis.check_format()
    lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, served.max_len, served.vocab)
    await lists.refresh()
    counts = OnlineCounts(redis, metrics)
    predictor = Predictor(served.engine, lists, settings.lists, settings.serving.rescore_users, metrics)
    predictor.warm_up(served.engine)
    gc.collect()
    gc.freeze()  # a full collection of all these objects would delay clicks by 0.1 s
    health.model_warm = True
    return ServingParts(
        metrics,
        health,
        redis,
        lists,
        predictor,
        SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, served.max_len, metrics),
        Publisher(redis, settings.lists.ttl_s, metrics),
        counts,
        Shadow(settings.serving.shadow_share, settings.lists, lists, counts, metrics),
    )


async def _start_page(
    settings: Settings,
    parts: ServingParts,
    page: PageMaker,
    history: History,
    explainer: Explainer,
    clients: contextlib.AsyncExitStack,
) -> str:
    """Serve the live page, /metrics and the health checks; return the address."""
    titles = await asyncio.to_thread(read_titles, settings.http.titles) if settings.http.titles else {}
    routes = page(settings.kafka, parts.redis, parts.predictor, history, explainer, titles)
    web = WebServer(settings.http, parts.metrics, parts.health, routes, chosen="http_port" in settings.given)
    address = await web.start()
    clients.push_async_callback(web.stop)
    return address


async def _start_consumer(
    settings: Settings, parts: ServingParts, history: History, clients: contextlib.AsyncExitStack
) -> ClickConsumer:
    """Create missing topics, and join the group."""
    for topic in await ensure_topics(settings.kafka, (settings.kafka.topic, settings.kafka.dead_letters)):
        log.info("topic created", extra={"topic": topic, "partitions": settings.kafka.partitions})
    producer = Producer(settings.kafka, idempotent=False)  # a dead letter may be duplicated, but never blocks the rest
    await producer.start()
    clients.push_async_callback(_stop_in_time, producer.stop)

    def note(letters: Sequence[DeadLetter]) -> None:
        for letter in letters:
            history.dead_letter(letter)

    consumer = ClickConsumer(settings.kafka, settings.events, producer, parts.metrics, parts.health, note)
    await consumer.start()
    clients.push_async_callback(_stop_in_time, consumer.stop)
    return consumer


def _background_work(settings: Settings, daemon: Daemon) -> list[Coroutine[Any, Any, None]]:
    """Return what runs beside the clicks."""
    parts, wait_idle = daemon.parts, daemon.consumer.wait_idle
    work = [
        _refresh(parts.lists, parts.counts, settings.lists.refresh_s),
        _probe(parts.redis, parts.health),
        parts.shadow.run(wait_idle),
        daemon.history.run(),
        daemon.explainer.run(wait_idle),
    ]
    if settings.registry.dir is not None:
        work.append(ChampionFollower(settings, Registry(settings.registry.dir), parts).run())
    return work


async def _refresh(lists: SharedLists, counts: OnlineCounts, every_s: float) -> None:
    """Refresh the popular list and flush the online figures regularly."""
    warning = LogOnce(log)
    while True:
        await asyncio.sleep(every_s)
        refused = False
        for part in (lists.refresh, counts.flush):
            try:
                await part()
            except RedisRefused as error:
                refused = True
                warning("popular list and online figures are behind: %s", error)
            except RedisUnavailable:  # the worker and the probe report it
                break
        if not refused:
            warning.reset()


async def _probe(redis: RedisClient, health: Health) -> None:
    """Ping Redis regularly, so that readiness changes even if no clicks come."""
    while True:
        await asyncio.sleep(PROBE_EVERY_S)
        try:
            await redis.ping()
            answers = True
        except RedisUnavailable as error:
            answers = False
            if health.redis_answers:
                log.warning("Redis is unreachable, waiting: %s", error)
        if answers and not health.redis_answers:
            log.info("Redis is reachable again")
            health.progressed()  # the worker needs a moment until its next commit
        health.redis_answers = answers


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


@contextlib.asynccontextmanager
async def _background(coroutines: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run coroutines while the block runs."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(_report)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, StreamrecError):
                raise result


def _report(task: asyncio.Task[None]) -> None:
    """Log the failure of a background task: the clicks continue without it."""
    if not task.cancelled() and task.exception() is not None:
        log.error(
            "a background task has failed and is not restarted; clicks are still served", exc_info=task.exception()
        )
