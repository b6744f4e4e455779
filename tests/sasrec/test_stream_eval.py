"""Evaluation over a stream of periods: training, figures, and continuing after a stop."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sasrec.__main__ import main
from sasrec.data.formats import DataFileError
from sasrec.model import SASRecConfig
from sasrec.stream_eval import Cycle, StreamEvaluation, read_periods, table
from sasrec.training.config import TrainConfig

PERIODS, SESSIONS, CLICKS = 4, 30, 6
MODEL = SASRecConfig(1, max_len=8, hidden_units=16, num_blocks=1, dropout_rate=0.0)
TRAIN = TrainConfig(epochs=60, batch_size=16, learning_rate=1e-2, patience=0)


def circle_of(period: int) -> list[tuple[str, str]]:
    """Item n + 1 of a ring always follows item n; from period 1 on, half of the clicks are on a ring of new items."""
    rows = []
    for step in range(CLICKS):
        for session in range(SESSIONS):
            ring = "old" if period == 0 or session % 2 else "new"
            rows.append((f"s{session}", f"{ring}{(session + step) % 10}"))
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "periods"
    path.mkdir()
    for period in range(PERIODS):
        text = "".join(f"{session} {item}\n" for session, item in circle_of(period))
        number = period + 8  # 10 and 11 must come after 9, as numbers do
        if period % 2:
            (path / f"period_{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (path / f"period_{number}.txt").write_text(text)
    return path


def evaluation(
    folder: Path, out: Path, model: SASRecConfig = MODEL, train_config: TrainConfig = TRAIN
) -> StreamEvaluation:
    return StreamEvaluation(folder, out, model, train_config, train_config, progress=False)


def test_periods_are_read_in_the_order_of_their_numbers_and_their_sessions_are_distinct(folder: Path) -> None:
    events = read_periods(folder)
    assert events.timestamps_ms.tolist() == sorted(list(range(PERIODS)) * SESSIONS * CLICKS)
    assert len(set(events.user_ids)) == PERIODS * SESSIONS
    expected = [item for period in range(PERIODS) for _, item in circle_of(period)]
    assert events.item_ids == expected


def test_both_rules_learn_the_rings_and_new_items_count_only_from_the_next_period_on(
    folder: Path, tmp_path: Path
) -> None:
    stream = evaluation(folder, tmp_path / "out")
    cycles = list(stream.run(["full", "incremental", "baselines"]))
    assert cycles == stream.cycles()
    names = ["full", "incremental", "popularity", "Markov chain", "rules", "rules and reminder"]
    assert list(dict.fromkeys(cycle.name for cycle in cycles)) == names
    for cycle in cycles:
        sessions = SESSIONS // 2 if cycle.period == 1 else SESSIONS  # the new ring is not known in period 1
        assert cycle.cases == sessions * (CLICKS - 1)
        if cycle.name in ("full", "incremental", "Markov chain"):
            assert cycle.mrr > 0.95, "each item determines the next"
        assert cycle.recall == 1.0, "there are twenty items in all"
        assert cycle.train_s > 0
    popularity = np.mean([cycle.mrr for cycle in cycles if cycle.name == "popularity"])
    assert popularity < 0.4


def test_rules_that_train_from_scratch_can_run_single_periods(folder: Path, tmp_path: Path) -> None:
    stream = evaluation(folder, tmp_path / "out")
    found = [(cycle.name, cycle.period) for cycle in stream.run(["incremental", "full"], periods=[2])]
    assert found == [*(("incremental", period) for period in range(1, PERIODS)), ("full", 2)]


def test_a_stopped_run_continues_and_ends_like_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    whole = list(evaluation(folder, tmp_path / "whole").run(["incremental"]))
    first = next(iter(evaluation(folder, tmp_path / "parts").run(["incremental"])))
    rest = list(evaluation(folder, tmp_path / "parts").run(["incremental"]))
    assert [cycle.period for cycle in (first, *rest)] == [1, 2, 3]
    assert [replace(cycle, train_s=0) for cycle in (first, *rest)] == [replace(cycle, train_s=0) for cycle in whole]
    assert list(evaluation(folder, tmp_path / "parts").run(["incremental"])) == []


def test_cycles_of_other_settings_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    evaluation(folder, tmp_path / "out")
    with pytest.raises(DataFileError, match="holds cycles of other settings or data"):
        evaluation(folder, tmp_path / "out", train_config=replace(TRAIN, epochs=61))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("period_9.txt", b"a b\nc\n", "line 2: a session and an item are expected"),
        ("period_9.txt.gz", b"not gzip", "cannot be read"),
        ("period_9.txt", b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_damaged_period_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "period_0.txt").write_text("a b\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        read_periods(tmp_path)


def test_a_single_period_is_refused(tmp_path: Path) -> None:
    (tmp_path / "period_0.txt").write_text("a b\n")
    with pytest.raises(DataFileError, match="at least two are needed"):
        read_periods(tmp_path)


def test_the_table_contains_means() -> None:
    cycles = [Cycle("full", 1, 0.5, 0.25, 10, 2.0), Cycle("full", 2, 0.7, 0.35, 10, 4.0)]
    assert list(table(cycles))[1].split() == ["full", "2", "0.6000", "0.3000", "3.0"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["stream-eval", str(folder), "--out", str(tmp_path / "out"), "--rules", "incremental", "baselines"]
    quick = ["--hidden-units", "8", "--num-blocks", "1", "--epochs", "2", "--update-epochs", "1"]
    assert main([*command, *quick]) == 0
    shown = capsys.readouterr()
    assert [line.split("  ")[0] for line in shown.out.splitlines()[1:]] == [
        "incremental",
        "popularity",
        "Markov chain",
        "rules",
        "rules and reminder",
    ]
    assert "incremental, period 3 of 3: R@20" in shown.err
    picture = tmp_path / "periods.png"
    assert main([*command, *quick, "--json", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    cycles = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(cycles) == 5 * 3
    assert main([*command, "--epochs", "3"]) == 1
    assert "holds cycles of other settings" in capsys.readouterr().err
