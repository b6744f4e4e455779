"""Commands that run in the process of the tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import streamrec.commands.main
from streamrec.commands.main import main
from streamrec.local.daemon import environment
from streamrec.settings import Settings

from support.command_line import Result

MakeSettings = Callable[..., Settings]


@pytest.fixture
def run(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Run a command in this process, with the test's own servers and keys."""
    for name, value in environment(make_settings()).items():
        if name.startswith("STREAMREC_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "1000")  # each help text on one line
    # configure_logging would remove pytest's handlers
    monkeypatch.setattr(streamrec.commands.main, "configure_logging", lambda *_: None)

    def call(arguments: tuple[str, ...]) -> int:
        try:
            return main(list(arguments))
        except SystemExit as end:  # argparse
            return int(end.code or 0)

    async def run_command(*arguments: str) -> Result:
        status = await asyncio.to_thread(call, arguments)
        return Result(status, *capsys.readouterr())

    return run_command
