"""Feed daemons with clicks, and read throughput and latency from their /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp

from streamrec.errors import StreamrecError
from streamrec.local.daemon import DaemonProcess, Reading, environment, running_daemon
from streamrec.metrics import quantile
from streamrec.settings import Settings

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999}
POLL_S, MAX_POLL_S = 0.1, 1.0
STUCK_S = 60.0
WARM_UP_S = 1.0  # of the stream: at first producer and broker stall once for about 0.1 s
FEEDER = ("-m", "streamrec.bench.feeder")


@contextlib.asynccontextmanager
async def metered(daemons: Sequence[Settings], program: str, users: int, items: Path) -> AsyncIterator[Meter]:
    """Run a daemon for each of the settings, all on one topic, and yield their meter.

    Args:
        program: the module of the command line.
        users: number of users who click.
        items: JSON file with the ids of the items that they click.
    """
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(running_daemon(settings, (program, "serve"))) for settings in daemons]
        async with aiohttp.ClientSession() as http:
            for daemon in running:
                await daemon.wait_ready(http)
            yield Meter(daemons[0], running, http, (str(users), str(items)))


class Meter:
    """Measures daemons that share one topic."""

    def __init__(
        self,
        settings: Settings,
        daemons: Sequence[DaemonProcess],
        http: aiohttp.ClientSession,
        users_and_items: tuple[str, str],
    ) -> None:
        self._settings, self._daemons, self._http = settings, daemons, http
        self._users_and_items = users_and_items

    async def throughput(self, events: int) -> float:
        """Send events as fast as possible; return clicks per second from the first published list to the last."""
        idle = now = await self._read()
        end = now.published + events
        async with self._feeding(0.0, events) as feeder:
            while now.published == idle.published and feeder.returncode is None:  # the feeder is starting
                idle = now
                await asyncio.sleep(POLL_S)
                now = await self._read()
            last = await self._wait_published(end)
        return events / (last.at_s - idle.at_s)

    async def latencies_ms(self, rate_per_s: float, events: int) -> dict[str, float]:
        """Send events at a rate; return quantiles of click to list, the rate, and the lag when the feeder ended."""
        warm_up = round(rate_per_s * WARM_UP_S)
        end = (await self._read()).published + warm_up + events
        async with self._feeding(rate_per_s, warm_up + events) as feeder:
            before = await self._wait_published(end - events)
            await feeder.wait()
            lag = end - (await self._read()).published
            after = await self._wait_published(end)
        counts = [
            (bound, now - then)
            for (bound, now), (_, then) in zip(after.click_to_published, before.click_to_published, strict=True)
        ]
        found = {name: quantile(counts, q) for name, q in QUANTILES.items()}
        latencies = {name: seconds * 1000 for name, seconds in found.items() if seconds is not None}
        return {"events_per_s": rate_per_s} | latencies | {"lag": lag}

    @contextlib.asynccontextmanager
    async def _feeding(self, rate_per_s: float, events: int) -> AsyncIterator[asyncio.subprocess.Process]:
        arguments = (str(rate_per_s), str(events), *self._users_and_items)
        feeder = await asyncio.create_subprocess_exec(
            sys.executable, *FEEDER, *arguments, env=environment(self._settings), stdin=subprocess.DEVNULL
        )
        try:
            yield feeder
            if await feeder.wait():
                raise StreamrecError("the feeder failed; its output is above")
        finally:
            if feeder.returncode is None:
                feeder.kill()
                await feeder.wait()

    async def _wait_published(self, clicks: int) -> Reading:
        """Wait until the lists of this number of clicks are published.

        Reads are rare until the end is near: each takes milliseconds from the measured daemon.
        """
        first = last = await self._read()
        while last.published < clicks:
            rate_per_s = (last.published - first.published) / max(last.at_s - first.at_s, POLL_S)
            left_s = (clicks - last.published) / rate_per_s if rate_per_s else POLL_S
            await asyncio.sleep(min(max(left_s / 2, POLL_S), MAX_POLL_S))
            reading = await self._read()
            if reading.published > last.published:
                last = reading
            elif reading.at_s - last.at_s > STUCK_S:
                raise StreamrecError(
                    f"the daemon processed no click for {STUCK_S:.0f} s; {clicks - last.published} wait"
                )
        return last

    async def _read(self) -> Reading:
        """Return the sum over all daemons."""
        readings = [await self._read_one(daemon) for daemon in self._daemons]
        histograms = zip(*(reading.click_to_published for reading in readings), strict=True)
        return Reading(
            readings[-1].at_s,
            click_to_published=[(buckets[0][0], sum(count for _, count in buckets)) for buckets in histograms],
        )

    async def _read_one(self, daemon: DaemonProcess) -> Reading:
        while (reading := await daemon.read(self._http)) is None:
            await asyncio.sleep(POLL_S)
        return reading
