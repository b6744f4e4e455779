"""`streamrec recs`: show the published lists of users."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import msgspec

from streamrec.commands.inspection import View, add_view, show
from streamrec.commands.options import Subparsers
from streamrec.schemas import PublishedList
from streamrec.settings import Settings


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    add_view(commands, "recs", run, "show the published lists of users")


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Print the published lists."""
    from streamrec.serving.inspection import published

    view = View(published, msgspec.to_builtins, _lines, "no list is published for user")
    return show(settings, options, view)


def _lines(user: str, value: PublishedList) -> Iterator[str]:
    age_s = time.time() - value.published_ts_ms / 1000
    yield f"user {user}: model {value.model}, after {value.n} events, published {age_s:.0f} s ago"
    for place, (item, score) in enumerate(zip(value.items, value.scores, strict=True), start=1):
        yield f"  {place:3}  {item}  {score:.3f}"
