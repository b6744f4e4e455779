"""The command line of the model library: train, evaluate, stream-eval."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from sasrec.checkpoint import ModelDirectoryError, ModelMetadata, check_destination, load_model, save_model
from sasrec.data.formats import DataFileError
from sasrec.data.options import FILE_HELP, add_column_options, columns_from
from sasrec.data.readers import read_events
from sasrec.data.sequences import Holdout, Indices, Interactions, Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.evaluation.baselines import all_baselines
from sasrec.evaluation.metrics import Scorer, evaluate, metrics_from_ranks, sample_unseen, target_ranks
from sasrec.inference.engine import Engine
from sasrec.model import SASRecConfig
from sasrec.stream_eval import Rule, StreamEvaluation, plot, table
from sasrec.training.config import TrainConfig
from sasrec.training.train import TrainingError, train

# add_subparsers returns a type without a public name
Commands = Any


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return int(options.run(options))
    except (DataFileError, ModelDirectoryError, TrainingError, ValueError, ImportError) as error:
        print(f"sasrec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sasrec: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sasrec", description="Train and evaluate SASRec models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_stream_eval(commands)
    return parser


def _add_train(commands: Commands) -> None:
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
    command.set_defaults(run=_train)


def _add_evaluate(commands: Commands) -> None:
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
    command.set_defaults(run=_evaluate)


def _add_stream_eval(commands: Commands) -> None:
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
    command.set_defaults(run=_stream_eval)


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


def _read(options: argparse.Namespace, scale: float | None = None) -> Interactions:
    """Return the interactions that the options leave; with outcomes if the model learns from them."""
    rated = scale is not None or options.min_outcome is not None
    interactions = Interactions.from_events(read_events(options.file, columns_from(options), outcomes=rated))
    if options.min_outcome is not None:
        interactions = interactions.at_least_outcome(options.min_outcome)
    outcomes = None if scale is None or interactions.outcomes is None else interactions.outcomes / np.float32(scale)
    left = replace(interactions, outcomes=outcomes).at_least(options.min_user_events, options.min_item_events)
    if not len(left):
        filters = {
            "--min-outcome": options.min_outcome,
            "--min-user-events": options.min_user_events,
            "--min-item-events": options.min_item_events,
        }
        given = ", ".join(f"{flag}={value}" for flag, value in filters.items() if value is not None)
        raise DataFileError(f"{options.file}: no event is left; lower {given}")
    return left


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


def _pick(config: type, options: argparse.Namespace) -> dict[str, Any]:
    given = vars(options)
    return {spec.name: given[spec.name] for spec in fields(config) if spec.name in given}


def _train(options: argparse.Namespace) -> int:
    train_config = TrainConfig(**_pick(TrainConfig, options))
    check_destination(options.out)
    interactions = _read(options, options.outcomes)
    vocab = ItemVocab.from_items(interactions.item_ids)
    config = SASRecConfig(num_items=len(vocab), **_pick(SASRecConfig, options))
    sequences = Sequences.build(interactions, vocab)
    print(f"{len(interactions):,} events, {len(sequences):,} users, {len(vocab):,} items")
    validation = None
    for _ in range(options.hold_out):
        sequences, validation = sequences.leave_last_out()
    on_terminal = sys.stderr.isatty()
    if not on_terminal:  # a log line per epoch instead of a progress bar
        logging.getLogger("sasrec.training.train").setLevel(logging.INFO)
    model, result = train(config, sequences, train_config, validation, progress=on_terminal)
    metrics = {} if result.best.validation is None else result.best.validation.as_dict()
    metadata: ModelMetadata = {
        "train_config": asdict(train_config),
        "epochs": len(result.epochs),
        "best_epoch": result.best_epoch + 1,
        "validation": metrics,
        "trained_until_ms": int(interactions.timestamps_ms.max()),
    }
    version = save_model(options.out, model, vocab, metadata)
    figures = "".join(f", validation {name} {metrics[name]:.4f}" for name in ("hr@10", "ndcg@10") if name in metrics)
    print(f"model {version} in {options.out}: best of {len(result.epochs)} epochs {result.best_epoch + 1}{figures}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    saved = load_model(options.model)
    sequences = Sequences.build(_read(options), saved.vocab)
    rest, holdout = sequences.leave_last_out()
    if not len(holdout):
        raise DataFileError(f"{options.file}: no user has two events on items that the model knows")
    engine = Engine(saved.model, saved.vocab, cache_bytes=0, slack=options.slack, index="exact")
    rivals: dict[str, Scorer] = {"model": engine}
    if options.baselines:
        rivals |= {name: baseline.fit(rest) for name, baseline in all_baselines().items()}
    sampled = None
    if options.negatives:
        sampled = sample_unseen(holdout, len(saved.vocab), options.negatives, options.seed)
    report = {name: _figures(rival, holdout, options.k, sampled) for name, rival in rivals.items()}
    if options.json:
        print(json.dumps({"version": saved.version} | report))
        return 0
    candidates = f"{options.negatives} random items" if options.negatives else f"all {len(saved.vocab):,} items"
    print(f"model {saved.version}: the last event of {len(holdout):,} users, ranked against {candidates}")
    for protocol in report["model"]:
        print(f"\n{protocol.replace('_', ' ')}")
        for name, metrics in report.items():
            values = (f"{metric} {value:.4f}" for metric, value in metrics[protocol].items() if metric != "cases")
            print(f"  {name:18}" + "  ".join(values))
    return 0


def _stream_eval(options: argparse.Namespace) -> int:
    scratch = replace(TrainConfig(**_pick(TrainConfig, options)), patience=0)
    changes = {
        "epochs": options.update_epochs,
        "learning_rate": options.update_learning_rate,
        "batch_size": options.update_batch_size,
    }
    update = replace(scratch, **{name: value for name, value in changes.items() if value is not None})
    config = SASRecConfig(num_items=1, **_pick(SASRecConfig, options))
    on_terminal = sys.stderr.isatty()
    stream = StreamEvaluation(options.folder, options.out, config, scratch, update, progress=on_terminal)
    for cycle in stream.run(options.rules, options.periods):
        print(
            f"{cycle.name}, period {cycle.period} of {stream.periods - 1}: R@20 {cycle.recall:.4f}  MRR@20 "
            f"{cycle.mrr:.4f}  {cycle.cases:,} clicks, trained in {cycle.train_s:.1f} s of CPU time",
            file=sys.stderr,
        )
    if options.plot:
        plot(stream.cycles(), options.plot)
    lines = (json.dumps(asdict(cycle)) for cycle in stream.cycles()) if options.json else table(stream.cycles())
    print("\n".join(lines))
    return 0


def _figures(scorer: Scorer, holdout: Holdout, ks: list[int], sampled: Indices | None) -> dict[str, dict[str, float]]:
    if sampled is not None:
        ranks = target_ranks(scorer, holdout, filter_seen=False, candidates=sampled)
        return {"sampled": metrics_from_ranks(ranks, ks).as_dict()}
    return {
        name: evaluate(scorer, holdout, ks, filter_seen).as_dict()
        for name, filter_seen in (("seen_filtered", True), ("seen_kept", False))
    }


if __name__ == "__main__":
    sys.exit(main())
