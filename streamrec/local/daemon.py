"""Run a daemon as a child process, for demo and benchmark, and read its /metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from streamrec.errors import DaemonEnded, StreamrecError
from streamrec.local.process import die_with_parent
from streamrec.settings import ENV_PREFIX, Settings

READY_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 20.0
POLL_S = 0.1


@dataclass
class Reading:
    """The values of /metrics at a moment of ``time.monotonic()``."""

    at_s: float
    applied: int = 0
    dead_letters: int = 0
    lag_records: int = 0
    version: str = ""
    click_to_published: list[tuple[float, float]] = field(default_factory=list)  # cumulative, by upper bound in seconds

    @property
    def published(self) -> int:
        """Number of clicks whose list is in Redis."""
        return int(self.click_to_published[-1][1])


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a child process these settings."""
    given = {"redis_url": settings.redis.url, **settings.given}
    return {**os.environ, **{ENV_PREFIX + name.upper(): _text(value) for name, value in given.items()}}


def _text(value: object) -> str:
    """Return the text of a value in an environment variable; an empty text means not set."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def forget_environment() -> None:
    """Unset every setting in the environment of this process, so that children do not inherit it."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]


class DaemonProcess:
    """A running `streamrec serve`."""

    def __init__(self, settings: Settings, process: subprocess.Popen[bytes]) -> None:
        self._settings = settings
        self._process = process

    async def wait_ready(self, http: aiohttp.ClientSession) -> None:
        """Wait until the daemon is ready.

        Raises:
            StreamrecError: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            self._check()
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(self._url("/readyz")) as answer:
                    if answer.status == 200:
                        return
            if time.monotonic() > deadline:
                raise StreamrecError(f"the daemon was not ready within {READY_TIMEOUT_S:.0f} s; its log is above")
            await asyncio.sleep(POLL_S)

    async def read(self, http: aiohttp.ClientSession) -> Reading | None:
        """Return its current metrics; None if it runs but did not answer.

        Raises:
            DaemonEnded: it ended.
        """
        try:
            async with http.get(self._url("/metrics")) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            self._check()
            return None
        reading = Reading(time.monotonic())
        for sample in (s for family in text_string_to_metric_families(text) for s in family.samples):
            if sample.name == "streamrec_click_to_published_seconds_bucket":
                reading.click_to_published.append((float(sample.labels["le"]), sample.value))
            elif sample.name == "streamrec_events_total" and sample.labels["outcome"] == "applied":
                reading.applied = int(sample.value)
            elif sample.name == "streamrec_dead_letters_total":
                reading.dead_letters = int(sample.value)
            elif sample.name == "streamrec_lag_records":
                reading.lag_records += int(sample.value)
            elif sample.name == "streamrec_model_info":
                reading.version = sample.labels["version"]
        return reading

    @property
    def address(self) -> str:
        """Address of its page."""
        return self._url("/")

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise DaemonEnded("the daemon ended; its log is above")

    def _url(self, path: str) -> str:
        return f"http://{self._settings.http.host}:{self._settings.http.port}{path}"


@contextlib.contextmanager
def running_daemon(settings: Settings, program: Sequence[str]) -> Iterator[DaemonProcess]:
    """Run `streamrec serve` as a child process; at the end stop it and print its log.

    Args:
        program: its module and arguments.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *program],
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield DaemonProcess(settings, process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
