"""The command line of the model library: train, evaluate, stream-eval."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from sasrec.checkpoint import ModelDirectoryError, ModelMetadata, check_destination, load_model, save_model
from sasrec.data.formats import DataFileError
from sasrec.data.options import columns_from
from sasrec.data.readers import read_events
from sasrec.data.sequences import Holdout, Indices, Interactions, Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.evaluation.baselines import all_baselines
from sasrec.evaluation.metrics import Scorer, evaluate, metrics_from_ranks, sample_unseen, target_ranks
from sasrec.inference.engine import Engine
from sasrec.model import SASRecConfig
from sasrec.parser import make_parser
from sasrec.stream_eval import StreamEvaluation, plot, table
from sasrec.training.config import TrainConfig
from sasrec.training.train import TrainingError, train


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return int(options.run(options))
    except (DataFileError, ModelDirectoryError, TrainingError, ValueError, ImportError) as error:
        print(_printable(f"sasrec: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sasrec: stopped", file=sys.stderr)
        return 130


def _printable(text: str) -> str:
    """Escape characters that break a line or control a terminal: ids in messages come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _parser() -> argparse.ArgumentParser:
    return make_parser(_train, _evaluate, _stream_eval)


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
