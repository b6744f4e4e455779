"""The records behind, the progress line, and its log."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from streamrec.settings import Settings

from studies.soak.state import PARTITIONS, State

SAMPLE_EVERY_S, LOG_EVERY_SAMPLES = 2.0, 5
ANSWER_S = 5.0


class Behind:
    """Reads how many records of the topic the group has not committed yet."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: AIOKafkaConsumer | None = None

    async def read(self) -> int | None:
        """Return the number of records; None if the broker does not answer now."""
        try:
            return await asyncio.wait_for(self._read(), ANSWER_S)
        except (KafkaError, TimeoutError, OSError):
            await self.close()
            return None

    async def _read(self) -> int:
        if self._consumer is None:
            kafka = self._settings.kafka
            self._consumer = AIOKafkaConsumer(
                bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group, enable_auto_commit=False
            )
            await self._consumer.start()
        places = [TopicPartition(self._settings.kafka.topic, number) for number in range(PARTITIONS)]
        ends = await self._consumer.end_offsets(places)
        return sum([ends[place] - (await self._consumer.committed(place) or 0) for place in places])

    async def close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with contextlib.suppress(KafkaError, TimeoutError):
                await asyncio.wait_for(consumer.stop(), ANSWER_S)


@contextlib.asynccontextmanager
async def watching(state: State, settings: Settings, folder: Path) -> AsyncIterator[None]:
    """Sample, save the state and show the progress while the block runs."""

    async def watch() -> None:
        shown, behind = 0, Behind(settings)
        try:
            while True:
                number = await behind.read()
                state.samples.append((state.now_s, state.produced, number))
                state.save(folder)
                show(state, number, folder if shown % LOG_EVERY_SAMPLES == 0 else None)
                shown += 1
                await asyncio.sleep(SAMPLE_EVERY_S)
        finally:
            await behind.close()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if sys.stderr.isatty():
            sys.stderr.write("\n")


def show(state: State, behind: int | None, folder: Path | None) -> None:
    """Draw the progress line on a terminal; append it to the log in the folder."""
    text = line(state, behind)
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
    if folder is not None:
        with (folder / "progress.log").open("a") as log:
            log.write(f"{text}\n")


def line(state: State, behind: int | None) -> str:
    victims = Counter(kill.victim for kill in state.killed)
    killed = ", ".join(f"{name} {number}" for name, number in sorted(victims.items()))
    minutes, seconds = divmod(int(state.now_s), 60)
    return (
        f"{minutes}:{seconds:02} | {state.produced:,} of {state.events:,} records"
        f" | {'no broker' if behind is None else f'{behind:,} behind'}"
        f" | {len(state.killed)} of {state.kills} kills ({killed})"
        f" | {len(state.rebalances)} rebalances, {len(state.swaps)} swaps, {len(state.faults)} faults"
    )


async def wait_caught_up(settings: Settings, timeout_s: float) -> None:
    """Wait until the group has committed every record."""
    behind = Behind(settings)
    try:
        async with asyncio.timeout(timeout_s):
            while await behind.read() != 0:
                await asyncio.sleep(0.5)
    finally:
        await behind.close()
