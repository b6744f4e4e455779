"""Adapt aiokafka clients to the embedded Kafka-protocol server.

The server answers an empty fetch at once instead of waiting for records, so that aiokafka would send thousands of
fetches per second. It never removes a member of a group, so that a rebalance would wait for members that have died or
lost their member id. ``adapt`` changes the aiokafka of this process. It uses private attributes;
tests/local/test_embedded_kafka.py fails if a new aiokafka changes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from pathlib import Path
from typing import Any

from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator

EMPTY_FETCH_PAUSE_S = 0.002


def adapt() -> None:
    """Let the aiokafka clients of this process pause after empty fetches and keep their member id."""
    if not adapted():
        for (kind, name), change in CHANGES.items():
            setattr(kind, name, change(vars(kind)[name]))


def adapted() -> bool:
    """Return whether the aiokafka of this process is adapted."""
    return hasattr(Fetcher._proc_fetch_request, "__wrapped__")


def has_died(client_id: str, prefix: str) -> bool:
    """Return whether a client id names a process of this machine that no longer runs.

    Args:
        prefix: the start of the client ids of this machine; the process id follows.
    """
    pid = client_id.removeprefix(prefix).partition("-")[0]
    if not client_id.startswith(prefix) or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # dead, not yet reaped
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False


def _patient(fetch: Any) -> Any:
    @functools.wraps(fetch)
    async def fetch_patiently(fetcher: Fetcher, *request: Any) -> bool:
        started_s = time.monotonic()
        found: bool = await fetch(fetcher, *request)
        if not found and time.monotonic() - started_s < EMPTY_FETCH_PAUSE_S:
            with contextlib.suppress(asyncio.CancelledError):  # the client cancels a fetch and waits until it returns
                await asyncio.sleep(EMPTY_FETCH_PAUSE_S)
        return found

    return fetch_patiently


def _remembering(join_complete: Any) -> Any:
    @functools.wraps(join_complete)
    async def remember(coordinator: GroupCoordinator, generation: int, member_id: str, *rest: Any) -> Any:
        coordinator.joined_member_id = member_id
        return await join_complete(coordinator, generation, member_id, *rest)

    return remember


def _restoring(join_prepare: Any) -> Any:
    @functools.wraps(join_prepare)
    async def restore(coordinator: GroupCoordinator, *rest: Any) -> Any:
        # the client forgets its member id when a commit comes too late; the server does not
        if not coordinator.member_id:
            coordinator.member_id = vars(coordinator).pop("joined_member_id", "")
        return await join_prepare(coordinator, *rest)

    return restore


CHANGES = {
    (Fetcher, "_proc_fetch_request"): _patient,
    (GroupCoordinator, "_on_join_complete"): _remembering,
    (GroupCoordinator, "_on_join_prepare"): _restoring,
}
