"""`streamrec items`: the table of items."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from streamrec.commands.options import Subparsers, add_command, add_group
from streamrec.errors import StreamrecError
from streamrec.settings import Settings


def add_to(commands: Subparsers) -> None:
    """Declare the command and its action."""
    actions = add_group(
        commands,
        "items",
        "send items to the items topic",
        "Write the table of items to its topic.",
    )
    command = add_command(
        actions,
        "send",
        run,
        ("kafka_bootstrap_servers", "items_topic"),
        "send the items of a file to the items topic",
        "Send the items of a file to the items topic, which is created if it is missing. Items that the topic has "
        "and the file lacks remain.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help="JSON lines with item_id, or CSV or TSV with a header")


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Send the items, and print how many."""
    if not settings.items.topic:
        raise StreamrecError("no topic of items: set STREAMREC_ITEMS_TOPIC or --items-topic")
    from streamrec.commands import servers
    from streamrec.items.send import send_items

    async def work() -> int:
        await servers.wait_for(settings, servers.KAFKA)
        return await send_items(settings.kafka, settings.items.topic, options.file)

    print(f"{asyncio.run(work()):,} items to topic {settings.items.topic}")
    return 0
