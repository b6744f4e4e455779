"""Liveness and readiness of the daemon.

The daemon is alive if its loop ticks and, while records wait, commits advance. During a rebalance, or while Kafka or
Redis is unreachable or takes no writes, it is alive too, for however long: a restart would not help, and would cause
another rebalance. So it is while it starts, and waits for what it needs. Waiting is no longer right if Redis takes
writes, but the batch gets no answer: then only this process's connections or state can be the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Loops:
    """The loops of a process that fail now (supervisor.py). Reasons are in the log: everybody may read /readyz."""

    failing: set[str] = field(default_factory=set)

    def remark(self) -> str | None:
        """Return which loops fail; None if all work."""
        return "; ".join(f"the loop {name} fails, and the log says why" for name in sorted(self.failing)) or None


@dataclass
class WorkerHealth:
    """Health of the retrain worker: a restart mends nothing, and it is ready while all its loops work."""

    loops: Loops = field(default_factory=Loops)

    def not_alive(self) -> None:
        """Return None: the worker is alive."""

    def not_ready(self) -> str | None:
        """Return what fails; None if all works."""
        return self.loops.remark()


@dataclass
class Health:
    """State that the parts of the daemon update; all times are monotonic seconds.

    A loop beside the clicks that fails does not make the daemon unready: lists are published without it.
    """

    timeout_s: float
    rebalance_grace_s: float
    now_s: Callable[[], float] = time.monotonic
    joined: bool = False
    model_warm: bool = False
    waits_for: str = ""
    stopping: bool = False
    kafka_answers: bool = True  # BrokerWatch alone sets this
    kafka_takes_commits: bool = True  # Positions alone sets this and the next one
    positions_known: bool = True  # of the assigned partitions
    redis_answers: bool = True  # it takes writes; RedisWatch alone sets this and the next two
    redis_refuses: bool = False  # it answers, but takes no writes
    redis_fails_batch: bool = False  # it takes writes, and the batch gets no answer
    schemas_known: bool = True  # ClickConsumer alone sets this; False: records wait for the schema registry
    lag_records: int = 0
    rebalancing_since_s: float | None = None
    last_tick_s: float = field(default=0.0)
    last_progress_s: float = field(default=0.0)
    loops: Loops = field(default_factory=Loops)

    def __post_init__(self) -> None:
        self.tick()
        self.progressed()

    def tick(self) -> None:
        """Record that the loop has polled."""
        self.last_tick_s = self.now_s()

    def progressed(self) -> None:
        """Record that offsets were committed, or that there was nothing to commit."""
        self.last_progress_s = self.now_s()

    def wait_for(self, name: str) -> None:
        """Record what the daemon waits for to start; an empty text: it has come."""
        self.waits_for = name
        self.tick()
        self.progressed()

    def not_alive(self) -> str | None:
        """Return why a restart would help; None if the daemon is alive."""
        if self.waits_for or not self.model_warm:  # no loop polls yet
            return None
        now = self.now_s()
        if self.rebalancing_since_s is not None and now - self.rebalancing_since_s < self.rebalance_grace_s:
            return None
        silent = now - self.last_tick_s
        if silent > self.timeout_s and self.kafka_answers:  # a poll waits without a limit for a group to form
            return f"the loop has not polled for {silent:.0f} s"
        stuck = now - self.last_progress_s
        kafka_works = self.kafka_answers and self.kafka_takes_commits and self.schemas_known
        if stuck > self.timeout_s and kafka_works and self.redis_fails_batch:
            return f"Redis takes writes, but the batch gets no answer for {stuck:.0f} s"
        if stuck > self.timeout_s and self.lag_records and kafka_works and self.redis_answers:
            return f"{self.lag_records} records wait, but nothing was committed for {stuck:.0f} s"
        return None

    def not_ready(self) -> str | None:
        """Return why the daemon cannot publish new lists now; None if it is ready."""
        if self.stopping:
            return "shutting down"
        if self.waits_for:
            return f"waiting for {self.waits_for}; the log says why"
        if not self.model_warm:
            return "the model is not warm yet"
        if not self.joined:
            return "not joined to the consumer group yet"
        if not self.redis_answers:
            return "Redis takes no writes; the log says why" if self.redis_refuses else "Redis does not answer"
        if not self.kafka_answers:
            return "Kafka does not answer"
        if not self.kafka_takes_commits:
            return "Kafka takes no commits; the log says why"
        if not self.positions_known:
            return "the positions of its partitions are not known yet"
        if not self.schemas_known:
            return "waiting for a schema of the events; the log says why"
        return None
