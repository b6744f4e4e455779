"""The process that sends the clicks of a benchmark: `python -m streamrec.bench.feeder RATE EVENTS USERS ITEMS`.

It sends clicks of all users in turn; rate 0 is as fast as possible. ITEMS is a JSON file with item ids: reading
them from the model would import PyTorch. Settings come from the environment.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sasrec import Event
from streamrec.kafka.replay import Pacer, click_producer
from streamrec.settings_sources import load_settings


def main(arguments: Sequence[str]) -> None:
    """Send the clicks."""
    rate_per_s, events, users = float(arguments[0]), int(arguments[1]), int(arguments[2])
    ids = json.loads(Path(arguments[3]).read_text("utf-8"))
    settings = load_settings()
    gc.freeze()  # a full collection would delay clicks that are already stamped

    async def run() -> None:
        async with click_producer(settings.kafka, settings.events) as producer:
            pacer = Pacer(rate_per_s)
            for event in _clicks(events, users, ids):
                await pacer.wait()
                await producer.send(event)

    asyncio.run(run())


def _clicks(events: int, users: int, ids: Sequence[str]) -> Iterator[Event]:
    """Yield clicks on random items; users click in turn, in a random order."""
    generator = random.Random()
    order: Sequence[int] = generator.sample(range(users), users)
    for number in range(events):
        yield Event(f"user{order[number % users]}", generator.choice(ids), None)


if __name__ == "__main__":
    main(sys.argv[1:])
