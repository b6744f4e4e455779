"""/livez and /readyz of a running daemon: at its start, while it waits for others, when it is stuck, at its end."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import ConsumerRebalanceListener, TopicPartition

from streamrec.daemon import serve
from streamrec.schemas import Recommendation, UserSequence
from streamrec.serving.predictor import Predictor
from streamrec.settings import Settings

from support.daemon_process import Daemon, get
from support.kafka_client import feed, member, wait_caught_up
from support.waiting import eventually
from support.workload import Record, click

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]

REVOKED = "partitions revoked"


class StuckPredictor(Predictor):
    """A predictor that never returns."""

    async def predict(self, sequences: list[UserSequence]) -> list[Recommendation]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


@asynccontextmanager
async def served(settings: Settings, caplog: pytest.LogCaptureFixture) -> AsyncIterator[str]:
    """Run a daemon in this process, and yield the address of its HTTP port."""
    caplog.set_level("INFO")
    task = asyncio.create_task(serve(settings))

    async def address() -> str | None:
        if task.done():
            task.result()
        return next((record.http for record in caplog.records if hasattr(record, "http")), None)

    try:
        yield str(await eventually(address))
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_stuck_consumer_is_not_alive_and_a_waiting_one_is(
    make_settings: MakeSettings, model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamrec.startup.Predictor", StuckPredictor)
    settings = make_settings(model_dir=model_dir, serving_liveness_timeout_s=1)
    async with served(settings, caplog) as http:
        await eventually(lambda: has_status(http, "/readyz", 200))
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert await has_status(http, "/livez", 200), "an idle daemon needs no restart"
            await asyncio.sleep(0.1)
        await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
        await eventually(lambda: has_status(http, "/livez", 503), timeout_s=10)


async def test_a_page_whose_files_are_missing_stops_no_click(
    make_settings: MakeSettings,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("streamrec.web.page.STATIC_FOLDER", tmp_path / "none")
    settings = make_settings(model_dir=model_dir)
    async with served(settings, caplog) as http:
        await eventually(lambda: has_status(http, "/readyz", 200))
        await feed(settings, [Record(b"ann", click("ann", "i1", 1))])
        await wait_caught_up(settings)
        assert "streamrec_events_total" in (await asyncio.to_thread(get, http + "/metrics"))[1]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("the live page is not served: ")
    assert str(tmp_path / "none") in warning


async def has_status(http: str, path: str, expected: int) -> bool:
    return (await asyncio.to_thread(get, http + path))[0] == expected


class SlowListener(ConsumerRebalanceListener):
    """Keeps its partitions in a rebalance until ``release`` is set, while the whole group waits.

    A test must set it even if it fails: otherwise the consumer could not be stopped.
    """

    def __init__(self) -> None:
        self.revoking = asyncio.Event()
        self.release = asyncio.Event()

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        if revoked:
            self.revoking.set()
            await self.release.wait()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        pass


async def test_a_long_rebalance_keeps_the_daemon_alive_and_does_not_delay_its_stop(
    start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    daemon = start_daemon(serving_liveness_timeout_s=1, kafka_session_timeout_s=6)
    await daemon.wait_ready()
    slow = SlowListener()
    async with member(settings, slow), asyncio.TaskGroup() as group:
        revoked = daemon.output.count(REVOKED)

        async def joins() -> None:
            async with member(settings):
                pass

        try:
            group.create_task(joins())
            async with asyncio.timeout(30):
                await slow.revoking.wait()
            await eventually(lambda: has_revoked(daemon, revoked + 1))
            until = time.monotonic() + 3
            while time.monotonic() < until:
                assert await daemon.get("/livez") == (200, "ok\n")
                await asyncio.sleep(0.1)
            daemon.signal(signal.SIGTERM)
            assert await daemon.wait_exit(10) == 0
        finally:
            slow.release.set()


async def has_revoked(daemon: Daemon, times: int) -> bool:
    return daemon.output.count(REVOKED) >= times
