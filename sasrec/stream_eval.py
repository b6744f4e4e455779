"""Quality over a stream: train on the periods so far, judge on the next one, and so on (ADER, Mi et al., RecSys 2020).

A folder holds one file a period, in the order of the numbers in their names; a row is `session item`, in the
order of time. In each cycle a model that knows periods 0..p-1 predicts every click of period p but a session's
first. Items that were never seen in training are taken out of the test sessions first; all items seen so far are
candidates, and items of the session are not filtered, since clicks repeat.

Rules of updating, each with its own line of models:

full          from the beginning on everything so far
incremental   the last model trained on: known items keep what was learned, new ones get rows, the windows of the
              new period are trained together with a sample of older ones (``TrainConfig.replay``)
baselines     counted on everything so far

What is done is kept in the output folder, a line a cycle, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
from sasrec.training.plots import new_figure
from sasrec.training.train import TrainConfig, grown, train

Rule = Literal["full", "incremental", "baselines"]
K = 20
SETTINGS, CYCLES = "settings.json", "cycles.jsonl"


@dataclass(frozen=True)
class Cycle:
    """How a model, or a baseline, that knows the periods before ``period`` did on it."""

    name: str
    period: int
    recall: float  # @20
    mrr: float  # @20
    cases: int
    train_s: float  # of processor time: the machine may be shared


def read_periods(folder: Path) -> Interactions:
    """All events of a folder in order; the timestamp of an event is the number of its period, counted from 0.

    Raises:
        DataFileError: there are fewer than two files, or a row is none.
    """
    numbers = {path: [int(n) for n in re.findall(r"\d+", path.name)] for path in folder.glob("*.txt*")}
    paths = sorted((path for path, found in numbers.items() if found), key=lambda path: numbers[path])
    if len(paths) < 2:
        raise DataFileError(f"{folder} holds {len(paths)} files NAME_NUMBER.txt[.gz], one a period; two are the least")
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
    """The cycles over one folder of periods, with one set of settings, kept in one output folder.

    Args:
        config: the shape of the models; its ``num_items`` does not count.
        scratch: how models are trained from the beginning.
        update: how they are trained on.

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
            "events": len(self.events), "periods": self.periods, "model": asdict(replace(config, num_items=1)),
            "scratch": asdict(scratch), "update": asdict(update),
        }  # fmt: skip
        path = out / SETTINGS
        out.mkdir(parents=True, exist_ok=True)
        if path.exists() and json.loads(path.read_text()) != settings:
            raise DataFileError(f"{out} holds cycles of other settings or data; name another folder, or remove it")
        path.write_text(json.dumps(settings, indent=1))

    def cycles(self) -> list[Cycle]:
        """Those that are done."""
        path = self.out / CYCLES
        lines = path.read_text().splitlines() if path.exists() else []
        return [Cycle(**json.loads(line)) for line in lines]

    def run(self, rules: Sequence[Rule], periods: Collection[int] = ()) -> Iterator[Cycle]:
        """Do the cycles that are not done yet, and tell of each.

        Args:
            periods: judge on these alone; all by default. The incremental rule needs all that come before.
        """
        for rule in rules:
            for period in range(1, self.periods):
                if periods and rule != "incremental" and period not in periods:
                    continue
                done = {(cycle.name, cycle.period) for cycle in self.cycles()}
                names = list(_baselines()) if rule == "baselines" else [rule]
                if all((name, period) in done for name in names):
                    continue
                found = self._counted(period) if rule == "baselines" else [self._trained(rule, period)]
                with (self.out / CYCLES).open("a") as file:
                    file.writelines(json.dumps(asdict(cycle)) + "\n" for cycle in found)
                if rule == "incremental" and period > 1:
                    shutil.rmtree(self._model(period - 1), ignore_errors=True)
                yield from found

    def _counted(self, period: int) -> list[Cycle]:
        past = self._past(period)
        sequences = Sequences.build(past, ItemVocab.from_items(past.item_ids))
        found = []
        for name, baseline in _baselines().items():
            started = time.process_time()
            baseline.fit(sequences)
            found.append(self._judge(name, period, baseline, sequences.vocab, time.process_time() - started))
        return found

    def _trained(self, rule: Rule, period: int) -> Cycle:
        started = time.process_time()
        past = self._past(period)
        if rule == "full" or period == 1:
            vocab = ItemVocab.from_items(past.item_ids)
            config = replace(self.config, num_items=len(vocab))
            model, _ = train(config, Sequences.build(past, vocab), self.scratch, progress=self.progress)
        else:
            model, vocab = self._trained_on(past, period)
        train_s = time.process_time() - started
        if rule == "incremental":
            save_model(self._model(period), model, vocab)
        return self._judge(rule, period, Engine(model, vocab, cache_bytes=0, index="exact"), vocab, train_s)

    def _trained_on(self, past: Interactions, period: int) -> tuple[SASRec, ItemVocab]:
        before = load_model(self._model(period - 1))
        new = past.where(past.timestamps_ms == period - 1)
        vocab = before.vocab.extended(new.item_ids)
        config = replace(self.config, num_items=len(vocab))
        sequences = Sequences.build(past, vocab)
        sessions = set(new.user_ids)
        is_new = np.array([session in sessions for session in sequences.user_ids])
        model, _ = train(
            config, sequences, self.update, initial=grown(before.model, config, sequences),
            new_events=np.diff(sequences.offsets) * is_new, progress=self.progress,
        )  # fmt: skip
        return model, vocab

    def _judge(self, name: str, period: int, scorer: Scorer, vocab: ItemVocab, train_s: float) -> Cycle:
        test = Sequences.build(self.events.where(self.events.timestamps_ms == period), vocab)
        metrics = evaluate(scorer, test.each_after_the_first(), (K,), filter_seen=False)
        return Cycle(name, period, metrics.hr[K], metrics.mrr[K], metrics.cases, train_s)

    def _past(self, period: int) -> Interactions:
        return self.events.where(self.events.timestamps_ms < period)

    def _model(self, period: int) -> Path:
        return self.out / f"model-{period}"


def table(cycles: Sequence[Cycle]) -> Iterator[str]:
    """Means over the cycles of each name, a line a name."""
    yield f"{'':24}  cycles   R@{K}   MRR@{K}  train, processor s a cycle"
    for name in dict.fromkeys(cycle.name for cycle in cycles):
        own = [cycle for cycle in cycles if cycle.name == name]
        recall, mrr, seconds = (
            float(np.mean([getattr(c, what) for c in own])) for what in ("recall", "mrr", "train_s")
        )
        yield f"{name:24}  {len(own):6}  {recall:.4f}   {mrr:.4f}  {seconds:26.1f}"


def plot(cycles: Sequence[Cycle], path: Path) -> None:
    """Draw R@20 and MRR@20 period by period into an image file; the ending of its name is its format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9, 4)
    names = [name for name in dict.fromkeys(cycle.name for cycle in cycles) if name != "popularity"]  # far below
    for number, (what, title) in enumerate((("recall", f"R@{K}"), ("mrr", f"MRR@{K}")), start=1):
        axes = figure.add_subplot(1, 2, number, xlabel="period", title=title)
        for name in names:
            own = sorted((cycle for cycle in cycles if cycle.name == name), key=lambda cycle: cycle.period)
            model = name in get_args(Rule)
            axes.plot(
                [cycle.period for cycle in own], [getattr(cycle, what) for cycle in own], label=name,
                linewidth=2.0 if model else 1.0, linestyle="-" if model else "--",
            )  # fmt: skip
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
