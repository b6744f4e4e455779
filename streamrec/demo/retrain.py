"""The demo's retraining: its registry and archive, and the process that trains beside the daemon.

`streamrec retrain --once` runs in a process of its own with a lower priority than the daemon. It reads the live
clicks so far from the topic, as a team's own retraining would.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sasrec import Event, Interactions, load_model
from streamrec.archive.segments import EventArchive
from streamrec.local.daemon import environment
from streamrec.local.process import die_with_parent
from streamrec.local.servers import EMBEDDED_PROGRAM
from streamrec.registry import Registry
from streamrec.settings import Settings

NICENESS = 5  # below the daemon
MAX_LOG_CHARS = 2_000


@dataclass(frozen=True)
class Round:
    """The result of a training round. Without a version nothing was trained, and ``reason`` says why."""

    promoted: bool
    reason: str
    version: str = ""
    train_s: float = 0.0
    ndcg: float = math.nan
    champion_ndcg: float = math.nan


def prepare(settings: Settings, model_dir: Path, past: Interactions) -> None:
    """Make the model the champion of the registry, and import the past clicks into the archive."""
    assert settings.registry.dir is not None and settings.archive.dir is not None
    saved, registry = load_model(model_dir), Registry(settings.registry.dir)
    registry.promote(registry.publish(saved.model, saved.vocab, saved.metadata), "trained on the past")
    rows = zip(past.user_ids, past.item_ids, past.timestamps_ms.tolist(), strict=True)
    EventArchive(settings.archive.dir).import_events(Event(*row) for row in rows)


class Retraining:
    """One training round in a child process, which ends with the context manager.

    Args:
        folder: for the output of the process.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._output, self._log = folder / "retrain.json", folder / "retrain.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._round: Round | None = None
        self.started_s = self.ended_s = math.inf  # time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill()  # an unfinished round has nothing to save
            self._process.wait()
        elif self._process.returncode and not self._last_line().startswith("streamrec: "):
            sys.stderr.write(self._log.read_text(errors="replace")[-MAX_LOG_CHARS:])

    def start(self) -> None:
        """Start the round."""
        with self._output.open("wb") as output, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", EMBEDDED_PROGRAM, "retrain", "--once", "--json"],
                env=environment(self._settings) | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
                preexec_fn=_lower_priority,
            )
        self.started_s = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether the round has started and not ended."""
        return self.started_s < math.inf and self.result() is None

    def result(self) -> Round | None:
        """Return the result once the round has ended."""
        if self._round is None and self._process is not None and self._process.poll() is not None:
            self._round, self.ended_s = self._read_result(self._process.returncode), time.monotonic()
        return self._round

    def _read_result(self, status: int) -> Round:
        if status:
            return Round(False, self._last_line().removeprefix("streamrec: ") or f"it ended with status {status}")
        assert self._settings.registry.dir is not None
        report = json.loads(self._output.read_text())
        version = report["version"]
        metadata = {made.version: made.metadata for made in Registry(self._settings.registry.dir).versions()}
        return Round(
            report["promoted"],
            report["reason"],
            version,
            metadata[version]["train_s"],
            report["challenger"]["ndcg@10"],
            report["champion"]["ndcg@10"],
        )

    def _last_line(self) -> str:
        """Return the last line of the log: after a failure, the error."""
        return self._log.read_text(errors="replace").strip().rpartition("\n")[2]


def _lower_priority() -> None:
    """Prepare the child before it executes its program."""
    os.nice(NICENESS)
    if sys.platform == "linux":
        die_with_parent()
