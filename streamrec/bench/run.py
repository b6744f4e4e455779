"""`streamrec bench`: run the parts of the benchmark on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
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
from streamrec.local.apache_kafka import java_command, kafka_home
from streamrec.local.daemon import forget_environment
from streamrec.local.movielens import fetch_movielens
from streamrec.local.servers import kafka_command, redis_command
from streamrec.source import git

PARTS = ("engine", "daemon", "memory", "catalogue")
PEERS = "peers"  # not by default: it needs scikit-rec
PACKAGES = ("streamrec", "torch", "numpy", "numba", "faiss-cpu", "scikit-rec")
QUICK_CATALOGUE, CATALOGUE = (3_416, 100_000), (3_416, 100_000, 1_000_000)
QUICK_USERS = USERS[:1]
QUICK_BATCHES = (16, 64)
QUICK_LISTS, LISTS = 32, 256  # compared lists of both cache precisions
MIB = 2**20

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """The options of the command line.

    Args:
        model_dir: the model to measure.
        shape: the shape of a random model to measure; without both, three usual shapes.
        quick: measure less, within a minute.
        ratings: training data of the peers [MovieLens 100K, fetched].
    """

    parts: Sequence[str] = PARTS
    model_dir: Path | None = None
    shape: SASRecConfig | None = None
    quick: bool = False
    cache_bytes: int = 512 * MIB
    ratings: Path | None = None


def run_bench(options: BenchOptions, console: Console) -> dict[str, Any]:
    """Measure the parts, and show progress on the console; return the report that `--json` prints.

    Raises:
        StreamrecError: the model cannot be read, or a part needs a package or server that is not installed.
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

        for part, measure in MEASURES.items():
            if part in options.parts:
                report[part] = measure(options, subjects, progress)
        if ratings is not None:
            report |= measure_peers(ratings, 1 if options.quick else 5, progress=progress)
    return report


def _engine(options: BenchOptions, subjects: Sequence[Subject], progress: Progress) -> list[dict[str, float]]:
    batches, repeats = (QUICK_BATCHES, 1) if options.quick else (BATCHES, 3)
    return measure_engine(subjects, batches, repeats, progress)


def _daemon(options: BenchOptions, subjects: Sequence[Subject], progress: Progress) -> dict[str, Any]:
    forget_environment()  # the benchmark's servers and folders are its own
    usual = options.model_dir is None and options.shape is None
    subject = subjects[1 if usual else 0]  # of the usual shapes, the second
    return measure_daemon(subject, QUICK if options.quick else Load(), options.cache_bytes, progress)


def _memory(options: BenchOptions, subjects: Sequence[Subject], progress: Progress) -> dict[str, Any]:
    progress("memory: precision of the cache")
    lists, users = (QUICK_LISTS, QUICK_USERS) if options.quick else (LISTS, USERS)
    by_length = {subject.model.config.max_len: subject for subject in subjects}
    return {
        "cached_user": [measure_half_cache(subject, lists) for subject in subjects],
        "redis_user": [measure_redis(subject) for subject in by_length.values()],
        "process": measure_resident(options.cache_bytes, users, progress),
    }


def _catalogue(options: BenchOptions, subjects: Sequence[Subject], progress: Progress) -> list[dict[str, float]]:
    sizes, repeats = (QUICK_CATALOGUE, 3) if options.quick else (CATALOGUE, 7)
    with one_thread():
        return measure_catalogue(sizes, repeats=repeats, progress=lambda text: progress(f"catalogue: {text}"))


MEASURES: dict[str, Callable[[BenchOptions, Sequence[Subject], Progress], Any]] = {
    "engine": _engine,
    "daemon": _daemon,
    "memory": _memory,
    "catalogue": _catalogue,
}


def _check_installed(parts: Sequence[str]) -> None:
    """Check the requirements of all parts before minutes of measuring.

    Raises:
        StreamrecError: one is not installed; says how to install it.
    """
    if "daemon" in parts:
        redis_command(0, Path())
        home = kafka_home(os.environ)
        kafka_command(0, Path()) if home is None else java_command(home)
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


def machine() -> dict[str, Any]:
    """Return processor, cores and system of this machine."""
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
    """Return the versions of installed packages that affect the figures."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
