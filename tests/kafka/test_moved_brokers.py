"""Brokers that come back at other addresses, which the settings name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamrec.local.apache_kafka import apache_kafka
from streamrec.local.process import free_port
from streamrec.settings import Settings

from support.daemon_process import Daemon, Retrain
from support.kafka_client import feed, wait_caught_up
from support.oracle import assert_delivered
from support.servers import apache_kafka_home
from support.waiting import eventually
from support.workload import Record, click

MOVED_WITHIN_S = 60.0


@pytest.mark.long
async def test_all_brokers_move_while_a_daemon_and_an_archiver_run(
    start_daemon: Callable[..., Daemon], make_settings: Callable[..., Settings], model_dir: Path, tmp_path: Path
) -> None:
    home, ports = apache_kafka_home(), (free_port(), free_port())
    where: dict[str, Any] = {"kafka_bootstrap_servers": ",".join(f"127.0.0.1:{port}" for port in ports)}
    folders = {"archive_dir": tmp_path / "archive", "registry_dir": tmp_path / "registry"}
    settings = make_settings(**where, model_dir=model_dir)
    before = apache_kafka(home, tmp_path / "kafka", port=ports[0])
    before.start()
    try:
        daemon = start_daemon(**where)
        retrain = Retrain(make_settings(**where, **folders, archive_flush_s=1))
        await feed(settings, clicks(0, 40))
        await daemon.wait_handled(40)
        await eventually(lambda: archived(retrain, 40), MOVED_WITHIN_S)
    finally:
        before.stop()
    after = apache_kafka(home, tmp_path / "kafka", port=ports[1])
    after.start()
    try:
        await feed(settings, clicks(40, 80))
        await daemon.wait_handled(80, timeout_s=MOVED_WITHIN_S)  # with a dead letter, whose producer has moved too
        await wait_caught_up(settings)
        await eventually(lambda: archived(retrain, 80), MOVED_WITHIN_S)
        await assert_delivered(settings)
        assert "Traceback" not in daemon.output + retrain.output
    finally:
        retrain.kill()
        after.stop()


def clicks(begin: int, end: int) -> list[Record]:
    """Clicks, and a record that is none."""
    good = [Record(b"u%d" % (n % 7), click(f"u{n % 7}", f"i{n % 50}")) for n in range(begin, end)]
    return [Record(b"k", b"no click", bad=True), *good]


async def archived(retrain: Retrain, events: int) -> bool:
    assert retrain.process.poll() is None, retrain.output
    return f"events={events}" in retrain.output
