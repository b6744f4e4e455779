"""`streamrec bench`: what this machine does with a model of this shape, each figure beside its naive counterpart."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from sasrec import ModelDirectoryError, load_model
from sasrec.inference.index import MISSING
from sasrec.model import SASRecConfig
from streamrec.bench.catalogue import measure_catalogue
from streamrec.bench.daemon import QUICK, Load, measure_daemon
from streamrec.bench.engine import (
    BATCHES,
    SHAPES,
    Subject,
    measure_engine,
    measure_half_cache,
    one_thread,
    random_model,
)
from streamrec.bench.memory import USERS, measure_redis, measure_resident
from streamrec.bench.peers import check_peers, measure_peers
from streamrec.errors import StreamrecError
from streamrec.local.daemon import forget_environment
from streamrec.local.movielens import fetch_movielens
from streamrec.local.servers import kafka_command, redis_command
from streamrec.source import git

PARTS = ("engine", "daemon", "memory", "catalogue")
PEERS = "peers"  # only where it is asked for: it needs what nothing else needs
VERSIONS = ("streamrec", "torch", "numpy", "numba", "faiss-cpu", "scikit-rec")
QUICK_CATALOGUE, CATALOGUE = (3_416, 100_000), (3_416, 100_000, 1_000_000)
QUICK_USERS = USERS[:1]
QUICK_BATCHES = (16, 64)
QUICK_LISTS, LISTS = 32, 256  # that are compared, of a cache in either precision
MIB = 2**20


@dataclass(frozen=True)
class BenchOptions:
    """What the command line asks for.

    Args:
        model_dir: measure this model; without it, and without ``shape``, three usual shapes with random weights.
        quick: less of everything, within a minute.
        ratings: what the peers are trained on; MovieLens 100K, fetched on first use, by default.
    """

    parts: Sequence[str] = PARTS
    model_dir: Path | None = None
    shape: SASRecConfig | None = None
    quick: bool = False
    cache_bytes: int = 512 * MIB
    ratings: Path | None = None


def run_bench(options: BenchOptions, console: Console) -> dict[str, Any]:
    """Measure the parts, saying on the console which; returns what `--json` prints.

    Raises:
        StreamrecError: the model cannot be read, or a part needs what is not installed.
    """
    _check_installed(options.parts)
    ratings = (options.ratings or fetch_movielens()) if PEERS in options.parts else None
    if ratings is not None and not ratings.is_file():
        raise StreamrecError(f"there is no file {ratings}")
    subjects = _subjects(options)
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "commit": git("describe", "--always", "--dirty"),
    }
    with console.status("") as status:

        def progress(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text, highlight=False)

        if "engine" in options.parts:
            batches, repeats = (QUICK_BATCHES, 1) if options.quick else (BATCHES, 3)
            report["engine"] = measure_engine(subjects, batches, repeats, progress)
        if "daemon" in options.parts:
            forget_environment()  # servers and folders are its own, whatever else is served from this shell
            load = QUICK if options.quick else Load()
            report["daemon"] = measure_daemon(_served(options, subjects), load, options.cache_bytes, progress)
        if "memory" in options.parts:
            progress("memory: precision of the cache")
            lists = QUICK_LISTS if options.quick else LISTS
            report["memory"] = {
                "cached_user": [measure_half_cache(subject, lists) for subject in subjects],
                "redis_user": [measure_redis(subject) for subject in _of_each_length(subjects)],
                "process": measure_resident(options.cache_bytes, QUICK_USERS if options.quick else USERS, progress),
            }
        if "catalogue" in options.parts:
            sizes, repeats = (QUICK_CATALOGUE, 3) if options.quick else (CATALOGUE, 7)
            with one_thread():
                report["catalogue"] = measure_catalogue(
                    sizes, repeats=repeats, progress=lambda text: progress(f"catalogue: {text}")
                )
        if ratings is not None:
            report |= measure_peers(ratings, 1 if options.quick else 5, progress=progress)
    return report


def _check_installed(parts: Sequence[str]) -> None:
    """Rather now than after minutes of measuring.

    Raises:
        StreamrecError: a part needs what is not there; what to install.
    """
    if "daemon" in parts:
        redis_command(0, Path()), kafka_command(0, Path())
    if PEERS in parts:
        check_peers()
    if "memory" in parts:
        redis_command(0, Path())
    if "catalogue" in parts and find_spec("faiss") is None:
        raise StreamrecError(f"the catalogue part needs {MISSING}")


def _subjects(options: BenchOptions) -> list[Subject]:
    if options.model_dir is not None:
        try:
            saved = load_model(options.model_dir)
        except ModelDirectoryError as error:
            raise StreamrecError(str(error)) from None
        return [Subject(saved.model.eval(), saved.vocab)]
    return [random_model(shape) for shape in (SHAPES if options.shape is None else (options.shape,))]


def _served(options: BenchOptions, subjects: Sequence[Subject]) -> Subject:
    """The one that the daemon is measured with: the one there is, or of the usual shapes the second."""
    usual = options.model_dir is None and options.shape is None
    return subjects[1 if usual else 0]


def _of_each_length(subjects: Sequence[Subject]) -> list[Subject]:
    return list({subject.model.config.max_len: subject for subject in subjects}.values())


def machine() -> dict[str, Any]:
    """Processor, cores and system that a figure was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of what the figures depend on, where installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
