"""The common part of `streamrec recs` and `streamrec user`: show values of users in Redis."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from streamrec.commands import servers
from streamrec.commands.options import REDIS, Run, Subparsers, add_command
from streamrec.errors import StreamrecError
from streamrec.logs import json_line, one_line
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings

V = TypeVar("V")


@dataclass(frozen=True)
class View(Generic[V]):
    """How to read and show one kind of values.

    ``read`` takes the client, the users (None: all), and a callback for unreadable values.
    """

    read: Callable[..., AsyncIterator[tuple[str, V | None]]]
    fields: Callable[[V], dict[str, Any]]  # for JSON
    lines: Callable[[str, V], Iterator[str]]  # for people
    missing: str


def add_view(commands: Subparsers, name: str, run: Run, help: str) -> None:
    """Declare a command that shows a view."""
    command = add_command(commands, name, run, REDIS, help)
    command.add_argument("users", metavar="USER", nargs="*", help="user ids")
    command.add_argument("--all", action="store_true", help="every user in Redis")
    command.add_argument("--json", action="store_true", help="one JSON object per line")


def show(settings: Settings, options: argparse.Namespace, view: View[V]) -> int:
    """Print the value of each user; return 1 if a value is missing or unreadable."""
    problems = 0

    def problem(text: str) -> None:
        nonlocal problems
        problems += 1
        print(one_line(text), file=sys.stderr)

    async def run() -> int:
        await servers.wait_for(settings, servers.REDIS)
        async with RedisClient(settings.redis) as redis:
            users = _users(options)
            async for user, value in view.read(redis, users, lambda error: problem(f"streamrec: {error}")):
                if value is None:
                    problem(f"{view.missing} {user}")
                elif options.json:
                    print(json_line({"user_id": user} | view.fields(value)))
                else:
                    for line in view.lines(user, value):
                        print(one_line(line))
        return int(problems > 0)

    return asyncio.run(run())


def _users(options: argparse.Namespace) -> list[str] | None:
    """Return the named users; None for all."""
    if options.all == bool(options.users):
        raise StreamrecError("name the users, or give --all")
    try:
        "".join(options.users).encode()
    except UnicodeEncodeError:  # the command line has bytes that are not UTF-8
        raise StreamrecError(f"user ids must be UTF-8 text, not {options.users!r}") from None
    return None if options.all else options.users
