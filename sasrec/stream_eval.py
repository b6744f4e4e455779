"""Quality over a stream: train on all earlier periods, evaluate on the next one (ADER, Mi et al., RecSys 2020).

A folder holds one file per period, ordered by the numbers in the names; a row is `session item`, oldest first. In each
cycle a model that knows periods 0..p-1 predicts every click of period p except a session's first. Items that are new in
period p are removed from its sessions. All items of earlier periods are ranked, and items of the session are not
filtered, since clicks repeat.

Rules of updating, each with its own sequence of models:

full          train from scratch on all earlier periods
incremental   train the last model further: new items get embeddings, and the windows of the newest period are trained
              together with a sample of older ones (``TrainConfig.replay``)
baselines     count all earlier periods

Each finished cycle is a line in the output folder, so that a stopped run continues where it was.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from sasrec.checkpoint import load_model, save_model
from sasrec.data.formats import DataFileError
from sasrec.data.sequences import Interactions, Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.evaluation.baselines import CountBaseline, MarkovChain, Popularity, SequentialRules
from sasrec.evaluation.metrics import Scorer, evaluate
from sasrec.inference.engine import Engine
from sasrec.model import SASRec, SASRecConfig
from sasrec.training.config import TrainConfig
from sasrec.training.plots import new_figure
from sasrec.training.train import train
from sasrec.training.warm_start import resize_model

Rule = Literal["full", "incremental", "baselines"]
K = 20
SETTINGS, CYCLES = "settings.json", "cycles.jsonl"


@dataclass(frozen=True)
class Cycle:
    """Figures on a period of a model, or a baseline, that knows the periods before it."""

    name: str
    period: int
    recall: float  # @20
    mrr: float  # @20
    cases: int
    train_s: float  # CPU time: the machine may be shared


def read_periods(folder: Path) -> Interactions:
    """Read all events of a folder in order; an event's timestamp is the number of its period, counted from 0.

    Raises:
        DataFileError: there are fewer than two files, or a row is damaged.
    """
    numbers = {path: [int(n) for n in re.findall(r"\d+", path.name)] for path in folder.glob("*.txt*")}
    paths = sorted((path for path, found in numbers.items() if found), key=lambda path: numbers[path])
    if len(paths) < 2:
        raise DataFileError(
            f"{folder} holds {len(paths)} files NAME_NUMBER.txt[.gz], one per period; at least two are needed"
        )
    users: list[str] = []
    items: list[str] = []
    ends = []
    for period, path in enumerate(paths):
        try:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            rows = [line.split() for line in text.decode().splitlines()]
        except (OSError, EOFError, ValueError) as error:
            raise DataFileError(f"{path} cannot be read: {error}") from error
        wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
        if wrong is not None:
            raise DataFileError(f"{path}, line {wrong}: a session and an item are expected, separated by a space")
        users += [f"{period}/{session}" for session, _ in rows]
        items += [item for _, item in rows]
        ends.append(len(items))
    return Interactions(users, items, np.repeat(np.arange(len(paths)), np.diff(ends, prepend=0)))


class StreamEvaluation:
    """The cycles over one folder of periods, with one set of settings, stored in one output folder.

    Args:
        config: the shape of the models; its ``num_items`` is ignored.
        scratch: for models that are trained from scratch.
        update: for models that are trained further.

    Raises:
        DataFileError: the output folder holds cycles of other settings or data.
    """

    def __init__(
        self, folder: Path, out: Path, config: SASRecConfig, scratch: TrainConfig, update: TrainConfig, progress: bool
    ) -> None:
        self.events = read_periods(folder)
        self.out, self.config, self.scratch, self.update, self.progress = out, config, scratch, update, progress
        self.periods = int(self.events.timestamps_ms[-1]) + 1
        settings = {
            "events": len(self.events),
            "periods": self.periods,
            "model": asdict(replace(config, num_items=1)),
            "scratch": asdict(scratch),
            "update": asdict(update),
        }
        path = out / SETTINGS
        out.mkdir(parents=True, exist_ok=True)
        if path.exists() and json.loads(path.read_text()) != settings:
            raise DataFileError(f"{out} holds cycles of other settings or data; name another folder, or remove it")
        path.write_text(json.dumps(settings, indent=1))

    def cycles(self) -> list[Cycle]:
        """Read the finished cycles."""
        path = self.out / CYCLES
        lines = path.read_text().splitlines() if path.exists() else []
        return [Cycle(**json.loads(line)) for line in lines]

    def run(self, rules: Sequence[Rule], periods: Collection[int] = ()) -> Iterator[Cycle]:
        """Run the cycles that are not finished, and yield each.

        Args:
            periods: evaluate only on these; all by default. The incremental rule always runs all.
        """
        for rule in rules:
            for period in range(1, self.periods):
                if periods and rule != "incremental" and period not in periods:
                    continue
                done = {(cycle.name, cycle.period) for cycle in self.cycles()}
                names = list(_baselines()) if rule == "baselines" else [rule]
                if all((name, period) in done for name in names):
                    continue
                found = self._run_baselines(period) if rule == "baselines" else [self._run_model(rule, period)]
                with (self.out / CYCLES).open("a") as file:
                    file.writelines(json.dumps(asdict(cycle)) + "\n" for cycle in found)
                if rule == "incremental" and period > 1:
                    shutil.rmtree(self._model(period - 1), ignore_errors=True)
                yield from found

    def _run_baselines(self, period: int) -> list[Cycle]:
        past = self._past(period)
        sequences = Sequences.build(past, ItemVocab.from_items(past.item_ids))
        found = []
        for name, baseline in _baselines().items():
            started = time.process_time()
            baseline.fit(sequences)
            found.append(self._evaluate(name, period, baseline, sequences.vocab, time.process_time() - started))
        return found

    def _run_model(self, rule: Rule, period: int) -> Cycle:
        started = time.process_time()
        past = self._past(period)
        if rule == "full" or period == 1:
            vocab = ItemVocab.from_items(past.item_ids)
            config = replace(self.config, num_items=len(vocab))
            model, _ = train(config, Sequences.build(past, vocab), self.scratch, progress=self.progress)
        else:
            model, vocab = self._train_further(past, period)
        train_s = time.process_time() - started
        if rule == "incremental":
            save_model(self._model(period), model, vocab)
        return self._evaluate(rule, period, Engine(model, vocab, cache_bytes=0, index="exact"), vocab, train_s)

    def _train_further(self, past: Interactions, period: int) -> tuple[SASRec, ItemVocab]:
        before = load_model(self._model(period - 1))
        new = past.where(past.timestamps_ms == period - 1)
        vocab = before.vocab.extended(new.item_ids)
        config = replace(self.config, num_items=len(vocab))
        sequences = Sequences.build(past, vocab)
        sessions = set(new.user_ids)
        is_new = np.array([session in sessions for session in sequences.user_ids])
        model, _ = train(
            config,
            sequences,
            self.update,
            initial=resize_model(before.model, config, sequences),
            new_events=np.diff(sequences.offsets) * is_new,
            progress=self.progress,
        )
        return model, vocab

    def _evaluate(self, name: str, period: int, scorer: Scorer, vocab: ItemVocab, train_s: float) -> Cycle:
        test = Sequences.build(self.events.where(self.events.timestamps_ms == period), vocab)
        metrics = evaluate(scorer, test.each_after_the_first(), (K,), filter_seen=False)
        return Cycle(name, period, metrics.hr[K], metrics.mrr[K], metrics.cases, train_s)

    def _past(self, period: int) -> Interactions:
        return self.events.where(self.events.timestamps_ms < period)

    def _model(self, period: int) -> Path:
        return self.out / f"model-{period}"


def table(cycles: Sequence[Cycle]) -> Iterator[str]:
    """Yield the lines of a table with the means over the cycles of each name."""
    yield f"{'':24}  cycles   R@{K}   MRR@{K}  CPU s to train a cycle"
    for name in dict.fromkeys(cycle.name for cycle in cycles):
        own = [(cycle.recall, cycle.mrr, cycle.train_s) for cycle in cycles if cycle.name == name]
        recall, mrr, seconds = np.mean(own, axis=0).tolist()
        yield f"{name:24}  {len(own):6}  {recall:.4f}   {mrr:.4f}  {seconds:22.1f}"


def plot(cycles: Sequence[Cycle], path: Path) -> None:
    """Draw R@20 and MRR@20 by period into an image file, in the format of its suffix.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9, 4)
    names = [name for name in dict.fromkeys(cycle.name for cycle in cycles) if name != "popularity"]  # far below
    metrics = (f"R@{K}", attrgetter("recall")), (f"MRR@{K}", attrgetter("mrr"))
    for number, (title, metric) in enumerate(metrics, start=1):
        axes = figure.add_subplot(1, 2, number, xlabel="period", title=title)
        for name in names:
            own = sorted((cycle for cycle in cycles if cycle.name == name), key=lambda cycle: cycle.period)
            model = name in get_args(Rule)
            axes.plot(
                [cycle.period for cycle in own],
                [metric(cycle) for cycle in own],
                label=name,
                linewidth=2.0 if model else 1.0,
                linestyle="-" if model else "--",
            )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110)


def _baselines() -> dict[str, CountBaseline]:
    return {
        "popularity": Popularity(),
        "Markov chain": MarkovChain(),
        "rules": SequentialRules(),
        "rules and reminder": SequentialRules(remind=1.0),
    }
