"""The options of the command line: `sasrec train`, `evaluate` and `stream-eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sasrec.data.options import FILE_HELP, add_column_options
from sasrec.model import SASRecConfig
from sasrec.stream_eval import Rule
from sasrec.training.config import TrainConfig

Run = Callable[[argparse.Namespace], int]
# add_subparsers returns a type without a public name
Commands = Any


def make_parser(train: Run, evaluate: Run, stream_eval: Run) -> argparse.ArgumentParser:
    """Return the parser; each command sets ``run`` to its function."""
    parser = argparse.ArgumentParser(prog="sasrec", description="Train and evaluate SASRec models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands, train)
    _add_evaluate(commands, evaluate)
    _add_stream_eval(commands, stream_eval)
    return parser


def _add_train(commands: Commands, run: Run) -> None:
    command = commands.add_parser(
        "train",
        help="train a model on a file of interactions and write a model directory",
        description="Train a model and write a model directory. By default each user's last event is held out for "
        "`sasrec evaluate`, and the one before it for validation and early stopping.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="the model directory to write")
    command.add_argument(
        "--hold-out",
        type=int,
        choices=(0, 1, 2),
        default=2,
        help="last events of each user held out: 2 test and validation, 1 validation, 0 none (no early stopping) [2]",
    )
    _add_filters(command)
    command.add_argument(
        "--outcomes",
        metavar="SCALE",
        type=_scale,
        help="learn from outcome or rating, divided by SCALE: labels in 0..1, or with mse any number [all events 1]",
    )
    _add_fields(command, "the model", SASRecConfig, skip={"num_items"})
    _add_fields(command, "training", TrainConfig, skip={"replay"})
    command.set_defaults(run=run)


def _add_evaluate(commands: Commands, run: Run) -> None:
    command = commands.add_parser(
        "evaluate",
        help="evaluate a model on each user's last event, over the full catalogue",
        description="Rank the whole catalogue for each user's last event, after all earlier events, and print HR, NDCG "
        "and MRR @k, with seen items filtered and not filtered. A model that was trained on this file with the default "
        "--hold-out 2 and equal --min-... options has never seen these events.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    command.add_argument("--model", metavar="DIR", type=Path, required=True, help="a model directory")
    command.add_argument("--k", type=int, nargs="+", default=[10, 20], metavar="INT", help="cut-offs [10 20]")
    _add_filters(command)
    command.add_argument(
        "--baselines", action="store_true", help="evaluate count-based baselines too, fitted on all but the last events"
    )
    command.add_argument(
        "--negatives",
        metavar="INT",
        type=int,
        default=0,
        help="rank each last event only against this number of random unseen items, as older papers do: figures are "
        "too high, and can reorder models [the whole catalogue]",
    )
    command.add_argument("--seed", metavar="INT", type=int, default=42, help="of the random items [42]")
    command.add_argument(
        "--slack",
        metavar="INT",
        type=int,
        help="events by which a full window jumps; 1 always shows the model the newest max_len events [as when served]",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=run)


def _add_stream_eval(commands: Commands, run: Run) -> None:
    command = commands.add_parser(
        "stream-eval",
        help="compare ways of retraining over a stream of periods",
        description="For each period: train on all earlier periods, and evaluate on every click of this one except a "
        "session's first: R@20 and MRR@20, over all items of earlier periods, seen items not filtered. FOLDER holds a "
        "file per period, NAME_NUMBER.txt[.gz], with rows `session item`, oldest first. A stopped run continues.",
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="one file per period")
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for cycles and models")
    command.add_argument(
        "--rules",
        nargs="+",
        choices=get_args(Rule),
        default=list(get_args(Rule)),
        metavar="RULE",
        help="full: train from scratch on all earlier periods; incremental: train the last model further; baselines "
        "[all]",
    )
    command.add_argument(
        "--periods",
        nargs="+",
        type=int,
        default=(),
        metavar="N",
        help="with full and baselines, run only these cycles [all]",
    )
    command.add_argument("--update-epochs", metavar="INT", type=int, help="epochs of incremental cycles [--epochs]")
    command.add_argument(
        "--update-learning-rate", metavar="FLOAT", type=float, help="of incremental cycles [--learning-rate]"
    )
    command.add_argument("--update-batch-size", metavar="INT", type=int, help="of incremental cycles [--batch-size]")
    command.add_argument("--json", action="store_true", help="print a JSON object per cycle instead of a table")
    command.add_argument("--plot", metavar="FILE", type=Path, help="draw R@20 and MRR@20 by period (.png, .svg, ...)")
    _add_fields(command, "the model", SASRecConfig, skip={"num_items"})
    _add_fields(command, "training", TrainConfig, skip={"patience", "restore_best"})
    command.set_defaults(run=run)


def _add_filters(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--min-outcome", metavar="NUMBER", type=float, help="drop events with a lower outcome or rating"
    )
    command.add_argument(
        "--min-user-events", metavar="INT", type=int, default=2, help="drop users with fewer events [2]"
    )
    command.add_argument(
        "--min-item-events", metavar="INT", type=int, default=1, help="drop items with fewer events [1]"
    )
    add_column_options(command)


def _scale(text: str) -> float:
    scale = float(text)
    if not 0 < scale < float("inf"):
        raise argparse.ArgumentTypeError("must be a number above 0")
    return scale


def _add_fields(command: argparse.ArgumentParser, title: str, config: type, skip: set[str]) -> None:
    """Add a flag for each hyper-parameter; those marked as advanced are a group of their own."""
    usual, advanced = command.add_argument_group(title), command.add_argument_group(f"{title}, rarely needed")
    types = get_type_hints(config)
    for spec in fields(config):
        if spec.name in skip:
            continue
        group = advanced if spec.metadata["advanced"] else usual
        choices = get_args(types[spec.name]) if get_origin(types[spec.name]) is Literal else None
        flag = "--" + spec.name.replace("_", "-")
        if isinstance(spec.default, bool):
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=spec.default,
                help=f"{spec.metadata['help']} [{spec.default}]",
            )
            continue
        kind = int if spec.default is None else type(spec.default)
        shown = "" if spec.default is None else f" [{spec.default}]"
        group.add_argument(
            flag,
            type=kind,
            choices=choices,
            default=spec.default,
            metavar=None if choices else kind.__name__.upper(),
            help=spec.metadata["help"] + shown,
        )
