"""Where the table of items comes from: a topic, a file, or nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from typing import Protocol

from streamrec.health import Loops
from streamrec.items.file import ItemFile
from streamrec.items.refusals import Refusals
from streamrec.items.table import ItemTable
from streamrec.items.topic import ItemTopic, Send
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter
from streamrec.setting_groups import ItemSettings, KafkaSettings
from streamrec.supervisor import Supervisor


class ItemSource(Protocol):
    """Fills the table of the refusals."""

    async def read(self) -> None:
        """Read the whole table. Raises KafkaUnavailable, KafkaForbidden or SettingsError."""

    async def follow(self) -> None:
        """Apply the next changes, or wait for some."""

    async def aclose(self) -> None:
        """Close what is open."""


async def send_nothing(letters: Collection[DeadLetter]) -> None:
    """Send no dead letters: daemons send those of bad items."""


def refusals_of(settings: ItemSettings) -> Refusals:
    """Return refusals with an empty table, if there is to be one."""
    return Refusals(ItemTable() if settings.has_table else None, settings.unknown == "allow")


def item_source(
    settings: ItemSettings, kafka: KafkaSettings, refusals: Refusals, metrics: Metrics, send: Send = send_nothing
) -> ItemSource | None:
    """Return the source of the table; None if there is no table.

    Args:
        send: sends dead letters until they are acknowledged.
    """
    if settings.topic:
        return ItemTopic(kafka.model_copy(update={"topic": settings.topic}), refusals, metrics, send)
    return ItemFile(settings.file, refusals, metrics) if settings.file else None


@contextlib.asynccontextmanager
async def followed_items(settings: ItemSettings, kafka: KafkaSettings) -> AsyncIterator[Refusals]:
    """Read the table, if there is one, and follow it while the block runs; bad items are only logged.

    Raises:
        StreamrecError: the table cannot be read.
    """
    refusals, metrics = refusals_of(settings), Metrics()
    source = item_source(settings, kafka, refusals, metrics)
    if source is None:
        yield refusals
        return
    try:
        await source.read()
        loops = {"items": source.follow, "availability": refusals.watch_time}
        async with Supervisor(metrics, Loops()).running(loops):
            yield refusals
    finally:
        await source.aclose()
