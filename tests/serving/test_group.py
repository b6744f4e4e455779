"""Members of a consumer group on Apache Kafka: sessions that expire, heartbeats under load, commits of the past."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sasrec import ItemVocab, SASRec, SASRecConfig, save_model
from streamrec.local.servers import LocalServers
from streamrec.settings import Settings

from support.daemon_process import EVENTS, Daemon
from support.kafka_client import feed, feeding, wait_caught_up
from support.oracle import assert_delivered
from support.servers import SHORTEST_SESSION_S
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
ALL = "partitions=[0, 1, 2, 3]"


@pytest.fixture
def where(own: LocalServers, model_dir: Path) -> dict[str, Any]:
    return {
        "model_dir": model_dir,
        "kafka_bootstrap_servers": own.kafka_bootstrap_servers,
        "kafka_session_timeout_s": SHORTEST_SESSION_S,
        "kafka_max_batch": 16,
    }


async def test_a_daemon_that_was_frozen_past_its_session_commits_nothing_of_the_past(
    where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings(**where)
    async with feeding(settings, seed=21, per_s=300):
        frozen = start_daemon(**where)
        await frozen.wait_handled(100)
        other = start_daemon(**where)
        await other.wait_handled(100)
        frozen.signal(signal.SIGSTOP)
        await eventually(lambda: other.has_logged(ALL))  # its session has expired
        await other.wait_more(300)
        frozen.signal(signal.SIGCONT)
        # its batch belongs to an earlier generation of the group; then it joins again
        await eventually(lambda: frozen.has_logged("commit refused") or frozen.has_logged("commit dropped"))
        await frozen.wait_more(100)
    await wait_caught_up(settings)
    await assert_delivered(settings)
    for daemon in (frozen, other):
        assert "Traceback" not in daemon.output


async def test_a_daemon_under_load_remains_in_its_group(
    where: dict[str, Any], start_daemon: StartDaemon, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Heartbeats share the event loop with a slow model: it is wide, and nothing is cached."""
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(50, max_len=200, hidden_units=512, num_heads=8, num_blocks=2))
    save_model(tmp_path / "wide", model, ItemVocab([f"i{n}" for n in range(50)]))
    where |= {"model_dir": tmp_path / "wide", "inference_cache_bytes": 0, "kafka_max_batch": 10_000}
    where |= {"kafka_session_timeout_s": 3}
    settings = make_settings(**where)
    users, clicks = 1_000, 30
    numbers = [(f"u{n % users}", f"i{n % 50}", n) for n in range(users * clicks)]
    await feed(settings, [Record(user.encode(), click(user, item, n)) for user, item, n in numbers])
    daemon = start_daemon(**where)
    await wait_caught_up(settings, timeout_s=200)
    assert await daemon.metric(EVENTS, outcome="applied") == users * clicks
    assert await daemon.metric("streamrec_rebalances_total") == 1
    assert daemon.lines("WARNING", "ERROR") == []
