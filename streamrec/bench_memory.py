"""What users take: of the daemon's memory as they become more, and of Redis."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

USERS = (1_000, 10_000, 100_000)
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# One process for all sizes, so that what users take is not hidden by what it takes to start.
SCRIPT = "from streamrec.bench_memory import grow; grow()"
BATCH = 256


def measure_resident(
    cache_bytes: int, users: Sequence[int] = USERS, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, int]]:
    """Resident size of a process that has served so many users with windows of 200, with a cache of that many bytes.

    Returns:
        A row for each number of ``users``: ``cached_users``, ``resident_bytes``, ``cache_bytes``; first one of 0 users,
        which tells what the process takes before.
    """
    command = [sys.executable, "-c", SCRIPT, str(cache_bytes), *map(str, users)]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            count, cached, resident = map(int, line.split())
            progress(f"memory: {count:,} users")
            rows.append(
                {"users": count, "cached_users": cached, "resident_bytes": resident, "cache_bytes": cache_bytes}
            )
    if process.returncode:
        raise RuntimeError(f"the process that was measured ended with status {process.returncode}")
    return rows


def grow() -> None:
    """What the measured process does: encode users, and say what it has come to."""
    import numpy as np
    import torch

    from sasrec import Engine, SASRecConfig
    from streamrec.bench_engine import random_model

    torch.set_num_threads(1)
    cache_bytes, *sizes = map(int, sys.argv[1:])
    model, vocab = random_model(SASRecConfig(3_416, 200, 64, 2))
    engine = Engine(model, vocab, cache_bytes=cache_bytes)
    random = np.random.default_rng(0)
    served = 0
    for users in (0, *sizes):
        while served < users:
            count = min(BATCH, users - served)
            windows = random.integers(1, len(vocab) + 1, (count, engine.max_len)).tolist()
            engine.encode(windows, range(served, served + count))
            served += count
        sys.stdout.write(f"{served} {engine.cached_users} {_resident_bytes()}\n")
        sys.stdout.flush()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
