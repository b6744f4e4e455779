"""Read the rights of each Redis user from deploy/, and send every kind of command that each part sends."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from pathlib import Path

from sasrec import load_model
from streamrec.errors import EmbeddedError, RedisRefused
from streamrec.items.refusals import Refusals
from streamrec.items.sweep import SWEPT, Sweeper
from streamrec.local.servers import redis_program
from streamrec.metrics import Metrics
from streamrec.rebuild.rebuild import REPLACE
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.redis.lock import take_lock
from streamrec.schemas import EXCLUDE, Recommendation, RecordMark
from streamrec.serving.lists import SharedLists
from streamrec.serving.online import OnlineCounts
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.serving.topic_marks import TopicMarks
from streamrec.settings import Settings

from support.redis_access import batch, clicks, event

PAGE = (Path(__file__).parents[2] / "deploy" / "SECURITY.md").read_text("utf-8")
PASSWORD = "s3cr3t-a@b/c?d#e%f"  # with characters that a URL must encode


def knows_setinfo() -> bool:
    """Return whether servers of these tests know CLIENT SETINFO: Redis 7.0 does not."""
    try:
        shown = subprocess.run([redis_program(), "--version"], capture_output=True, text=True, check=True).stdout
    except EmbeddedError:  # the tests that need a server are skipped
        return True
    return re.search(r"v=7\.0\.", shown) is None


def rights_of_the_page() -> dict[str, str]:
    """Return the rights of each user; as the page says, without those that Redis 7.0 does not know."""
    found = re.findall(r"^    ACL SETUSER (\S+) (reset on >PASSWORD .*)$", PAGE, re.MULTILINE)
    left_out = "" if knows_setinfo() else " +client|setinfo"
    return {user: rights.replace(left_out, "") for user, rights in found}


RIGHTS = rights_of_the_page()


async def what_serve_does(settings: Settings, model_dir: Path) -> None:
    """Send the commands of `streamrec serve`; a refused step does not stop the others."""
    metrics = Metrics()
    async with RedisClient(settings.redis, metrics) as redis:
        store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, metrics, exclude_ttl_s=60)
        lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, 8, load_model(model_dir).vocab)
        counts = OnlineCounts(redis, metrics)

        async def refresh() -> None:
            for events in (
                clicks("ann", ["i1"], 1),
                clicks("ann", ["i2"], 10**6),
                batch(event("ann", "i3", 0, role=EXCLUDE)),
            ):  # so far apart that popularity is rescaled
                lists.count(await store.append(events))
                await lists.refresh()

        async def publish() -> None:
            for n in (2, 1):
                await Publisher(redis, settings.lists.ttl_s, metrics, excludes=True).publish(
                    [Recommendation("ann", ["i1"], [1.0], "m", 1, n, exclusions=1)]
                )

        async def figures() -> None:
            counts.count("m", ["i1"], ["i1"], 1)
            await counts.flush()

        async def mark() -> None:
            marks = TopicMarks(settings.kafka, redis, 60)
            marks.note({0: RecordMark(0, 0, 0)})
            await marks.store()
            await redis.get_many([redis.keys.topic_mark(0)])

        async def listen() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    async for _ in redis.listen(Keys().models_channel):
                        pass

        async def sweep() -> None:
            for most in (1_000, 0):  # fields: with 0 the notes are written anew
                await redis.run(SWEPT, [redis.keys.swept], [60, most])
                await redis.run(SWEPT, [redis.keys.swept], [60, most, 1, '"i1"'])
            refusals = Refusals()
            refusals.block(frozenset({"i1"}))
            await Sweeper(redis, refusals, 20, metrics).run()

        steps = (
            redis.ping,
            redis.probe,
            redis.check_format,
            refresh,
            publish,
            figures,
            mark,
            listen,
            sweep,
            lambda: store.read(["ann"]),
        )
        for step in steps:
            with contextlib.suppress(RedisRefused):
                await step()


async def what_retrain_does(settings: Settings, _: Path) -> None:
    keys = Keys()
    async with RedisClient(settings.redis) as redis:
        for step in (
            redis.check_format,
            lambda: take_lock(redis, keys.training, "me", 1000),
            lambda: take_lock(redis, keys.training, "me", 0),
            lambda: redis.notify(keys.models_channel, "m"),
        ):
            with contextlib.suppress(RedisRefused):
                await step()


async def what_rebuild_does(settings: Settings, model_dir: Path) -> None:
    keys, metrics = Keys(), Metrics()
    async with RedisClient(settings.redis, metrics) as redis:
        lists = SharedLists(redis, settings.lists, settings.sequences.ttl_s, 8, load_model(model_dir).vocab)
        store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 8, metrics, exclude_ttl_s=60)

        async def publish() -> None:
            for n in (2, 1):
                await Publisher(redis, settings.lists.ttl_s, metrics, excludes=True).publish(
                    [Recommendation("ann", ["i1"], [1.0], "m", 1, n, exclusions=1)]
                )

        for step in (
            redis.check_format,
            lists.refresh,
            lambda: lists.restore({"i1": 1.0}, 10**7, 1),
            lambda: redis.get_many([keys.sequence("ann"), keys.recommendation("ann")]),
            lambda: store.append(batch(event("ann", "i3", 0, role=EXCLUDE))),
            lambda: store.read(["ann"]),
            lambda: redis.run_each(REPLACE, [], [([keys.sequence("ann")], ["", "value", 60])]),
            publish,
        ):
            with contextlib.suppress(RedisRefused):
                await step()


async def what_commands_do(settings: Settings, _: Path) -> None:
    keys = Keys()
    async with RedisClient(settings.redis) as redis:

        async def scan() -> list[str]:
            return [key async for key in redis.scan(keys.recommendation("").removesuffix("}"))]

        for step in (
            redis.ping,
            redis.probe,
            lambda: redis.check_format(claim=False),
            scan,
            lambda: redis.get_many([keys.recommendation("ann")]),
            lambda: redis.get_many([keys.sequence("ann")]),
            lambda: redis.hash(keys.online("m")),
            lambda: redis.notify(keys.models_channel, "m"),
        ):
            with contextlib.suppress(RedisRefused):
                await step()


DONE_BY = {
    "streamrec-serve": what_serve_does,
    "streamrec-retrain": what_retrain_does,
    "streamrec-rebuild": what_rebuild_does,
    "streamrec-commands": what_commands_do,
}
