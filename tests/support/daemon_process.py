"""Run streamrec processes, and read their output and metrics."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from streamrec.local.daemon import environment
from streamrec.redis.client import RedisClient
from streamrec.serving.inspection import published
from streamrec.settings import Settings

from support.preloaded import fork_server, program, run_command
from support.waiting import eventually

EVENTS = "streamrec_events_total"


class Daemon:
    """A `streamrec serve` process under given settings."""

    def __init__(
        self, settings: Settings, arguments: tuple[str, ...] = (), command: tuple[str, ...] | None = None
    ) -> None:
        self.settings = settings
        self._log = tempfile.NamedTemporaryFile(prefix="daemon-", suffix=".log", delete=False)  # noqa: SIM115
        module, *rest = *(command or (program(), "serve")), *arguments
        log = self._log.fileno()
        self.process = fork_server().start(module, rest, environment(settings), log, log)
        self._log.close()

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    @property
    def http(self) -> str:
        found = re.search(r"http=(http://\S+)", self.output)
        assert found, self.output
        return found.group(1)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        await eventually(self._ready, timeout_s)

    async def _ready(self) -> bool:
        assert self.process.poll() is None, f"exit {self.process.returncode}: {self.output}"
        return "http=" in self.output and (await self.get("/readyz"))[0] == 200

    async def get(self, path: str) -> tuple[int, str]:
        """Return HTTP status and text."""
        return await asyncio.to_thread(get, self.http + path)

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        _, text = await self.get("/metrics")
        total = 0.0
        for line in text.splitlines():
            if re.match(rf"{name}(\{{|\s)", line) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    async def wait_handled(self, events: int = 1, timeout_s: float = 60.0) -> None:
        """Wait until a number of events were applied or skipped as replays."""

        async def enough() -> bool:
            assert self.process.poll() is None, f"exit {self.process.returncode}: {self.output}"
            if "http=" not in self.output:
                return False
            applied, replayed = [await self.metric(EVENTS, outcome=outcome) for outcome in ("applied", "replayed")]
            return applied + replayed >= events

        await eventually(enough, timeout_s, every_s=0.02)

    async def wait_more(self, events: int) -> None:
        """Wait until a number of further events were applied."""
        await self.wait_handled(int(await self.metric(EVENTS, outcome="applied")) + events)

    async def has_logged(self, text: str) -> bool:
        assert self.process.poll() is None, f"exit {self.process.returncode}: {self.output}"
        return text in self.output

    def lines(self, *levels: str) -> list[str]:
        """Return the log lines of these levels."""
        return [line for line in self.output.splitlines() if line[25:32].strip() in levels]

    async def wait_exit(self, timeout_s: float = 60.0) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process has ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if not os.environ.get("KEEP_DAEMON_LOGS"):
            Path(self._log.name).unlink(missing_ok=True)


class Retrain:
    """A `streamrec retrain` process.

    Args:
        killed_at_step: it gets SIGKILL before it changes a folder for this time.
    """

    def __init__(self, settings: Settings, *arguments: str, killed_at_step: int | None = None) -> None:
        module, command = program(), ("retrain", *arguments)
        if killed_at_step is not None:
            module, command = "support.killed_at_step", (str(killed_at_step), module, *command)
        with tempfile.NamedTemporaryFile(prefix="retrain-", suffix=".log", delete=False) as log:
            self._log = Path(log.name)
            self.process = fork_server().start(module, command, environment(settings), log.fileno(), log.fileno())

    @property
    def output(self) -> str:
        return self._log.read_text()

    async def get(self, path: str) -> tuple[int, str]:
        """Return HTTP status and text of the worker's port."""
        found = re.search(r"http=(http://\S+)", self.output)
        assert found, self.output
        return await asyncio.to_thread(get, found.group(1) + path)

    async def says(self, text: str) -> None:
        async def said() -> bool:
            assert self.process.poll() is None or text in self.output, self.output
            return text in self.output

        await eventually(said, every_s=0.01)

    async def ends(self, status: int = 0) -> str:
        found = await asyncio.to_thread(self.process.wait, 100)
        assert found == status, self.output
        assert "Traceback" not in self.output
        return self.output

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def models(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `streamrec models ...` as an operator does."""
    return run_command(settings, "models", *arguments)


async def versions_published(settings: Settings) -> dict[str, str]:
    async with RedisClient(settings.redis) as redis:
        lists = published(redis, None)
        return {user: value.model async for user, value in lists if value}


async def serves(daemon: Daemon, version: str) -> bool:
    return await daemon.metric("streamrec_model_info", version=version) == 1


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""
