"""The live part of the demo: feed the clicks, watch the daemon, wait for the new model."""

from __future__ import annotations

import asyncio
import contextlib
import time

import aiohttp

from streamrec.demo.data import DemoData
from streamrec.demo.feed import Feeder
from streamrec.demo.hits import HitCounter, hit_rate_of
from streamrec.demo.retrain import Retraining, Round
from streamrec.demo.screen import Screen
from streamrec.demo.snapshot import Snapshot
from streamrec.demo.watch import Watcher
from streamrec.errors import DaemonEnded, StreamrecError
from streamrec.health import Loops
from streamrec.kafka.topics import ensure_topics
from streamrec.local.daemon import DaemonProcess
from streamrec.metrics import ProcessMetrics
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings
from streamrec.stop_signals import stop_signals
from streamrec.supervisor import Supervisor

PROCESS_TIMEOUT_S = 30.0  # for the clicks that wait after the last one was sent
SWAP_TIMEOUT_S = 30.0  # after the last click, if the new model is not serving yet


class LiveReplay:
    """Replays the live clicks once; ``now`` is the state."""

    def __init__(
        self,
        settings: Settings,
        data: DemoData,
        rate_per_s: float,
        screen: Screen,
        daemon: DaemonProcess,
        retraining: Retraining,
    ) -> None:
        self._settings = settings
        self._rate_per_s = rate_per_s
        self._screen = screen
        self._daemon = daemon
        self._retraining = retraining
        self.now = Snapshot(total=len(data.live))
        hits = HitCounter(data.past, settings.lists.filter_seen)
        self._feeder = Feeder(settings, data.live, hits, self.now, self._start_retraining)
        self._watcher = Watcher(self.now, self._feeder, hits, daemon, retraining)

    async def run(self) -> bool:
        """Replay to the end (True) or until a signal (False)."""
        stop = asyncio.Event()
        with stop_signals(stop, lambda _: None):
            async with RedisClient(self._settings.redis) as redis, aiohttp.ClientSession() as http:
                replay = asyncio.create_task(self._replay(redis, http))
                stopped = asyncio.create_task(stop.wait())
                await asyncio.wait((replay, stopped), return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                if replay.done():
                    await replay
                    return True
                replay.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await replay
                return False

    async def _replay(self, redis: RedisClient, http: aiohttp.ClientSession) -> None:
        now, kafka = self.now, self._settings.kafka
        await self._daemon.wait_ready(http)
        self._screen.say(f"see it live, and click yourself: {self._daemon.address}")
        await ensure_topics(kafka, (kafka.topic,))
        supervisor = Supervisor(ProcessMetrics(), Loops())
        watching = asyncio.create_task(
            supervisor.repeat("watch", lambda: self._watcher.run(redis, http, self._screen), fatal=(DaemonEnded,))
        )
        try:
            started_s = time.monotonic()
            await self._feeder.run(redis, self._rate_per_s, started_s)
            await self._wait_processed(http)
            now.seconds = time.monotonic() - started_s
            now.events_per_s = now.applied / now.seconds
            await self._wait_swap(watching)
            if now.swap and self._feeder.after_swap:
                now.swap.old_model_after = await asyncio.to_thread(
                    hit_rate_of, self._settings, now.swap.old_version, self._feeder.after_swap
                )
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    def _start_retraining(self) -> None:
        self._retraining.start()
        self._screen.note(f"{self.now.sent:,} clicks: retraining starts beside the daemon, with these clicks too")

    async def _wait_processed(self, http: aiohttp.ClientSession) -> None:
        """Wait until the daemon has processed all clicks.

        Raises:
            StreamrecError: it takes too long.
        """
        now, deadline = self.now, time.monotonic() + PROCESS_TIMEOUT_S
        while now.applied + now.dead_letters < now.sent:
            await self._watcher.read_metrics(http, self._screen)
            if time.monotonic() > deadline:
                raise StreamrecError(
                    f"only {now.applied:,} of {now.sent:,} clicks were processed within {PROCESS_TIMEOUT_S:.0f} s"
                )
            await asyncio.sleep(0.05)

    async def _wait_swap(self, watching: asyncio.Task[None]) -> None:
        """Wait for the new model: a retraining may take longer than the clicks."""
        now, deadline = self.now, time.monotonic() + SWAP_TIMEOUT_S
        if self._retraining.running:
            self._screen.note("all clicks are processed; waiting for the new model")
        while not watching.done():  # it ends if the daemon does
            self._watcher.update_retraining(self._screen)
            if not self._retraining.running and (now.swap or not (now.round and now.round.promoted)):
                return
            if time.monotonic() > deadline:
                now.round = Round(False, f"it was not ready {SWAP_TIMEOUT_S:.0f} s after the last click")
                return
            await asyncio.sleep(0.1)
