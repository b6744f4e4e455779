"""Results of `streamrec rebuild`, and its progress on a terminal or in the log."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0


@dataclass
class Report:
    """Numbers of users by outcome, and of lists published."""

    rebuilt: int = 0
    unchanged: int = 0
    ahead: int = 0  # Redis has clicks that neither archive nor topic have
    too_old: int = 0
    refused: set[str] = field(default_factory=set)  # users whose data can never be read or written
    lists: int = 0
    exclusions: int = 0  # users
    popularity: bool = False

    def __str__(self) -> str:
        return (
            f"{self.rebuilt:,} users rebuilt, {self.unchanged:,} unchanged, {self.ahead:,} left alone because only "
            f"Redis has some of their clicks, {self.too_old:,} too old, {self.lists:,} lists published"
            f"{f', {len(self.refused):,} left alone because of what the log says' if self.refused else ''}"
            f"{f', exclusions of {self.exclusions:,} users' if self.exclusions else ''}"
            f"{', popularity counted again' if self.popularity else ''}"
        )


@contextlib.contextmanager
def show_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of users done: updates a bar on a terminal, else logs now and then."""
    console = Console(stderr=True)
    logged_s = time.monotonic()
    with Progress(
        TextColumn("rebuild"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("users"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("rebuild", total=total)

        def update(done: int) -> None:
            nonlocal logged_s
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - logged_s > LOG_EVERY_S:
                logged_s = time.monotonic()
                log.info("rebuilding", extra={"users": done, "of": total})

        yield update
