"""Clients of the embedded server pause after an empty fetch, restore their member id, and recognise dead members."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.consumer.group_coordinator import GroupCoordinator

from streamrec.kafka.members import member_prefix
from streamrec.local import embedded_kafka
from streamrec.local.embedded_kafka import CHANGES, EMPTY_FETCH_PAUSE_S, adapt, has_died


@pytest.mark.parametrize(
    ("found", "takes_s", "pauses"),
    [(False, 0.0, [EMPTY_FETCH_PAUSE_S]), (True, 0.0, []), (False, 2 * EMPTY_FETCH_PAUSE_S, [])],
    ids=["at once and empty", "records", "empty, after a wait"],
)
async def test_a_client_pauses_only_after_an_immediate_empty_answer(
    found: bool, takes_s: float, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, paused = asyncio.sleep, list[float]()

    async def fetch(fetcher: object, *request: object) -> bool:
        await wait(takes_s)
        return found

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    patient = embedded_kafka._patient(fetch)
    monkeypatch.setattr(embedded_kafka.asyncio, "sleep", pause)
    assert await patient("fetcher", "assignment", 1, "request") is found
    assert paused == pauses


async def test_a_client_that_closes_during_the_pause_ends_without_an_error() -> None:
    async def fetch(fetcher: object, *request: object) -> bool:
        return False

    fetching = asyncio.ensure_future(embedded_kafka._patient(fetch)("fetcher", "assignment", 1, "request"))
    await asyncio.sleep(0)
    fetching.cancel()
    assert await fetching is False


async def test_a_member_id_that_the_client_forgot_is_restored_once() -> None:
    async def join_complete(coordinator: Any, generation: int, member_id: str, *rest: object) -> None:
        coordinator.member_id = member_id

    async def join_prepare(coordinator: Any, *rest: object) -> str:
        return str(coordinator.member_id)

    remember, restore = embedded_kafka._remembering(join_complete), embedded_kafka._restoring(join_prepare)
    coordinator = SimpleNamespace(member_id="")
    assert await restore(coordinator, None) == "", "it has never joined"
    await remember(coordinator, 1, "member-1", "range", b"")
    coordinator.member_id = ""
    assert await restore(coordinator, None) == "member-1"
    coordinator.member_id = ""
    assert await restore(coordinator, None) == "", "the server has refused the member id"


def test_this_aiokafka_has_the_methods_that_are_adapted() -> None:
    adapt()
    adapt()  # a second time changes nothing
    for kind, name in CHANGES:
        original = vars(vars(kind)[name])["__wrapped__"]
        assert asyncio.iscoroutinefunction(original)
        assert "__wrapped__" not in vars(original), "adapted once"
    names = GroupCoordinator._on_join_complete.__wrapped__.__code__.co_varnames
    assert names[:3] == ("self", "generation", "member_id")


def test_only_a_process_of_this_machine_that_has_ended_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    assert has_died(f"prefix-{ended.pid}-abc", "prefix-")
    assert not has_died(f"prefix-{os.getpid()}-abc", "prefix-")
    assert not has_died(f"other-{ended.pid}-abc", "prefix-")
    assert not has_died("prefix-what-abc", "prefix-")


def test_the_dead_of_another_machine_with_the_same_name_are_not_taken_for_ours() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    ours = f"{member_prefix()}{ended.pid}-abc"
    assert boot in ours
    assert has_died(ours, member_prefix())
    assert not has_died(ours.replace(boot, "0" * len(boot)), member_prefix())
