"""`sasrec train` and `sasrec evaluate`: their output, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from sasrec.__main__ import main
from sasrec.checkpoint import load_model
from sasrec.inference.engine import Engine
from sasrec.model import SASRecConfig
from sasrec.training.config import TrainConfig

SMALL = (
    *("--hidden-units", "16", "--num-blocks", "1", "--max-len", "8"),
    *("--epochs", "30", "--learning-rate", "0.01", "--batch-size", "8"),
)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write clicks of users who walk around a circle of twelve items."""
    path = tmp_path_factory.mktemp("data") / "clicks.csv"
    rows = [
        f"user{user},item{(user + step) % 12},{1_700_000_000_000 + step * 1000}"
        for step in range(9)
        for user in range(24)
    ]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def model(clicks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model on all steps except each user's last."""
    folder = tmp_path_factory.mktemp("models")
    lines = clicks.read_text().splitlines()
    (folder / "before.csv").write_text("\n".join(lines[:-24]))
    assert main(["train", str(folder / "before.csv"), "--out", str(folder / "circle"), *SMALL, "--hold-out", "0"]) == 0
    return folder / "circle"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that fails, and return its one line on stderr."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("sasrec: ")
    assert err.count("\n") == 1, err
    assert out.count("\n") <= 1, "at most the counts of the file"
    return err


def test_train_prints_the_counts_of_the_file_and_the_model(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(clicks), "--out", str(tmp_path / "m"), *SMALL, "--epochs", "2"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == "216 events, 24 users, 12 items"
    version = load_model(tmp_path / "m").version
    assert re.fullmatch(
        rf"model {version} in {tmp_path}/m: best of 2 epochs [12], "
        r"validation hr@10 [01]\.\d{4}, validation ndcg@10 [01]\.\d{4}",
        second,
    )
    assert err == ""


def test_the_model_directory_contains_the_configuration_and_the_figures(clicks: Path, tmp_path: Path) -> None:
    assert main(["train", str(clicks), "--out", str(tmp_path / "m"), *SMALL, "--epochs", "1"]) == 0
    saved = load_model(tmp_path / "m")
    assert (saved.model.config.hidden_units, saved.model.config.num_blocks, saved.model.config.max_len) == (16, 1, 8)
    assert saved.metadata["train_config"]["learning_rate"] == 0.01
    assert saved.metadata["trained_until_ms"] == 1_700_000_008_000
    assert saved.metadata["validation"]["cases"] == 24
    assert sorted(saved.vocab.ids) == sorted(f"item{n}" for n in range(12))


def test_evaluate_ranks_the_last_events_which_training_never_saw(
    clicks: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(clicks), "--model", str(model), "--k", "1", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == load_model(model).version
    for kind in ("seen_filtered", "seen_kept"):
        assert report["model"][kind] == {"cases": 24} | {
            f"{name}@{k}": 1.0 for name in ("hr", "ndcg", "mrr") for k in (1, 5)
        }


def test_baselines_are_listed_beside_the_model(clicks: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(clicks), "--model", str(model), "--k", "1", "--baselines", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["version", "model", "popularity", "Markov chain", "sequential rules"]
    assert report["Markov chain"]["seen_kept"]["hr@1"] == 1.0, "the next item always follows"
    assert report["popularity"]["seen_kept"]["hr@1"] < 0.2
    assert main(["evaluate", str(clicks), "--model", str(model), "--k", "1", "--baselines"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1].strip() for line in shown if line.startswith("  ")] == 2 * list(report)[1:]


def test_sampled_candidates_are_easier_and_named_as_sampled(
    clicks: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(clicks), "--model", str(model), "--k", "1", "--baselines", "--negatives"]
    assert main([*command, "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["model"]) == ["sampled"]
    assert report["model"]["sampled"] == {"cases": 24, "hr@1": 1.0, "ndcg@1": 1.0, "mrr@1": 1.0}
    assert main([*command, "2"]) == 0
    assert "ranked against 2 random items" in capsys.readouterr().out
    assert "50 random unseen items are needed, but a user has only 3" in fails(capsys, *command, "50")


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """Write ratings of users who see one item, then a good or a bad one."""
    then = (("bad", 1), ("good", 5))
    rows = [f"u{u},seed,1700000000000,4\nu{u},{then[u % 2][0]},1700000001000,{then[u % 2][1]}" for u in range(60)]
    path = tmp_path / "rated.csv"
    path.write_text("\n".join(["user_id,item_id,timestamp,rating", *rows]) + "\n")
    return path


def test_events_of_low_outcome_can_be_dropped(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "train",
        str(rated),
        "--out",
        str(tmp_path / "m"),
        *SMALL,
        "--epochs",
        "1",
        "--hold-out",
        "0",
        "--min-outcome",
        "4",
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("60 events, 30 users, 2 items")
    assert load_model(tmp_path / "m").vocab.ids == ("seed", "good")
    assert "no event is left; lower --min-outcome=6.0, --min-user-events=2" in fails(capsys, *command[:-1], "6")


@pytest.mark.parametrize(("loss", "scale"), [("bce", "5"), ("mse", "1"), ("cross_entropy", "5")])
def test_outcomes_can_be_learned_from(rated: Path, tmp_path: Path, loss: str, scale: str) -> None:
    options = ("--loss", loss, "--outcomes", scale, "--epochs", "40")
    assert main(["train", str(rated), "--out", str(tmp_path / "m"), *SMALL, *options, "--hold-out", "0"]) == 0
    saved = load_model(tmp_path / "m")
    scores = Engine(saved.model, saved.vocab).scores([np.array(saved.vocab.encode(["seed"]))])[0]
    score = dict(zip(saved.vocab.ids, scores[1:].tolist(), strict=True))
    assert score["good"] > score["bad"] + 0.5


def test_outcomes_out_of_range_or_missing_are_refused(
    rated: Path, clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["--out", str(tmp_path / "m"), "--loss", "bce", "--outcomes", "1", "--hold-out", "0"]
    assert "outcomes from 1 to 5: loss='bce' takes 0 to 1" in fails(capsys, "train", rated, *train)
    assert "clicks.csv: there is no column outcome or rating; name one with --outcome-column" in fails(
        capsys, "train", clicks, *train
    )


def test_evaluate_prints_the_figures_as_a_table(clicks: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(clicks), "--model", str(model), "--k", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"model {load_model(model).version}: the last event of 24 users, ranked against all 12 items",
        "",
        "seen filtered",
        "  model             hr@1 1.0000  ndcg@1 1.0000  mrr@1 1.0000",
        "",
        "seen kept",
        "  model             hr@1 1.0000  ndcg@1 1.0000  mrr@1 1.0000",
    ]


def test_hold_out_sets_the_number_of_held_out_events(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validated = {}
    for hold_out in ("0", "1", "2"):
        out = tmp_path / hold_out
        assert main(["train", str(clicks), "--out", str(out), *SMALL, "--epochs", "1", "--hold-out", hold_out]) == 0
        validated[hold_out] = load_model(out).metadata["validation"]
    assert validated["0"] == {}
    assert validated["1"]["cases"] == validated["2"]["cases"] == 24
    assert "validation" not in capsys.readouterr().out.splitlines()[1]


def test_holding_out_two_trains_and_validates_as_if_the_last_event_were_not_in_the_file(
    clicks: Path, tmp_path: Path
) -> None:
    before = tmp_path / "before.csv"
    before.write_text("\n".join(clicks.read_text().splitlines()[:-24]))
    models = []
    for file, hold_out in ((clicks, "2"), (before, "1"), (clicks, "1")):
        out = tmp_path / f"m{len(models)}"
        assert main(["train", str(file), "--out", str(out), *SMALL, "--epochs", "2", "--hold-out", hold_out]) == 0
        models.append(load_model(out))
    one, same, other = (saved.model.item_embedding.weight for saved in models)
    assert torch.equal(one, same)
    assert models[0].metadata["validation"] == models[1].metadata["validation"]
    assert not torch.equal(one, other)


def test_equal_commands_give_equal_versions(clicks: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["train", str(clicks), "--out", str(tmp_path / name), *SMALL, "--epochs", "1", "--seed", seed]) == 0
    one, again, other = (load_model(tmp_path / name).version for name in "abc")
    assert one == again != other


def test_rare_users_and_items_can_be_dropped(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = tmp_path / "more.csv"
    more.write_text(clicks.read_text() + "passer-by,item1,1\nuser1,rare,2\n")
    flags = ["--epochs", "1", "--min-user-events", "3", "--min-item-events", "2"]
    assert main(["train", str(more), "--out", str(tmp_path / "m"), *SMALL, *flags]) == 0
    assert capsys.readouterr().out.startswith("216 events, 24 users, 12 items\n")


def test_the_help_lists_every_hyper_parameter_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for spec in (*fields(SASRecConfig)[1:], *fields(TrainConfig)):
        if spec.name == "replay":  # this command does not train models further
            continue
        default = "" if spec.default is None else f" [{spec.default}]"
        shown = re.escape(spec.metadata["help"] + default)
        assert re.search(
            rf"--{spec.name.replace('_', '-')} \S+ {shown}|, --no-{spec.name.replace('_', '-')} {shown}",
            text,
        ), spec.name


# --- mistakes


def test_a_missing_or_broken_data_file(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.csv").write_text("user_id,item_id,timestamp\nu,a,1\nu\n")
    for command in (["train", "--out", tmp_path / "m"], ["evaluate", "--model", model]):
        assert "nowhere.csv: No such file" in fails(capsys, *command, tmp_path / "nowhere.csv")
        assert "broken.csv:3: 3 columns expected" in fails(capsys, *command, tmp_path / "broken.csv")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-heads", "3"], "hidden_units=64 is not a multiple of num_heads=3"),
        (["--max-len", "0"], "max_len=0: must be a whole number of at least 1"),
        (["--dropout-rate", "1"], "dropout_rate=1.0: must be at least 0 and below 1"),
        (["--epochs", "0"], "epochs=0: must be at least 1"),
        (["--learning-rate", "-1"], "learning_rate=-1.0"),
        (["--learning-rate", "1e30", "--batch-size", "4"], "lower learning_rate=1e+30"),
        (["--loss", "bce", "--num-negatives", "0"], "num_negatives=0"),
        (["--min-user-events", "100"], "no event is left; lower --min-user-events=100"),
    ],
)
def test_a_bad_hyper_parameter(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in fails(capsys, "train", clicks, "--out", tmp_path / "m", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--loss", "hinge"], ["--max-len", "many"], ["--hold-out", "3"], ["--nonsense"]])
def test_a_flag_that_cannot_be_read_ends_with_status_2(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", str(clicks), "--out", str(tmp_path / "m"), *flags])
    assert raised.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "exists and is not a model directory"),
        ("thesis.txt", "exists and is not a model directory"),
        ("thesis.txt/model", "cannot write the model directory"),
    ],
)
def test_an_impossible_destination_is_refused_before_the_training(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    assert main(["train", str(clicks), "--out", str(tmp_path / out), *SMALL]) == 1
    printed, err = capsys.readouterr()
    assert printed == "", "nothing was read or trained"
    assert message in err
    assert (tmp_path / "thesis.txt").read_text() == "words"


def test_data_without_anything_to_learn_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clicks.csv").write_text("user_id,item_id\nu,a\nu,b\nv,a\nv,b\n")
    command = ("train", tmp_path / "clicks.csv", "--out", tmp_path / "m")
    assert "clicks.csv:1: column TIMESTAMP is missing" in fails(capsys, *command)
    assert "no user has two or more known events" in fails(capsys, *command, "--in-file-order")


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_train_and_evaluate_take_files_with_other_column_names(
    clicks: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    command = ["evaluate", str(clicks), "--model", str(model), "--k", "1"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    users, items, times = zip(*(line.split(",") for line in clicks.read_text().splitlines()[1:]), strict=True)
    path = tmp_path / kind
    if kind == "csv":
        rows = (f"{time[:-3]}|{user}|{item}" for user, item, time in zip(users, items, times, strict=True))
        path.write_text("\n".join(["AT|session|sku", *rows]))
    else:
        seconds = [int(time) / 1000 for time in times]
        table = pa.table({"session": users, "sku": items, "AT": seconds, "more": [None] * len(users)})
        part = path / "part.parquet" if kind == "folder" else path
        part.parent.mkdir(exist_ok=True)
        parquet.write_table(table, part)
    columns = ["--user-column", "session", "--item-column", "sku", "--timestamp-column", "AT", "--timestamp-unit", "s"]
    columns += ["--separator", "|"] if kind == "csv" else []
    assert main(["evaluate", str(path), "--model", str(model), "--k", "1", *columns]) == 0
    assert capsys.readouterr().out == expected
    train = ["--out", str(tmp_path / "m"), *SMALL, "--epochs", "1"]
    assert main(["train", str(path), *train, *columns]) == 0
    assert capsys.readouterr().out.startswith("216 events, 24 users, 12 items")
    assert load_model(tmp_path / "m").metadata["trained_until_ms"] == 1_700_000_008_000
    missing = "column USER_ID is missing; the columns are 'session', 'sku', 'AT', 'more'"
    expected = "no known format in 'AT|session|sku'" if kind == "csv" else missing
    assert expected in fails(capsys, "train", path, *train)


def test_a_bad_model_directory(clicks: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no model directory at" in fails(capsys, "evaluate", clicks, "--model", tmp_path / "nowhere")
    assert "it has no manifest.json" in fails(capsys, "evaluate", clicks, "--model", tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "config.json").write_text("{}")
    assert "config.json is damaged" in fails(capsys, "evaluate", clicks, "--model", damaged)


def test_data_of_another_catalogue_and_a_cut_off_below_1(
    clicks: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.csv").write_text("user_id,item_id,timestamp\nu,x,1\nu,y,2\n")
    message = fails(capsys, "evaluate", tmp_path / "other.csv", "--model", model)
    assert "other.csv: no user has two events on items that the model knows" in message
    assert "k=0: must be at least 1" in fails(capsys, "evaluate", clicks, "--model", model, "--k", "0")


def test_an_interrupt_ends_without_a_traceback(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sasrec.__main__.train", interrupted)
    assert main(["train", str(clicks), "--out", str(tmp_path / "m")]) == 130
    assert capsys.readouterr().err == "sasrec: stopped\n"


def test_the_commands_run_as_processes(clicks: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "sasrec", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    trained = run("train", clicks, "--out", tmp_path / "m", *SMALL, "--epochs", "2")
    assert trained.returncode == 0
    epoch = r"epoch %d: loss \d\.\d{4}, validation NDCG@10 [01]\.\d{4}\n"
    assert re.fullmatch(epoch % 1 + epoch % 2, trained.stderr), (
        "a line per epoch where there is no terminal for a progress bar"
    )
    failed = run("evaluate", clicks, "--model", tmp_path / "nowhere")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.count("\n") == 1
