"""`streamrec bench`: what this machine does with a model of this shape, each figure beside its naive counterpart."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sasrec import ModelDirectoryError, load_model
from sasrec.index import MISSING
from sasrec.model import SASRecConfig
from streamrec.bench_catalogue import measure_catalogue
from streamrec.bench_daemon import QUICK, Load, measure_daemon
from streamrec.bench_engine import (
    BATCHES,
    SHAPES,
    Subject,
    measure_engine,
    measure_half_cache,
    one_thread,
    random_model,
)
from streamrec.bench_memory import USERS, measure_resident
from streamrec.daemon_process import forget_environment
from streamrec.embedded import kafka_command, redis_command
from streamrec.errors import StreamrecError
from streamrec.source import git

PARTS = ("engine", "daemon", "memory", "catalogue")
VERSIONS = ("streamrec", "torch", "numpy", "faiss-cpu")
QUICK_CATALOGUE, CATALOGUE = (3_416, 100_000), (3_416, 100_000, 1_000_000)
QUICK_USERS = USERS[:1]
QUICK_BATCHES = (1, 64)
MIB = 2**20


@dataclass(frozen=True)
class BenchOptions:
    """What the command line asks for.

    Args:
        model_dir: measure this model; without it, and without ``shape``, three usual shapes with random weights.
        quick: less of everything, within a minute.
    """

    parts: Sequence[str] = PARTS
    model_dir: Path | None = None
    shape: SASRecConfig | None = None
    quick: bool = False
    cache_bytes: int = 512 * MIB


def run_bench(options: BenchOptions, console: Console) -> dict[str, Any]:
    """Measure the parts, saying on the console which; returns what `--json` prints.

    Raises:
        StreamrecError: the model cannot be read, or a part needs what is not installed.
    """
    _check_installed(options.parts)
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
            report["memory"] = {
                "cached_user": [measure_half_cache(subject) for subject in subjects],
                "process": measure_resident(options.cache_bytes, QUICK_USERS if options.quick else USERS, progress),
            }
        if "catalogue" in options.parts:
            sizes = QUICK_CATALOGUE if options.quick else CATALOGUE
            with one_thread():
                report["catalogue"] = measure_catalogue(sizes, progress=lambda text: progress(f"catalogue: {text}"))
    return report


def _check_installed(parts: Sequence[str]) -> None:
    """Rather now than after minutes of measuring.

    Raises:
        StreamrecError: a part needs what is not there; what to install.
    """
    if "daemon" in parts:
        redis_command(0, Path()), kafka_command(0, Path())
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


def machine() -> dict[str, Any]:
    """Processor, cores and system that a figure was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(terse=True), "python": platform.python_version(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of what the figures depend on, where installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report for people."""
    found = []
    if "engine" in report:
        names = "hidden blocks max_len batch cached_us reencode_us full_us ratio spread"
        found.append(_table("Engine: µs a click and its list, one thread", names, report["engine"]))
    if "daemon" in report:
        found += _daemon_tables(report["daemon"])
    if "memory" in report:
        names = "hidden blocks max_len float32_bytes float16_bytes same_top_10"
        found.append(_table("Memory of a cached user", names, report["memory"]["cached_user"]))
        rows = [
            row | {"resident_MiB": row["resident_bytes"] / MIB, "cache_MiB": row["cache_bytes"] / MIB}
            for row in report["memory"]["process"]
        ]
        found.append(_table("Memory of the process", "users cached_users resident_MiB cache_MiB", rows))
    if "catalogue" in report:
        names = "items hidden batch exact_us approx_us recall_at_10 build_s spread"
        found.append(_table("Lists of ten from catalogues, µs, one thread", names, report["catalogue"]))
    return found


def _daemon_tables(row: Mapping[str, Any]) -> list[Table]:
    names = "hidden blocks max_len items users events_per_s naive_events_per_s cold_events_per_s"
    shares = [{"share": f"{share} %"} | latencies for share, latencies in row["latency_ms"].items()]
    return [
        _table("Daemon, between a real Kafka and a real Redis", names, [row]),
        _table("Click to list, ms, at a share of that rate", "share p50 p95 p99 p999 lag", shares),
    ]


def _table(title: str, names: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for name in names.split():
        table.add_column(name.replace("_", " "), justify="right", vertical="bottom")
    for row in rows:
        table.add_row(*(_number(row[name]) for name in names.split()))
    return table


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
