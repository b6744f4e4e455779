"""`streamrec bench`: measure this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from streamrec.commands.options import Subparsers, add_command, positive
from streamrec.errors import StreamrecError
from streamrec.settings import Settings

if TYPE_CHECKING:
    from sasrec import SASRecConfig

# the defaults of a random model's shape
SHAPE = {"items": 3_416, "hidden_units": 64, "num_blocks": 2, "num_heads": 1, "max_len": 200}


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "bench",
        run,
        ("model_dir", "inference_cache_bytes"),
        "measure this machine: the cost of a click, memory, large catalogues",
        "Measure the cost of a click on this machine with your own model, a random model of the given shape, or random "
        "models of three usual shapes. Each figure comes with its naive counterpart from the same run.",
    )
    command.add_argument(
        "--only",
        nargs="+",
        choices=("engine", "daemon", "memory", "catalogue", "peers"),
        metavar="PART",
        help="engine: a cached click against re-encoding; daemon: throughput and latency; memory: bytes per user; "
        "catalogue: lists from many items [these four]; peers: training and recommending against scikit-rec",
    )
    command.add_argument("--quick", action="store_true", help="shorter measurements, within a minute")
    command.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the figures to FILE; -: print them instead of the tables"
    )
    command.add_argument("--markdown", metavar="FILE", type=Path, help="also write the tables to FILE")
    command.add_argument(
        "--ratings", metavar="FILE", type=Path, help="training data of the peers part [MovieLens 100K, fetched]"
    )
    for name, default in SHAPE.items():
        command.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"shape_{name}",
            type=positive,
            help=f"{name} of a random model [{default}]",
        )


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    from rich.console import Console

    from streamrec.bench.report import as_markdown, as_table, sections
    from streamrec.bench.run import PARTS, BenchOptions, run_bench

    cache_bytes = settings.inference.cache_bytes
    bench = BenchOptions(
        options.only or PARTS,
        settings.model.dir,
        _shape(settings, options),
        options.quick,
        cache_bytes,
        options.ratings,
    )
    report = run_bench(bench, Console(stderr=True))
    text = json.dumps(report, indent=1) + "\n"
    to_stdout = options.json == Path("-")
    for file, content in ((None if to_stdout else options.json, text), (options.markdown, as_markdown(report))):
        if file is not None:
            try:
                file.write_text(content)
            except OSError as error:
                raise StreamrecError(f"cannot write {file}: {error.strerror}") from None
    if to_stdout:
        print(text, end="")
    else:
        Console().print(*map(as_table, sections(report)), sep="\n")
    return 0


def _shape(settings: Settings, options: argparse.Namespace) -> SASRecConfig | None:
    """Return the given shape of a random model; None if no part of it is given."""
    from sasrec import SASRecConfig

    given = {name: value for name in SHAPE if (value := vars(options)[f"shape_{name}"]) is not None}
    if not given:
        return None
    if settings.model.dir:
        raise StreamrecError("give a model or a shape, not both")
    shape = SHAPE | given
    try:
        return SASRecConfig(shape.pop("items"), **shape)
    except ValueError as error:
        raise StreamrecError(str(error)) from None
