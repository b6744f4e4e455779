"""The memory of users: in the process as their number grows, and in Redis."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import psutil
import torch

from sasrec import Engine, SASRecConfig
from streamrec.bench.engine import Subject, random_model
from streamrec.bench.users import fill_windows
from streamrec.errors import StreamrecError
from streamrec.local.servers import LocalServers
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.schemas import Recommendation
from streamrec.serving.publisher import Publisher
from streamrec.settings_sources import load_settings

USERS = (1_000, 10_000, 100_000)
PROCESS = ("-m", "streamrec.bench.memory")
USERS_PER_BATCH = 256


def measure_resident(
    cache_bytes: int, users: Sequence[int] = USERS, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, int]]:
    """Measure the resident size of a process as it serves more and more users with windows of 200 items.

    One process serves all numbers of users, so that the differences are free of its start.

    Returns:
        A row for 0 users, then one for each of ``users``: ``users``, ``cached_users``, ``resident_bytes``,
        ``cache_bytes``.
    """
    command = [sys.executable, *PROCESS, str(cache_bytes), *map(str, users)]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            count, cached, resident = map(int, line.split())
            progress(f"memory: {count:,} users")
            rows.append(
                {
                    "users": count,
                    "cached_users": cached,
                    "resident_bytes": resident,
                    "cache_bytes": cache_bytes,
                }
            )
    if process.returncode:
        raise StreamrecError(f"the measured process ended with status {process.returncode}")
    return rows


def serve_users(cache_bytes: int, sizes: Sequence[int]) -> None:
    """Encode users, and print a line at each size: users, cached users, resident bytes."""
    torch.set_num_threads(1)
    model, vocab = random_model(SASRecConfig(3_416, 200, 64, 2))
    engine = Engine(model, vocab, cache_bytes=cache_bytes)
    random = np.random.default_rng(0)
    served = 0
    for users in (0, *sizes):
        while served < users:
            count = min(USERS_PER_BATCH, users - served)
            windows = random.integers(1, len(vocab) + 1, (count, engine.max_len)).tolist()
            engine.encode(windows, range(served, served + count))
            served += count
        sys.stdout.write(f"{served} {engine.cached_users} {psutil.Process().memory_info().rss}\n")
        sys.stdout.flush()


def measure_redis(subject: Subject, users: int = 2_000) -> dict[str, int]:
    """Measure the memory per user in Redis, including the overhead of keys.

    Returns:
        ``max_len``; ``sequence_bytes``: a full window; ``list_bytes``: a published list of the default length.
    """
    servers = LocalServers()
    servers.redis.start()
    try:
        settings = load_settings(flags={"redis_url": servers.redis_url})

        async def run() -> dict[str, int]:
            async with RedisClient(settings.redis) as redis:
                used = [await redis.memory_bytes()]
                sequences = await fill_windows(redis, settings, subject, users)
                used.append(await redis.memory_bytes())
                lists = [
                    Recommendation(
                        s.user_id, s.items[-settings.lists.top_k :], scores, "0" * 12, s.last_event_ts_ms, s.n
                    )
                    for s in sequences
                ]
                await Publisher(redis, settings.lists.ttl_s, Metrics()).publish(lists)
                used.append(await redis.memory_bytes())
            sequence, published = ((after - before) // users for before, after in pairwise(used))
            return {"max_len": subject.model.config.max_len, "sequence_bytes": sequence, "list_bytes": published}

        scores = [-12.34567] * settings.lists.top_k
        return asyncio.run(run())
    finally:
        servers.stop()


if __name__ == "__main__":
    serve_users(int(sys.argv[1]), [int(size) for size in sys.argv[2:]])
