"""The events on deploy/EVENTS.md are clicks under their presets, as the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from streamrec.event_presets import PRESETS
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import stored
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import feed
from support.workload import Record

PAGE = (Path(__file__).parents[2] / "deploy" / "EVENTS.md").read_text("utf-8")
EXAMPLE = re.compile(r"^`(\w+)`(?: \(\[.*?\]\(.*?\)\))?: ([^\n].*?)\n\n((?:    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)
EXAMPLES = {preset: (" ".join(text.split()), value) for preset, text, value in EXAMPLE.findall(PAGE)}


def test_there_is_an_example_of_each_preset() -> None:
    assert list(EXAMPLES) == list(PRESETS)


@pytest.mark.parametrize("preset", EXAMPLES)
async def test_an_example_is_the_clicks_that_the_page_says(
    start_daemon: Callable[..., Daemon], make_settings: Callable[..., Settings], model_dir: Path, preset: str
) -> None:
    text, value = EXAMPLES[preset]
    found = re.match(r"(?:a click|clicks) of `(\S+)` on ((?:`\S+`,? )+)at (\S+?Z)[.,]", text)
    assert found, text
    user, items, at = found[1], re.findall(r"`(\S+?)`", found[2]), datetime.fromisoformat(found[3])
    where: dict[str, Any] = {"events_preset": preset}
    settings = make_settings(model_dir=model_dir, **where)
    await feed(settings, [Record(user.encode(), json.dumps(json.loads(value)).encode())])
    assert await start_daemon("--burst", **where).wait_exit() == 0
    async with RedisClient(settings.redis) as redis:
        users = [(name, sequence) async for name, sequence in stored(redis, None)]
    assert [(name, s.items, s.last_event_ts_ms) for name, s in users if s] == [(user, items, at.timestamp() * 1000)]
