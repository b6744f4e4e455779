"""All servers come back at other addresses, and only the name in the settings leads there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamrec.local.cluster import EmbeddedCluster
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed, wait_caught_up
from support.oracle import assert_delivered
from support.redis_cluster import running
from support.relay import Relay
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
USERS = 30


def one_click_each(turn: int) -> list[Record]:
    return [Record(f"u{n}".encode(), click(f"u{n}", f"i{turn}", 100 * turn + n)) for n in range(USERS)]


def moved(cluster: EmbeddedCluster) -> EmbeddedCluster:
    """Stop the nodes and return a cluster with the same data and ids on other ports, not started yet."""
    for server in cluster.nodes:
        server.stop()
    other = EmbeddedCluster()
    for before, after in zip(cluster.nodes, other.nodes, strict=True):
        shutil.copytree(
            cluster._folder / str(before.port) / "appendonlydir", other._folder / str(after.port) / "appendonlydir"
        )
    return other


async def has_status(daemon: Daemon, path: str, wanted: int) -> bool:
    return (await daemon.get(path))[0] == wanted


async def test_a_cluster_whose_nodes_all_have_other_addresses_is_found_through_the_name_in_the_settings(
    start_daemon: StartDaemon, make_settings: MakeSettings, model_dir: Path
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
            other = moved(cluster)
            try:
                await feed(settings, one_click_each(1))
                await eventually(lambda: daemon.has_logged("the batch waits"))
                await eventually(lambda: has_status(daemon, "/readyz", 503))
                other.start()
                seed.leads_to = other.nodes[1]
                began_s = time.monotonic()
                await wait_caught_up(settings, timeout_s=20)
                await eventually(lambda: has_status(daemon, "/readyz", 200), timeout_s=10)
                assert time.monotonic() - began_s < 20
                assert (await daemon.get("/livez"))[0] == 200
                assert await daemon.metric("streamrec_rebalances_total") == 1
                assert "Traceback" not in daemon.output
                await assert_delivered(make_settings(**options | {"redis_url": other.redis_url}))
            finally:
                other.stop()
