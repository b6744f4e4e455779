"""`streamrec serve`: puts the parts together, runs the loop, takes them apart in order.

Start: model, Redis, topics, HTTP, group.  SIGTERM or SIGINT: not ready -> stop fetching -> finish the batch in
hand, with a deadline -> commit -> leave the group -> close Redis.  A second signal exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import torch

from streamrec.errors import RedisRefused, RedisUnavailable, StreamrecError
from streamrec.health import Health
from streamrec.kafka.connection import Producer, ensure_topics, ignore_abandoned_requests
from streamrec.kafka.consumer import REBALANCE_MARGIN_S, ClickConsumer
from streamrec.metrics import Metrics, unix_s
from streamrec.redis.client import RedisClient
from streamrec.registry import Registry
from streamrec.serving.follower import ChampionFollower
from streamrec.serving.judge import OnlineJudge
from streamrec.serving.lists import SharedLists
from streamrec.serving.model import ServedModel
from streamrec.serving.online import OnlineCounts
from streamrec.serving.predictor import Predictor
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.serving.shadow import Shadow
from streamrec.serving.worker import Worker
from streamrec.settings import Settings
from streamrec.stop_signals import stop_signals
from streamrec.web.explain import Explainer
from streamrec.web.history import History
from streamrec.web.page import LivePage
from streamrec.web.server import WebServer
from streamrec.web.titles import read_titles

log = logging.getLogger(__name__)

PROBE_S = 2.0
CLOSE_TIMEOUT_S = 4.0


async def serve(settings: Settings, burst: bool = False, page: type[LivePage] = LivePage) -> int:
    """Run the daemon until it is told to stop; returns the exit status.

    Args:
        burst: stop once the topic is drained.
        page: what the HTTP port shows.

    Raises:
        StreamrecError: it cannot start, or must not go on.
    """
    torch.set_num_threads(settings.inference_threads)
    ignore_abandoned_requests(asyncio.get_running_loop())
    served = ServedModel.open(settings)
    log.info(
        "model loaded",
        extra={"model": served.version, "items": len(served.vocab), "dir": settings.registry_dir or settings.model_dir},
    )
    titles = await asyncio.to_thread(read_titles, settings.items) if settings.items else {}
    metrics = Metrics()
    metrics.model_created.set(unix_s(str(served.metadata.get("created_at"))))
    health = Health(settings.liveness_timeout_s, settings.kafka_rebalance_timeout_s + REBALANCE_MARGIN_S)
    async with contextlib.AsyncExitStack() as parts:
        redis = await parts.enter_async_context(RedisClient(settings, metrics))
        await redis.ping()
        await redis.check_format()
        lists = SharedLists(redis, settings, served.max_len, served.vocab)
        await lists.refresh()
        for topic in await ensure_topics(settings, (settings.kafka_topic, settings.kafka_dead_letters)):
            log.info("topic created", extra={"topic": topic, "partitions": settings.kafka_partitions})
        predictor = Predictor(served.engine, lists, settings, metrics)
        predictor.warm_up(served.engine)
        gc.collect()
        gc.freeze()  # what is there by now stays: to look through all of it for garbage would stop clicks for 0.1 s
        health.model_warm = True
        history, explainer = History(metrics, health), Explainer(predictor)
        web = WebServer(settings, metrics, health, page(settings, redis, predictor, history, explainer, titles))
        address = await web.start()
        parts.push_async_callback(web.stop)
        # a dead letter may stand twice, but never block the rest
        producer = Producer(settings, idempotent=False, told=history.dead_letter)
        await producer.start()
        parts.push_async_callback(_in_time, producer.stop)
        consumer = ClickConsumer(settings, producer, metrics, health)
        await consumer.start()
        parts.push_async_callback(_in_time, consumer.stop)
        log.info("serving", extra={
            "topic": settings.kafka_topic, "group": settings.kafka_group, "redis": settings.redis_address,
            "http": address, "pid": os.getpid(),
        })  # fmt: skip
        store = SequenceStore(redis, settings, served.max_len, metrics)
        publisher = Publisher(redis, settings, metrics)
        counts = OnlineCounts(redis, settings, metrics)
        judge = OnlineJudge(lists, counts, settings.filter_seen)
        shadow = Shadow(settings, lists, counts, metrics)
        worker = Worker(consumer, store, predictor, publisher, lists, judge, shadow, health)
        background = [_refresh(lists, counts, settings), _probe(redis, health), shadow.run(consumer.wait_idle)]
        background += [history.run(), explainer.run(consumer.wait_idle)]
        if settings.registry_dir is not None:
            registry = Registry(settings.registry_dir)
            background.append(
                ChampionFollower(settings, registry, predictor, shadow, store, publisher, redis, metrics).run()
            )
        async with _background(*background):
            return await _run(worker, settings, health, lists, counts, burst)


async def _run(
    worker: Worker, settings: Settings, health: Health, lists: SharedLists, counts: OnlineCounts, burst: bool
) -> int:
    stop = asyncio.Event()

    def told(name: str) -> None:
        log.info("stopping: the batch in hand is finished first", extra={"signal": name})
        health.stopping = True

    with stop_signals(stop, told):
        loop = asyncio.create_task(worker.run(stop, burst), name="worker")
        asked = asyncio.create_task(stop.wait())
        await asyncio.wait((loop, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if worker.idle:  # nothing to finish, and a poll may wait for a rebalance to end
            loop.cancel()
        done, _ = await asyncio.wait((loop,), timeout=settings.shutdown_timeout_s)
        if not done:
            loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loop
            log.error("the batch in hand could not be finished in time; it is not committed and comes again")
            return 1
        with contextlib.suppress(asyncio.CancelledError):
            await loop
        with contextlib.suppress(RedisUnavailable):
            await lists.refresh()
            await counts.flush()
    log.info("drained" if burst and not stop.is_set() else "stopped", extra={"events": worker.handled})
    return 0


async def _refresh(lists: SharedLists, counts: OnlineCounts, settings: Settings) -> None:
    refused = ""
    while True:
        await asyncio.sleep(settings.refresh_s)
        said, refused = refused, ""
        for part in (lists.refresh, counts.flush):
            try:
                await part()
            except RedisRefused as error:
                refused = str(error)
                if refused != said:
                    log.warning("popular list and online figures are behind: %s", error)
            except RedisUnavailable:  # the loop and the probe say so
                break


async def _probe(redis: RedisClient, health: Health) -> None:
    """Readiness needs to know of a Redis that went away while no clicks come."""
    while True:
        await asyncio.sleep(PROBE_S)
        try:
            await redis.ping()
            answers = True
        except RedisUnavailable as error:
            answers = False
            if health.redis_answers:
                log.warning("Redis is away, waiting for it: %s", error)
        if answers and not health.redis_answers:
            log.info("Redis is back")
            health.progressed()  # the worker needs a moment before it commits again
        health.redis_answers = answers


async def _in_time(stop: Callable[[], Awaitable[None]]) -> None:
    """Leave and close, unless a broker that does not answer would keep us: what is in doubt comes again.

    In a task of its own: a client that is closed cancels what it has under way, at times including its caller.
    """
    closing = asyncio.ensure_future(stop())
    done, _ = await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
    if not done:
        closing.cancel()
        done, _ = await asyncio.wait((closing,), timeout=1.0)
    if done and not closing.cancelled():
        closing.result()


@contextlib.asynccontextmanager
async def _background(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
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
    """A task in the background that fails must not do so unseen: the clicks go on without it."""
    if not task.cancelled() and task.exception() is not None:
        log.error("a part in the background has failed and stays away until a restart", exc_info=task.exception())
