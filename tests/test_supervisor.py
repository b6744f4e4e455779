"""Loops that fail go on: with a pause, one warning, one line at the end, and a metric meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from streamrec import waiting
from streamrec.errors import RegistryError
from streamrec.health import Loops
from streamrec.metrics import ProcessMetrics
from streamrec.supervisor import Supervisor

from support.waiting import eventually


class Watched:
    """A supervisor with its metrics, and a loop whose steps succeed or fail as the test says."""

    def __init__(self) -> None:
        self.metrics, self.loops = ProcessMetrics(), Loops()
        self.supervisor = Supervisor(self.metrics, self.loops)
        self.error: BaseException | None = None
        self.steps = 0

    async def step(self) -> None:
        await asyncio.sleep(0.001)
        self.steps += 1
        if self.error is not None:
            raise self.error

    async def more_steps(self, count: int = 2) -> None:
        wanted = self.steps + count

        async def done() -> bool:
            return self.steps >= wanted

        await eventually(done)

    def exposes(self, line: str) -> bool:
        return line in self.metrics.exposition().decode().splitlines()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamrec.supervisor.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("streamrec.supervisor.LONGEST_PAUSE_S", 0.01)


@pytest.mark.parametrize(
    "error",
    [
        RegistryError("it cannot be read"),
        ValueError("it cannot be read"),
        OSError("it cannot be read"),
        BaseExceptionGroup("it cannot be read", [KeyError("x")]),
        asyncio.CancelledError("it cannot be read"),  # of a client that was closed beneath it
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_loop_that_fails_goes_on_and_is_shown(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    watched = Watched()
    async with watched.supervisor.running({"registry": watched.step}):
        await watched.more_steps()
        assert watched.exposes('streamrec_loop_failing{loop="registry"} 0.0')
        watched.error = error
        await watched.more_steps(5)
        assert watched.loops.remark() == "the loop registry fails, and the log says why"
        assert watched.exposes('streamrec_loop_failing{loop="registry"} 1.0')
        watched.error = None
        await watched.more_steps()
    assert watched.loops.remark() is None
    assert watched.exposes('streamrec_loop_failing{loop="registry"} 0.0')
    failures = [line for line in watched.metrics.exposition().decode().splitlines() if "failures_total{" in line]
    assert float(failures[0].split()[-1]) >= 4
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("the loop registry fails and is tried again: ") and "it cannot be read" in first
    assert last == "the loop registry works again"


async def test_a_step_that_never_ends_works_again_when_it_has_not_failed_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streamrec.supervisor.WELL_AFTER_S", 0.05)
    watched, starts = Watched(), 0

    async def endless() -> None:
        nonlocal starts
        starts += 1
        if starts < 3:
            raise ValueError
        await asyncio.sleep(3600)

    async def works() -> bool:
        return starts == 3 and watched.loops.remark() is None

    async with watched.supervisor.running({"shadow": endless}):
        await eventually(works)


async def test_pauses_grow_while_a_loop_fails_and_end_with_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(stop: asyncio.Event, seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 6:
            stop.set()

    monkeypatch.setattr("streamrec.supervisor.pause", note)
    monkeypatch.setattr("streamrec.supervisor.FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr("streamrec.supervisor.LONGEST_PAUSE_S", 10.0)
    watched = Watched()
    watched.error = ValueError()
    await watched.supervisor.repeat("rounds", watched.step, asyncio.Event())
    assert pauses == [1, 2, 4, 8, 10, 10]


async def test_a_cancelled_loop_ends_and_a_fatal_error_leaves_it() -> None:
    watched = Watched()
    loop = asyncio.create_task(watched.supervisor.repeat("rounds", watched.step))
    await watched.more_steps()
    loop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loop
    watched.error = RegistryError("for the operator")
    with pytest.raises(RegistryError, match="for the operator"):
        await watched.supervisor.repeat("rounds", watched.step, fatal=(RegistryError,))
    assert watched.loops.remark() is None


async def test_a_loop_that_loses_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "CANCEL_AGAIN_S", 0.05)
    lost = 0

    async def as_wait_for_does() -> None:
        nonlocal lost
        while lost < 3:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                lost += 1
        await asyncio.sleep(3600)

    async with asyncio.timeout(30):
        async with Watched().supervisor.running({"rounds": as_wait_for_does}):
            await asyncio.sleep(0)  # the loop begins
    assert lost == 3
