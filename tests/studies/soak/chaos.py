"""SIGKILLs in an order that the seed determines, rebalances and model swaps, while records are produced.

A victim gets SIGKILL only when it is up again after the last one; several may be down at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator

from streamrec.errors import StreamrecError

from studies.soak.plant import MAX_LEN, START_S, Member, Plant, up
from studies.soak.state import Kill
from support.registry import publish
from support.waiting import eventually

VICTIMS = {"daemon": 0.56, "broker": 0.12, "Redis primary": 0.18, "retrain worker": 0.14}
REBALANCE_EVERY_S, THIRD_FOR_S, GONE_FOR_S = (15, 45), (2, 10), (0, 5)
SWAP_EVERY_S = 60.0
PROMOTED_AFTER_S = (0.2, 1.5)  # the time in which there is no primary


class Chaos:
    """Disturbs a plant until ``enough``."""

    def __init__(self, plant: Plant, enough: Callable[[], bool]) -> None:
        self._plant, self._enough, self._state = plant, enough, plant.state
        self._broker, self._redis = asyncio.Lock(), asyncio.Lock()
        self._applied_at = 0.0  # monotonic
        self._last: dict[int, float] = {}

    async def run(self) -> None:
        """Disturb; return when each victim has recovered."""
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(task()) for task in (self._watch_applied, self._watch_ends, self._swap)]
            rebalances = group.create_task(self._rebalance())
            async with asyncio.TaskGroup() as recoveries:
                await self._kill(recoveries)
            await rebalances
            for task in beside:
                task.cancel()

    async def _kill(self, recoveries: asyncio.TaskGroup) -> None:
        for pause_s, name, rng in self._plan():
            await asyncio.sleep(pause_s)
            if self._enough():
                return
            if name == "broker":
                await self._broker.acquire()
                recoveries.create_task(self._kill_broker())
            elif name == "Redis primary":
                await self._redis.acquire()
                recoveries.create_task(self._kill_redis(rng))
            else:
                member = self._plant.worker if name == "retrain worker" else rng.choice(self._plant.daemons)
                await member.lock.acquire()
                recoveries.create_task(self._kill_member(member, name))

    def _plan(self) -> Iterator[tuple[float, str, random.Random]]:
        while True:
            rng = random.Random(f"kill {self._state.seed} {len(self._state.killed)}")
            pause_s = rng.uniform(0, 2 * self._state.kill_every_s)
            yield pause_s, rng.choices(list(VICTIMS), list(VICTIMS.values()))[0], rng

    def _killed(self, name: str) -> Kill:
        self._state.killed.append(Kill(name, self._state.now_s))
        self._state.save(self._plant.folder)
        return self._state.killed[-1]

    async def _recovered(self, kill: Kill, applied: bool = True) -> None:
        """Note the time until clicks are applied after the victim is up."""
        up_at = time.monotonic()

        async def is_applied() -> bool:
            return self._applied_at > up_at or not applied

        await eventually(is_applied, START_S)
        kill.recovered_s = round(self._state.now_s - kill.at_s, 2)

    async def _kill_member(self, member: Member, name: str) -> None:
        try:
            if member.running is not None:
                kill = self._killed(name)
                member.end()
                await member.start_ready()
                await self._recovered(kill, applied=name == "daemon")
        finally:
            member.lock.release()

    async def _kill_broker(self) -> None:
        try:
            kill = self._killed("broker")
            self._plant.kafka.kill()
            self._plant.kafka.launch()
            await up(self._plant.kafka)
            await self._recovered(kill)
        finally:
            self._broker.release()

    async def _kill_redis(self, rng: random.Random) -> None:
        try:
            kill = self._killed("Redis primary")
            self._plant.servers[self._state.primary].kill()
            await asyncio.sleep(rng.uniform(*PROMOTED_AFTER_S))
            await self._plant.promote_replica()
            await self._recovered(kill)
        finally:
            self._redis.release()

    async def _rebalance(self) -> None:
        while True:
            rng = random.Random(f"rebalance {self._state.seed} {len(self._state.rebalances)}")
            await asyncio.sleep(rng.uniform(*REBALANCE_EVERY_S))
            if self._enough():
                return
            leaves = rng.random() < 0.5
            member = rng.choice(self._plant.daemons) if leaves else self._plant.third
            async with member.lock:
                self._state.rebalances.append(self._state.now_s)
                if leaves:
                    await member.stop()
                    await asyncio.sleep(rng.uniform(*GONE_FOR_S))
                    await member.start_ready()
                else:
                    await member.start_ready()
                    await asyncio.sleep(rng.uniform(*THIRD_FOR_S))
                    await member.stop()

    async def _swap(self) -> None:
        while True:
            await asyncio.sleep(SWAP_EVERY_S)
            registry, seed = self._plant.registry, len(self._state.swaps) + 1
            try:
                version = await asyncio.to_thread(publish, registry, seed, range(50), MAX_LEN)
                await asyncio.to_thread(registry.promote, version, "a swap of the soak")
            except StreamrecError as error:  # a round changes the champion at the moment
                self._plant.fault(f"no swap: {error}")
            else:
                self._state.swaps.append(self._state.now_s)

    async def _watch_applied(self) -> None:
        """Note when clicks are applied, by any daemon."""
        while True:
            for member in (*self._plant.daemons, self._plant.third):
                pid, applied = await member.applied()
                if applied > self._last.get(pid, 0.0):
                    self._applied_at, self._last[pid] = time.monotonic(), applied
            await asyncio.sleep(0.1)

    async def _watch_ends(self) -> None:
        """Start again what ended by itself, and note it as a fault."""
        while True:
            await asyncio.sleep(0.5)
            for member in (*self._plant.daemons, self._plant.worker):
                if not member.lock.locked() and member.ended:
                    async with member.lock:
                        self._plant.fault(f"{member.name} ended by itself: {member.end()}")
                        await member.start_ready()
