"""The processes of a soak, with their data in its folder: broker, two Redis servers, daemons, worker of retraining.

The daemons know Redis by one address. It leads to the primary; if that gets SIGKILL, its replica is promoted, the
address leads there, and the former primary returns as the replica. So a SIGKILL loses no acknowledged write.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from streamrec.errors import EmbeddedError
from streamrec.kafka.topics import ensure_topics
from streamrec.local.apache_kafka import apache_kafka, kafka_home
from streamrec.local.process import ServerProcess
from streamrec.local.servers import answers_ping, redis_command
from streamrec.registry import Registry
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings

from studies.soak.state import PARTITIONS, State
from support.daemon_process import EVENTS, Daemon, Retrain
from support.redis_cluster import node
from support.registry import publish
from support.relay import Relay
from support.waiting import eventually

START_S = 180.0  # longest time until a process is up, while others are killed
MAX_LEN = 8
SETTINGS: dict[str, Any] = {
    "kafka_partitions": PARTITIONS,
    "kafka_max_batch": 64,
    "kafka_session_timeout_s": 3,
    "redis_wait_replicas": 1,
    "sequences_max_len": MAX_LEN,
    "sequences_session_gap_s": 3600,
    "inference_cache_bytes": 100_000,
    "registry_poll_s": 2,
    "registry_keep_versions": 100_000,  # the verdict computes the lists of each
    "archive_flush_s": 2,
    "model_max_len": MAX_LEN,
    "model_hidden_units": 16,
    "model_num_blocks": 1,
    "train_epochs": 1,
    "retrain_update_epochs": 1,
    "retrain_http_port": 0,
    "http_port": 0,
}


class Member:
    """A daemon or the worker of retraining: one process after the other, which is ready or is killed."""

    def __init__(self, name: str, settings: Settings, plant: Plant, retrains: bool = False) -> None:
        self.name = name
        self.lock = asyncio.Lock()  # of those who kill, stop and start it
        self._settings, self._plant, self._retrains = settings, plant, retrains
        self.running: Daemon | Retrain | None = None

    def start(self) -> None:
        if self._retrains:
            self.running = Retrain(self._settings, "--every", "60s", "--min-new-events", "1000")
        else:
            self.running = Daemon(self._settings)

    async def start_ready(self) -> None:
        """Start it until it is ready; one that ends by itself is a fault, and is started again."""
        deadline = time.monotonic() + START_S
        self.start()
        while not await self.is_ready():
            if self.ended:
                self._plant.fault(f"{self.name} ended by itself: {self.end()}")
                self.start()
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self.name} is not ready after {START_S:.0f} s: {self.last_lines()}")
            await asyncio.sleep(0.1)

    async def is_ready(self) -> bool:
        if self.running is None or self.ended or "http=" not in self.running.output:
            return False
        return (await self.running.get("/readyz"))[0] == 200

    @property
    def ended(self) -> bool:
        return self.running is not None and self.running.process.poll() is not None

    def end(self) -> str:
        """Send SIGKILL if it still runs, and store its log; return its exit status and last lines."""
        assert self.running is not None
        self.running.process.kill()
        status, output = self.running.process.wait(), self.running.output
        lines = self.last_lines()
        with (self._plant.folder / f"{self.name}.log").open("a") as log:
            log.write(f"{output}--- exit {status} after {self._plant.state.now_s:.0f} s\n")
        if "Traceback" in output:
            self._plant.fault(f"a traceback in {self.name}.log")
        self.running.kill()
        self.running = None
        return f"exit {status}: {lines}"

    async def stop(self) -> None:
        """Send SIGTERM, and wait for its end."""
        assert self.running is not None
        self.running.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(self.running.process.wait, START_S)
        ended = self.end()
        if status:
            self._plant.fault(f"{self.name} was stopped: {ended}")

    def last_lines(self) -> str:
        return "" if self.running is None else " | ".join(self.running.output.splitlines()[-3:])

    async def applied(self) -> tuple[int, float]:
        """Return its process id, and the number of clicks that this process has applied."""
        running = self.running
        if not isinstance(running, Daemon) or self.ended or "http=" not in running.output:
            return 0, 0.0
        return running.process.pid, await running.metric(EVENTS, outcome="applied")


class Plant:
    """All processes. Redis: ``servers[state.primary]`` is the primary, the other one its replica."""

    def __init__(self, folder: Path, state: State) -> None:
        home = kafka_home(os.environ)
        if home is None:
            raise EmbeddedError("a soak needs Apache Kafka: set KAFKA_HOME to an unpacked one")
        self.folder, self.state = folder, state
        self.kafka = apache_kafka(home, folder / "kafka")
        self.servers = [self._redis(number) for number in range(2)]
        self.relay = Relay(self.servers[state.primary])
        self.registry = Registry(folder / "registry")
        self.members: list[Member] = []

    def _redis(self, number: int) -> ServerProcess:
        data = self.folder / f"redis-{number}"
        data.mkdir(exist_ok=True)

        def command(port: int) -> list[str]:
            primary = self.servers[self.state.primary]
            role = [] if number == self.state.primary else ["--replicaof", "127.0.0.1", str(primary.port)]
            # "no" writes before each answer, so that a SIGKILL of this program loses nothing; "everysec" may wait
            return [*redis_command(port, data), "--appendfsync", "no", "--repl-diskless-sync-delay", "0", *role]

        return ServerProcess("Redis", data / "log", command, answers_ping)

    async def __aenter__(self) -> Plant:
        # removed with the folder: logs of processes that this program could not end
        tempfile.tempdir = str(self.folder / "tmp")
        Path(tempfile.tempdir).mkdir(exist_ok=True)
        self.kafka.launch()
        for server in self.servers:
            server.launch()
        try:
            await self.relay.__aenter__()
            for server in (self.kafka, *self.servers):
                await up(server)
            await eventually(self.in_step, START_S)
            await self._start_members()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _start_members(self) -> None:
        where = {
            "kafka_bootstrap_servers": f"127.0.0.1:{self.kafka.port}",
            "redis_url": f"redis://127.0.0.1:{self.relay.port}/0",
            "registry_dir": self.folder / "registry",
            "archive_dir": self.folder / "archive",
        }
        self.settings = load_settings(flags=SETTINGS | where)
        await ensure_topics(self.settings.kafka, (self.settings.kafka.topic, self.settings.kafka.dead_letters))
        if not self.registry.store.read("champion.json"):
            self.registry.promote(publish(self.registry, 0, max_len=MAX_LEN), "the first")
        self.daemons = [Member(f"daemon-{number}", self.settings, self) for number in range(2)]
        self.third = Member("daemon-2", self.settings, self)  # joins and leaves
        self.worker = Member("retrain", self.settings, self, retrains=True)
        self.members = [*self.daemons, self.third, self.worker]
        for member in (*self.daemons, self.worker):
            await member.start_ready()

    async def __aexit__(self, *_: object) -> None:
        for member in self.members:
            if member.running is not None:
                member.end()
        self.kafka.stop()
        for server in self.servers:
            server.stop()
        await self.relay.__aexit__()

    async def in_step(self) -> bool:
        """Return whether the replica has every write, and all of them in its file."""
        async with node(self.servers[1 - self.state.primary]) as client:
            with contextlib.suppress(Exception):  # it starts, or loads
                found = await client.info()
                rewriting = found["aof_rewrite_in_progress"] or found["aof_rewrite_scheduled"]
                return bool(found.get("master_link_status") == "up" and not rewriting)
        return False

    async def promote_replica(self) -> None:
        """Make the replica the primary, after the SIGKILL of the former one, which then returns as its replica."""
        former, heir = self.servers[self.state.primary], self.servers[1 - self.state.primary]
        async with node(heir) as client:
            await client.execute_command("REPLICAOF", "NO", "ONE")
        self.state.primary = 1 - self.state.primary
        self.state.save(self.folder)
        self.relay.leads_to = heir
        former.launch()
        await eventually(self.in_step, START_S)

    def fault(self, text: str) -> None:
        self.state.faults.append(f"after {self.state.now_s:.0f} s: {text}")


async def up(server: ServerProcess) -> None:
    """Wait until a launched server answers."""

    async def answers() -> bool:
        if server.process is None or server.process.poll() is not None:
            raise EmbeddedError(f"{server.name} ended")
        return await asyncio.to_thread(server.is_up)

    await eventually(answers, START_S)
