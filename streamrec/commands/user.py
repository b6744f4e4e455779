"""`streamrec user`: show the stored sequences of users."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from streamrec.commands.inspection import View, add_view, show
from streamrec.commands.options import Subparsers
from streamrec.logs import utc
from streamrec.schemas import UserSequence
from streamrec.settings import Settings


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    add_view(commands, "user", run, "show the stored sequences of users")


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Print the stored sequences."""
    from streamrec.serving.inspection import stored

    return show(settings, options, View(stored, _fields, _lines, "no sequence is stored for user"))


def _fields(value: UserSequence) -> dict[str, Any]:
    return {"items": value.items, "n": value.n, "last_event_ts_ms": value.last_event_ts_ms}


def _lines(user: str, value: UserSequence) -> Iterator[str]:
    yield f"user {user}: {value.n} events, the last at {utc(value.last_event_ts_ms)}; oldest first:"
    yield "  " + " ".join(value.items)
