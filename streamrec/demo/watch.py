"""Watch the daemon and the retraining: metrics, hit rates, the model swap."""

from __future__ import annotations

import asyncio
import bisect
import math
import time

import aiohttp

from streamrec.demo.feed import Feeder
from streamrec.demo.hits import HitCounter
from streamrec.demo.retrain import Retraining
from streamrec.demo.screen import Screen
from streamrec.demo.snapshot import MAX_HIT_RATES, Snapshot, Swap
from streamrec.local.daemon import DaemonProcess
from streamrec.metrics import quantile
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import published

SCREEN_EVERY_S = 0.25
AROUND_SWAP_S = 1.0  # before and after


class Latencies:
    """Scraped histograms of click to list, which give the latencies of any period."""

    def __init__(self) -> None:
        self._at_s: list[float] = []
        self._scraped: list[list[tuple[float, float]]] = []

    def add(self, at_s: float, cumulative: list[tuple[float, float]]) -> None:
        """Add a histogram: (upper bound, observations up to it), by bound."""
        self._at_s.append(at_s)
        self._scraped.append(cumulative)

    def p99_ms(self, from_s: float, until_s: float) -> float | None:
        """Return the p99 of a period, rounded outward to scrapes; None if it had no click."""
        if not self._scraped:
            return None
        first = bisect.bisect_right(self._at_s, from_s) - 1
        last = min(bisect.bisect_left(self._at_s, until_s), len(self._at_s) - 1)
        before = self._scraped[first] if first >= 0 else [(bound, 0.0) for bound, _ in self._scraped[last]]
        p99 = quantile([(b, n - m) for (b, n), (_, m) in zip(self._scraped[last], before, strict=True)], 0.99)
        return None if p99 is None else p99 * 1000


class Watcher:
    """Updates a snapshot and draws it until cancelled."""

    def __init__(
        self, now: Snapshot, feeder: Feeder, hits: HitCounter, daemon: DaemonProcess, retraining: Retraining
    ) -> None:
        self._now = now
        self._feeder = feeder
        self._hits = hits
        self._daemon = daemon
        self._retraining = retraining
        self._latencies = Latencies()
        self._version, self._swapped_s = "", math.inf
        self._counts_at_swap = self._counts_at_point = (0, 0, 0)

    async def run(self, redis: RedisClient, http: aiohttp.ClientSession, screen: Screen) -> None:
        """Update and draw the snapshot regularly."""
        while True:
            await self.read_metrics(http, screen)
            self.update_retraining(screen)
            self._update_hit_rates()
            await self._read_list(redis)
            screen.draw(self._now)
            await asyncio.sleep(SCREEN_EVERY_S)

    async def read_metrics(self, http: aiohttp.ClientSession, screen: Screen) -> None:
        """Read the daemon's metrics; a daemon that does not answer changes nothing."""
        reading = await self._daemon.read(http)
        if reading is None:
            return
        now, histogram = self._now, reading.click_to_published
        now.applied, now.dead_letters, now.lag_records = reading.applied, reading.dead_letters, reading.lag_records
        if reading.version:
            self._update_version(reading.version, screen)
        self._latencies.add(reading.at_s, histogram)
        p50, p99 = quantile(histogram, 0.5), quantile(histogram, 0.99)
        now.p50_ms = None if p50 is None else p50 * 1000
        now.p99_ms = None if p99 is None else p99 * 1000

    def update_retraining(self, screen: Screen) -> None:
        """Update the result of the retraining, and the figures since the swap."""
        now, retraining = self._now, self._retraining
        now.retraining_s = time.monotonic() - retraining.started_s if retraining.running else None
        if now.round is None and (result := retraining.result()):
            now.round = result
            if not result.promoted:
                screen.note(f"{now.sent:,} clicks: no new model this time: {result.reason}")
        if now.swap:
            now.swap.after = self._hits.rates(self._counts_at_swap)
            phases = {
                "before": (-math.inf, retraining.started_s),
                "training": (retraining.started_s, min(retraining.ended_s, self._swapped_s)),
                "swap": (self._swapped_s - AROUND_SWAP_S, self._swapped_s + AROUND_SWAP_S),
            }
            now.swap.p99_ms = {name: self._latencies.p99_ms(*phase) for name, phase in phases.items()}

    def _update_version(self, version: str, screen: Screen) -> None:
        before, now = self._hits.rates(), self._now
        if self._version not in ("", version) and before:
            self._swapped_s, self._counts_at_swap = time.monotonic(), self._hits.counts()
            now.swap = Swap(now.sent, self._version, version, before, len(now.hit_rates_over_time))
            screen.note(f"{now.sent:,} clicks: model {version} replaces {self._version}")
        self._version = version

    def _update_hit_rates(self) -> None:
        now = self._now
        if rates := self._hits.rates():
            now.hit_rate, now.popularity_hit_rate = rates.model, rates.popularity
        newest = self._hits.rates(self._counts_at_point)
        if newest and newest.clicks >= now.total / MAX_HIT_RATES:
            now.hit_rates_over_time.append(newest.model)
            self._counts_at_point = self._hits.counts()

    async def _read_list(self, redis: RedisClient) -> None:
        """Read the list of the followed user; user, clicks and list change together."""
        now, user = self._now, self._feeder.followed_user
        async for _, value in published(redis, [user] if user else []):
            now.user_id, now.clicks = user, list(self._feeder.clicks[user])
            now.listed = value.items if value else []
            now.listed_after = value.n if value else 0
            now.listed_ago_s = time.time() - value.published_ts_ms / 1000 if value else 0.0
