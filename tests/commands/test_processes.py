"""Commands as child processes: exit status, closed pipes, Ctrl-C, imports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamrec.local.daemon import environment
from streamrec.settings import Settings

from support.command_line import start_command, write_users

MakeSettings = Callable[..., Settings]


@pytest.mark.parametrize(
    ("arguments", "status"), [(["recs"], 1), (["nope"], 2), (["check", "--config", "x.toml"], 1), (["--help"], 0)]
)
def test_the_process_ends_with_the_status_and_without_a_traceback(
    make_settings: MakeSettings, arguments: list[str], status: int
) -> None:
    child = start_command(make_settings(), *arguments)
    _, err = child.communicate(timeout=60)
    assert child.returncode == status
    assert "Traceback" not in err


@pytest.mark.parametrize("users", [1, 1_500], ids=["fits into the buffer", "larger than the buffer"])
@pytest.mark.parametrize("command", ["recs", "user"])
async def test_a_closed_pipe_is_no_error(make_settings: MakeSettings, users: int, command: str) -> None:
    settings = make_settings()
    await write_users(settings, {f"u{k}": ["a"] * 20 for k in range(users)})
    child = start_command(settings, command, "--all", "--json")
    assert child.stdout is not None
    assert child.stderr is not None
    if users > 1:
        assert json.loads(await asyncio.to_thread(child.stdout.readline))["user_id"].startswith("u")
    child.stdout.close()
    err = await asyncio.to_thread(child.stderr.read)
    await asyncio.to_thread(child.wait, 60)
    child.stderr.close()
    assert err == ""


def test_ctrl_c_ends_with_one_line(make_settings: MakeSettings, tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("user_id,item_id,timestamp\n" + "ann,a,1700000000000\n" * 100)
    settings = make_settings()
    child = start_command(settings, "replay", str(path), "--rate", "1")
    assert child.stderr is not None
    first = child.stderr.readline()
    assert "created" in first
    child.send_signal(2)
    with contextlib.closing(child.stderr):
        rest = child.stderr.read()
    assert child.wait(60) == 130
    assert rest == "streamrec: stopped\n"
    assert child.stdout is not None
    child.stdout.close()


def test_showing_a_list_does_not_import_torch(make_settings: MakeSettings) -> None:
    code = (
        "import sys; from streamrec.commands.main import main; main(['recs', 'ann']); sys.exit('torch' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment(make_settings()), capture_output=True, text=True, timeout=60
    )
    assert (child.returncode, child.stderr) == (0, "no list is published for user ann\n")
