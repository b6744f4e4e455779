"""`streamrec retrain`: train on new clicks, and promote the model if it is good enough."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import TYPE_CHECKING

from streamrec.commands.options import KAFKA, REDIS, Subparsers, add_command, place, seconds
from streamrec.logs import one_line
from streamrec.settings import Settings

if TYPE_CHECKING:
    from streamrec.retraining.promotion import Verdict


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "retrain",
        run,
        ("archive_dir", "registry_dir", "retrain_mode", *KAFKA, *REDIS),
        "train on new clicks, and promote the model if it is good enough",
        "Write the topic into the event archive, train a model regularly, compare it with the champion on the newest "
        "clicks, which neither has seen in training, and promote it unless it is worse. The daemons then load it.",
    )
    when = command.add_mutually_exclusive_group()
    when.add_argument("--once", action="store_true", help="read the topic to its end, train one round, then exit")
    when.add_argument(
        "--every",
        metavar="TIME",
        type=seconds,
        dest="retrain_every_s",
        help="time between the starts of two rounds: 90s, 30m, 6h, 1d [1h]",
    )
    command.add_argument(
        "--min-new-events",
        metavar="INT",
        dest="retrain_min_new_events",
        help="new clicks that a round needs to start [1]",
    )
    command.add_argument("--no-follow", action="store_true", help="train on the archive alone; read no topic")
    command.add_argument("--json", action="store_true", help="with --once: print the report as one JSON object")


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Retrain until a signal comes, or once."""
    place(settings.archive.dir, "archive_dir")
    place(settings.registry.dir, "registry_dir")
    from streamrec.commands import servers
    from streamrec.retraining.worker import RetrainWorker

    async def work() -> Verdict | None:
        worker = RetrainWorker(settings, follow=not options.no_follow, progress=sys.stderr.isatty())
        if options.once:
            if not options.no_follow:
                await servers.wait_for(settings, servers.KAFKA)
            await servers.wait_for(settings, servers.REDIS)
            return await worker.once()
        await worker.run()
        return None

    verdict = asyncio.run(work())
    if verdict is not None:
        _print(verdict, options.json)
    return 0


def _print(verdict: Verdict, as_json: bool) -> None:
    if as_json:
        known = {
            "version": verdict.version,
            "mode": verdict.mode,
            "promoted": verdict.promoted,
            "reason": verdict.reason,
        }
        print(json.dumps(known | verdict.report))
        return
    print(one_line(f"version {verdict.version} {'promoted' if verdict.promoted else 'not promoted'}: {verdict.reason}"))
    for name, values in verdict.report.items():
        if isinstance(values, dict):
            print(f"  {name:11}" + "  ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
