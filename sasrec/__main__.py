"""The small command line of the model library: train, evaluate, stream-eval."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sasrec.checkpoint import ModelDirectoryError, check_destination, load_model, save_model
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
from sasrec.training.train import Loss, Schedule, TrainConfig, TrainingError, Windows, train


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
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
    parser = argparse.ArgumentParser(prog="sasrec", description="Train and judge SASRec models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train",
        help="train a model on a file of interactions and write a model directory",
        description="Train a model and write a model directory. Each user's last event is kept back for `sasrec "
        "evaluate`, the one before it for validation and early stopping; --hold-out says otherwise.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="the model directory to write")
    command.add_argument(
        "--hold-out", type=int, choices=(0, 1, 2), default=2,
        help="last events of each user kept back: 2 test and validation, 1 validation, 0 none (no early stopping) [2]",
    )  # fmt: skip
    _add_filters(command)
    command.add_argument(
        "--outcomes", metavar="SCALE", type=_scale,
        help="learn from outcome or rating, divided by SCALE: labels in 0..1, or with mse any number [all count 1]",
    )  # fmt: skip
    _add_fields(command.add_argument_group("the model"), SASRecConfig, skip={"num_items"})
    _add_fields(command.add_argument_group("training"), TrainConfig, skip={"replay"})
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "evaluate",
        help="judge a model on each user's last event, over the full catalogue",
        description="Rank the whole catalogue for each user's last event, after all the events before it, and print "
        "HR, NDCG and MRR @k with seen items left out and with them kept. Trained with the default --hold-out 2 on "
        "the same file, with the same --min-... options, the model has never seen these events.",
    )
    command.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    command.add_argument("--model", metavar="DIR", type=Path, required=True, help="a model directory")
    command.add_argument("--k", type=int, nargs="+", default=[10, 20], metavar="INT", help="cut-offs [10 20]")
    _add_filters(command)
    command.add_argument(
        "--baselines", action="store_true", help="judge count-based baselines too, fitted on all but the last events"
    )
    command.add_argument(
        "--negatives", metavar="INT", type=int, default=0,
        help="rank each last event against so many random unseen items only, as older papers do: flatters, and can "
        "reorder models [the whole catalogue]",
    )  # fmt: skip
    command.add_argument("--seed", metavar="INT", type=int, default=42, help="of these random items [42]")
    command.add_argument(
        "--slack", metavar="INT", type=int,
        help="how far a full window jumps; 1 always shows the model the newest max_len events [as it is served]",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser(
        "stream-eval",
        help="judge ways of retraining over a stream of periods",
        description="Train on the periods so far, judge on every click of the next one but a session's first, and so "
        "on: R@20 and MRR@20, all items seen so far ranked, seen ones kept. FOLDER holds a file a period, "
        "NAME_NUMBER.txt[.gz], with rows `session item` in the order of time. A run that was stopped goes on.",
    )
    command.add_argument("folder", metavar="FOLDER", type=Path, help="one file a period")
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="where cycles and models are kept")
    command.add_argument(
        "--rules", nargs="+", choices=get_args(Rule), default=list(get_args(Rule)), metavar="RULE",
        help="full: from the beginning on everything so far; incremental: the last model trained on; baselines [all]",
    )  # fmt: skip
    command.add_argument(
        "--periods", nargs="+", type=int, default=(), metavar="N",
        help="of full and baselines, do these cycles alone [all]",
    )  # fmt: skip
    command.add_argument("--update-epochs", metavar="INT", type=int, help="epochs of incremental cycles [--epochs]")
    command.add_argument("--update-learning-rate", metavar="FLOAT", type=float, help="theirs [--learning-rate]")
    command.add_argument("--update-batch-size", metavar="INT", type=int, help="theirs [--batch-size]")
    command.add_argument("--json", action="store_true", help="print a JSON object a cycle instead of a table")
    command.add_argument("--plot", metavar="FILE", type=Path, help="draw R@20 and MRR@20 by period (.png, .svg, ...)")
    _add_fields(command.add_argument_group("the model"), SASRecConfig, skip={"num_items"})
    _add_fields(command.add_argument_group("training"), TrainConfig, skip={"patience", "restore_best"})
    command.set_defaults(run=_stream_eval)
    return parser


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


def _add_fields(group: Any, config: type, skip: set[str]) -> None:
    """One flag a dataclass field, so that hyper-parameters are listed once."""
    for spec in fields(config):
        if spec.name in skip:
            continue
        choices = {
            "position": ("learned", "rope"), "loss": get_args(Loss), "schedule": get_args(Schedule),
            "windows": get_args(Windows),
        }.get(spec.name)  # fmt: skip
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
    return {spec.name: getattr(options, spec.name) for spec in fields(config) if hasattr(options, spec.name)}


def _train(options: argparse.Namespace) -> int:
    how = TrainConfig(**_pick(TrainConfig, options))
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
    if not on_terminal:  # a line an epoch in the log of a long training, instead of a bar
        logging.getLogger("sasrec.training.train").setLevel(logging.INFO)
    model, result = train(config, sequences, how, validation, progress=on_terminal)
    metrics = {} if result.best.validation is None else result.best.validation.as_dict()
    metadata = {
        "train_config": asdict(how),
        "epochs": len(result.epochs),
        "best_epoch": result.best_epoch + 1,
        "validation": metrics,
        "trained_until_ms": int(interactions.timestamps_ms.max()),
    }
    version = save_model(options.out, model, vocab, metadata)
    judged = "".join(f", validation {name} {metrics[name]:.4f}" for name in ("hr@10", "ndcg@10") if name in metrics)
    print(f"model {version} in {options.out}: best of {len(result.epochs)} epochs {result.best_epoch + 1}{judged}")
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
    report = {name: _judge(rival, holdout, options.k, sampled) for name, rival in rivals.items()}
    if options.json:
        print(json.dumps({"version": saved.version} | report))
        return 0
    candidates = f"{options.negatives} random items" if options.negatives else f"all {len(saved.vocab):,} items"
    print(f"model {saved.version}: the last event of {len(holdout):,} users, ranked against {candidates}")
    for how in report["model"]:
        print(f"\n{how.replace('_', ' ')}")
        for name, metrics in report.items():
            values = (f"{metric} {value:.4f}" for metric, value in metrics[how].items() if metric != "cases")
            print(f"  {name:18}" + "  ".join(values))
    return 0


def _stream_eval(options: argparse.Namespace) -> int:
    scratch = replace(TrainConfig(**_pick(TrainConfig, options)), patience=0)
    chosen = {name: getattr(options, f"update_{name}") for name in ("epochs", "learning_rate", "batch_size")}
    update = replace(scratch, **{name: value for name, value in chosen.items() if value is not None})
    config = SASRecConfig(num_items=1, **_pick(SASRecConfig, options))
    on_terminal = sys.stderr.isatty()
    stream = StreamEvaluation(options.folder, options.out, config, scratch, update, progress=on_terminal)
    for cycle in stream.run(options.rules, options.periods):
        print(
            f"{cycle.name}, period {cycle.period} of {stream.periods - 1}: R@20 {cycle.recall:.4f}  MRR@20 "
            f"{cycle.mrr:.4f}  {cycle.cases:,} clicks, trained in {cycle.train_s:.1f} s of processor time",
            file=sys.stderr,
        )
    if options.plot:
        plot(stream.cycles(), options.plot)
    lines = (json.dumps(asdict(cycle)) for cycle in stream.cycles()) if options.json else table(stream.cycles())
    print("\n".join(lines))
    return 0


def _judge(scorer: Scorer, holdout: Holdout, ks: list[int], sampled: Indices | None) -> dict[str, dict[str, float]]:
    if sampled is not None:
        ranks = target_ranks(scorer, holdout, filter_seen=False, candidates=sampled)
        return {"sampled": metrics_from_ranks(ranks, ks).as_dict()}
    return {
        name: evaluate(scorer, holdout, ks, filter_seen).as_dict()
        for name, filter_seen in (("seen_filtered", True), ("seen_kept", False))
    }


if __name__ == "__main__":
    sys.exit(main())
