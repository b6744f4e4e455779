"""`streamrec demo`: the whole path on this machine, with real clicks.

1. Train on the first 80 % of the time line.
2. Start Redis, Kafka and the daemon as child processes.
3. Replay the rest as live clicks, each scored against the list that its user had *before* the click.
4. Halfway, retrain beside the daemon, which swaps in the new model while clicks continue.

The demo stands where a team's own systems stand: it writes to Kafka, reads Redis, and scrapes /metrics.
"""

from __future__ import annotations

import asyncio
import csv
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from sasrec import Columns, DataFileError, TrainingError
from sasrec.data.formats import DEFAULT_COLUMNS
from streamrec.demo.data import DemoData, load_data
from streamrec.demo.feed import STORED_ITEMS
from streamrec.demo.live import LiveReplay
from streamrec.demo.retrain import Retraining, prepare
from streamrec.demo.screen import Screen
from streamrec.demo.summary import print_summary, summary, write_json
from streamrec.demo.training import BATCH_SIZE, SHAPE, train_model
from streamrec.errors import StreamrecError
from streamrec.local.daemon import DaemonProcess, forget_environment, running_daemon
from streamrec.local.process import free_port
from streamrec.local.servers import LocalServers
from streamrec.setting_groups import LONGEST_S
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings
from streamrec.stop_signals import stop_signals

DAEMON = ("streamrec.demo.daemon",)


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command line.

    ``rate_per_s``: 0 is as fast as possible. ``stay``: leave the daemon running after the last click.
    """

    data: Path | None = None
    columns: Columns = DEFAULT_COLUMNS
    items: Path | None = None
    json: Path | None = None
    rate_per_s: float = 300.0
    epochs: int = 15
    stay: bool = False


def run_demo(options: DemoOptions) -> int:
    """Run the demo from data to summary; return the exit status.

    Raises:
        StreamrecError: the data cannot be used, or a server does not start.
    """
    console = Console()
    forget_environment()  # the demo's servers and folders are its own
    if options.json is not None:
        write_json(options.json, {})  # fail now rather than after minutes
    torch.set_num_threads(os.cpu_count() or 1)  # nothing else runs during the first training
    try:
        data = load_data(options.data, options.columns, options.items, console)
        text = f"{data.source}: training on {len(data.past):,} clicks, then replaying {len(data.live):,}"
        console.print(text, highlight=False)
        model_dir = train_model(data.past, data.filter_seen, options.epochs, console)
    except (DataFileError, TrainingError) as error:
        raise StreamrecError(str(error)) from error
    console.print("starting Redis, Kafka and the daemon", highlight=False)
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, LocalServers() as servers:
        settings = load_settings(flags=_settings(data, servers, Path(folder)))
        prepare(settings, model_dir, data.past)
        with running_daemon(settings, DAEMON) as daemon:
            complete = _replay(options, data, settings, Path(folder), daemon, console)
            if options.stay and complete:
                asyncio.run(_stay(f"\nThe page runs at {daemon.address} until Ctrl-C", console))
    text = f"\nThe model is in {model_dir}. Serve it to your own clicks with\n"
    text += f"  streamrec serve --embedded --model-dir {model_dir}"
    console.print(text, highlight=False, soft_wrap=True)
    return 0 if complete else 130


def _replay(
    options: DemoOptions, data: DemoData, settings: Settings, folder: Path, daemon: DaemonProcess, console: Console
) -> bool:
    """Replay the live clicks and print the summary; return False if a signal stopped the replay."""
    with Retraining(settings, folder) as retraining, Screen(console, data.titles) as screen:
        live = LiveReplay(settings, data, options.rate_per_s, screen, daemon, retraining)
        complete = asyncio.run(live.run())
    print_summary(console, live.now, data.source, complete)
    if options.json is not None:
        write_json(options.json, summary(live.now))
    return complete


async def _stay(text: str, console: Console) -> None:
    stop = asyncio.Event()
    with stop_signals(stop, lambda _: None):  # before the text: a reader may press Ctrl-C at once
        console.print(text, highlight=False, soft_wrap=True)
        await stop.wait()


def _settings(data: DemoData, servers: LocalServers, folder: Path) -> dict[str, object]:
    """Return the settings of daemon and retraining by name."""
    items = folder / "items.csv"
    with items.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("item_id", "title"), *data.titles.items()])
    return {
        "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
        "redis_url": servers.redis_url,
        "registry_dir": folder / "registry",
        "archive_dir": folder / "archive",
        # the times of a file may only order its clicks
        "events_min_timestamp_ms": 0,
        "events_max_future_s": LONGEST_S,
        "sequences_max_len": STORED_ITEMS,
        "lists_filter_seen": data.filter_seen,
        "http_port": free_port(),
        "http_titles": items,
        "log_level": "WARNING",
        "retrain_days": 36_500,
        "train_batch_size": BATCH_SIZE,
        "retrain_update_epochs": 5,
        "train_replay": 4.0,  # the new clicks of a few users make only a few hundred windows
        "retrain_holdout_share": 0.02,  # train on most of the live clicks so far
    } | {f"model_{name}": value for name, value in asdict(SHAPE).items() if name != "num_items"}
