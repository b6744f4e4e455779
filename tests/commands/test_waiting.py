"""Commands that are started a little before Kafka or Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from streamrec.local.apache_kafka import apache_kafka
from streamrec.local.process import free_port
from streamrec.settings import Settings

from support.preloaded import Command, run_command
from support.servers import OwnRedis, apache_kafka_home

MakeSettings = Callable[..., Settings]


async def test_a_command_waits_for_redis(make_settings: MakeSettings, own_redis: OwnRedis) -> None:
    settings = make_settings(redis_url=own_redis.redis_url, commands_wait_s=60)
    own_redis.redis.stop()
    command = Command(settings, "recs", "ann")
    await asyncio.sleep(1)  # it has tried more than once
    assert command.process.poll() is None
    own_redis.redis.start()
    status, out, err = await asyncio.to_thread(command.ends, 30)
    command.kill()
    assert (status, out) == (1, "")
    assert "waiting for Redis" in err and err.splitlines()[-1] == "no list is published for user ann"


async def test_it_waits_no_longer_than_the_settings_say(make_settings: MakeSettings) -> None:
    settings = make_settings(redis_url=f"redis://127.0.0.1:{free_port()}", commands_wait_s=1.5)
    began_s = time.monotonic()
    ended = await asyncio.to_thread(run_command, settings, "user", "ann")
    assert ended.returncode == 1 and 1.5 < time.monotonic() - began_s < 20
    assert ended.stderr.splitlines()[-1].startswith("streamrec: Redis at "), ended.stderr


async def test_a_command_waits_for_kafka(make_settings: MakeSettings, tmp_path: Path) -> None:
    clicks = tmp_path / "clicks.csv"
    clicks.write_text("user_id,item_id,timestamp\nann,i1,1700000000000\n")
    kafka = apache_kafka(apache_kafka_home(), tmp_path / "kafka", port=free_port())
    settings = make_settings(kafka_bootstrap_servers=f"127.0.0.1:{kafka.port}", commands_wait_s=60)
    command = Command(settings, "replay", str(clicks))
    try:
        await asyncio.to_thread(kafka.start)
        status, out, err = await asyncio.to_thread(command.ends, 60)
        assert (status, out[:10]) == (0, "1 events t"), err
        assert "waiting for Kafka" in err
    finally:
        command.kill()
        kafka.stop()
