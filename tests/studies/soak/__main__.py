"""Run a soak: `make soak`, or `python -m studies.soak` in tests/. The same folder again continues it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveError, EmbeddedError, StoreUnavailable
from streamrec.local.daemon import forget_environment
from streamrec.settings import Settings

from studies.soak.chaos import VICTIMS, Chaos
from studies.soak.feed import Feed
from studies.soak.picture import draw
from studies.soak.plant import Plant
from studies.soak.state import State, load
from studies.soak.verdict import Verdict, judge
from studies.soak.watch import line, wait_caught_up, watching
from support.oracle import is_bad
from support.topic_files import read_topic_files

DAY_MS = 86_400_000
CATCH_UP_S = 600.0
RESULT, PICTURE, WRONG = "result.json", "soak.png", "wrong.txt"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/soak"), help="its state, data and result")
    parser.add_argument("--kills", type=int, default=600, help="at least as many SIGKILLs")
    parser.add_argument("--events", type=int, default=600_000, help="at least as many records")
    parser.add_argument("--rate", type=float, default=250, help="records per second")
    parser.add_argument("--kill-every", type=float, default=3, metavar="S", help="mean pause between two SIGKILLs")
    parser.add_argument("--users", type=int, default=2_000, help="users who click; of a new soak")
    parser.add_argument("--seed", type=int, help="of a new soak")
    return parser.parse_args()


def begun(given: argparse.Namespace) -> State:
    """Return the state of a soak that continues, or of a new one."""
    given.folder.mkdir(parents=True, exist_ok=True)
    state = load(given.folder)
    if state is None:
        seed = random.randrange(10**6) if given.seed is None else given.seed
        begin_ms = int(time.time() * 1000) - 30 * DAY_MS
        state = State(seed, given.events, given.kills, given.rate, given.kill_every, given.users, begin_ms)
    state.events, state.kills, state.rate, state.kill_every_s = given.events, given.kills, given.rate, given.kill_every
    state.runs += 1
    return state


async def soak(state: State, folder: Path) -> Verdict:
    stopped = asyncio.current_task()
    assert stopped is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.cancel)
    async with Plant(folder, state) as plant:
        async with watching(state, plant.settings, folder), asyncio.TaskGroup() as group:
            group.create_task(Feed(plant, lambda: state.enough).run())
            group.create_task(Chaos(plant, lambda: state.enough).run())
        await wait_caught_up(plant.settings, CATCH_UP_S)
        await wait_archived(plant)
        for member in (*plant.daemons, plant.worker):
            await member.stop()
        with (folder / WRONG).open("w") as wrong:
            logs = folder / "kafka" / "data"
            return await judge(plant.settings, logs, state.produced, lambda text: print(text, file=wrong))


async def wait_archived(plant: Plant) -> None:
    """Wait until the worker has archived every click."""
    records = read_topic_files(plant.folder / "kafka" / "data", plant.settings.kafka.topic)
    clicks, deadline = sum(not is_bad(record) for record in records), time.monotonic() + CATCH_UP_S
    while archived(plant.settings) < clicks and time.monotonic() < deadline:
        await asyncio.sleep(1)


def archived(settings: Settings) -> int:
    assert settings.archive.dir is not None
    with contextlib.suppress(ArchiveError, StoreUnavailable):  # the worker merges segments
        return EventArchive(settings.archive.dir).stats().events
    return 0


def recoveries(state: State) -> dict[str, Any]:
    """Return kills, and seconds until recovery, by victim."""
    found = {}
    for name in VICTIMS:
        times = [k.recovered_s for k in state.killed if k.victim == name and k.recovered_s is not None]
        p50, p99, most = np.percentile(times, (50, 99, 100)).round(2).tolist() if times else (None, None, None)
        kills = sum(kill.victim == name for kill in state.killed)
        found[name] = {"kills": kills, "p50_s": p50, "p99_s": p99, "max_s": most}
    return found


def report(state: State, verdict: Verdict, folder: Path) -> bool:
    """Write result and picture; return whether all is right."""
    right = verdict.right and not state.faults
    result = {
        "right": right,
        "seed": state.seed,
        "run_s": round(state.run_s),
        "runs": state.runs,
        "records": state.produced,
        "kills": len(state.killed),
        "recovery": recoveries(state),
        "rebalances": len(state.rebalances),
        "swaps": len(state.swaps),
        "transactions": state.transactions,
        "verdict": asdict(verdict),
        "faults": state.faults,
    }
    (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    title = (
        f"{len(state.killed):,} SIGKILLs, {state.produced:,} records: {verdict.lost:,} lost, "
        f"{verdict.doubled:,} doubled, {verdict.wrong_lists:,} wrong lists, "
        f"{verdict.dead_letters_missing:,} of {verdict.bad_records:,} dead letters missing"
    )
    draw(state, title, folder / PICTURE)
    sys.stderr.write(f"{line(state, 0)}\n{title}\n{folder / RESULT}, {folder / PICTURE}\n")
    for text in state.faults:
        sys.stderr.write(f"fault {text}\n")
    return right


def main() -> int:
    given = options()
    folder = given.folder.resolve()
    forget_environment()
    torch.set_num_threads(1)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # of the soak's own clients, while the broker is down
    signal.signal(signal.SIGINT, signal.default_int_handler)
    state = begun(given)
    os.environ["TMPDIR"] = str(folder / "tmp")
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    try:
        verdict = asyncio.run(soak(state, folder))
    except EmbeddedError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write(f"stopped; the same command continues it from {folder}\n")
        return 130
    finally:
        state.save(folder)
    return 0 if report(state, verdict, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
