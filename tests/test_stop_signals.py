"""A process ends, though something in it does not stop."""

from __future__ import annotations

import subprocess
import sys

import pytest

HANGS = """
import asyncio, threading
from streamrec import stop_signals
from streamrec.logs import configure_logging

stop_signals.END_S = 0.2
configure_logging("INFO", "text")

async def main():
    threading.Thread(target=threading.Event().wait, name="a thread that hangs").start()
    asyncio.create_task(hang())
    await asyncio.sleep(0)
    stop_signals.end_soon({status})

async def hang():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

asyncio.run(main())
"""


@pytest.mark.parametrize("status", [0, 1])
def test_a_process_ends_though_a_task_and_a_thread_hang(status: int) -> None:
    program = HANGS.replace("{status}", str(status))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert "not everything stopped in 0.2 s" in done.stderr + done.stdout
    assert "hang()" in done.stderr + done.stdout or "hang at" in done.stderr + done.stdout
    assert "a thread that hangs" in done.stderr + done.stdout
