"""A batch that waits is woken by a rebalance."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from streamrec.errors import BatchAbandoned, RedisUnavailable
from streamrec.health import Health
from streamrec.schemas import EventBatch
from streamrec.serving import worker
from streamrec.serving.worker import Worker


class NoWatch:
    def batch_waits(self, error: RedisUnavailable) -> None: ...

    def batch_abandoned(self) -> None: ...


class NoRedis:
    async def append(self, *_: Any) -> None:
        raise RedisUnavailable("Redis is down")


@dataclass
class Parts:
    health: Health = field(default_factory=lambda: Health(60, 60))
    watch: NoWatch = field(default_factory=NoWatch)
    store: NoRedis = field(default_factory=NoRedis)


@dataclass
class ConsumerInALongRebalance:
    """Real groups end a rebalance too fast to tell a pause that was cut short from one that was nearly over."""

    rebalance: asyncio.Event = field(default_factory=asyncio.Event)
    assignment: int = 0

    @property
    def rebalancing(self) -> bool:
        return self.rebalance.is_set()

    async def keep_alive(self) -> None:
        asyncio.get_running_loop().call_later(0.05, self.rebalance.set)


async def test_a_rebalance_ends_the_pause_of_a_batch_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FIRST_PAUSE_S", 3_600.0)
    serving = Worker(cast(Any, ConsumerInALongRebalance()), cast(Any, Parts()), cast(Any, None))
    async with asyncio.timeout(30):
        with pytest.raises(BatchAbandoned):
            await serving.handle(EventBatch())
