"""All servers come back at other addresses, and only the name in the settings leads there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamrec.errors import RedisUnavailable
from streamrec.local.cluster import EmbeddedCluster
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed, wait_caught_up
from support.oracle import assert_delivered
from support.redis_cluster import node, running
from support.redis_sentinels import NAME, watched
from support.relay import Relay, two_servers
from support.waiting import eventually
from support.workload import Record, click

log = logging.getLogger(__name__)
StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
USERS = 30


def one_click_each(turn: int) -> list[Record]:
    return [Record(f"u{n}".encode(), click(f"u{n}", f"i{turn}", 100 * turn + n)) for n in range(USERS)]


def moved(cluster: EmbeddedCluster, former: str) -> EmbeddedCluster:
    """Stop or freeze the nodes; return a cluster with the same data and ids on other ports, not started yet."""
    for server in cluster.nodes:
        server.stop() if former == "stopped" else server.pause()
    other = EmbeddedCluster()
    for before, after in zip(cluster.nodes, other.nodes, strict=True):
        shutil.copytree(
            cluster._folder / str(before.port) / "appendonlydir", other._folder / str(after.port) / "appendonlydir"
        )
    return other


async def has_status(daemon: Daemon, path: str, wanted: int) -> bool:
    return (await daemon.get(path))[0] == wanted


@pytest.mark.parametrize("former", ["stopped", "frozen"])
async def test_a_cluster_whose_nodes_all_have_other_addresses_is_found_through_the_name_in_the_settings(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path, former: str
) -> None:
    with running(replicas=0) as cluster:
        async with Relay(cluster.nodes[0]) as seed:
            options: dict[str, Any] = {
                "redis_url": f"redis://127.0.0.1:{seed.port}",
                "redis_cluster": True,
                "model_dir": model_dir,
            }
            settings = make_settings(**options)
            daemon = start_daemon(**options)
            await daemon.wait_ready()
            await feed(settings, one_click_each(0))
            await wait_caught_up(settings)
            other = moved(cluster, former)
            try:
                await feed(settings, one_click_each(1))
                await eventually(lambda: daemon.has_logged("the batch waits"))
                await eventually(lambda: has_status(daemon, "/readyz", 503))
                other.start()
                seed.leads_to = other.nodes[1]
                began_s = time.monotonic()
                await wait_caught_up(settings, timeout_s=20)
                await eventually(lambda: has_status(daemon, "/readyz", 200), timeout_s=10)
                log.info("%s: found after %.1f s", former, time.monotonic() - began_s)
                assert (await daemon.get("/livez"))[0] == 200
                assert await daemon.metric("streamrec_rebalances_total") == 1
                assert "Traceback" not in daemon.output
                await assert_delivered(make_settings(**options | {"redis_url": other.redis_url}))
            finally:
                other.stop()


@pytest.mark.parametrize("former_sentinels", ["gone", "still there"])
async def test_sentinels_and_servers_that_all_have_other_addresses_are_found_through_the_names(
    make_settings: MakeSettings, former_sentinels: str
) -> None:
    async with watched(replicas=0) as former, contextlib.AsyncExitStack() as stack:
        names = [await stack.enter_async_context(Relay(sentinel)) for sentinel in former.sentinels]
        addresses = ",".join(f"127.0.0.1:{name.port}" for name in names)
        settings = make_settings(redis_url=f"redis+sentinel://{addresses}/{NAME}/0")
        redis = await stack.enter_async_context(RedisClient(settings.redis))
        await redis.probe()
        for process in (*former.servers, *(former.sentinels if former_sentinels == "gone" else ())):
            process.kill()
        with pytest.raises(RedisUnavailable):
            await redis.probe()
        new = await stack.enter_async_context(watched(replicas=0))
        for name, sentinel in zip(names, new.sentinels, strict=True):
            name.leads_to = sentinel

        async def takes_writes() -> bool:
            with contextlib.suppress(RedisUnavailable):
                await redis.probe()
                return True
            return False

        await eventually(takes_writes, timeout_s=10)
        async with node(new.servers[0]) as client:
            assert await client.keys("*:probe:0")


async def test_a_single_server_that_has_another_address_is_found_through_the_name(make_settings: MakeSettings) -> None:
    with two_servers() as (former, new):
        async with (
            Relay(former) as name,
            RedisClient(make_settings(redis_url=f"redis://127.0.0.1:{name.port}/0").redis) as redis,
        ):
            await asyncio.gather(*(redis.probe() for _ in range(5)))
            former.kill()
            with pytest.raises(RedisUnavailable):
                await redis.probe()
            name.leads_to = new
            for _ in range(5):
                await redis.probe()
