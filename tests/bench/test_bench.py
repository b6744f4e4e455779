"""`streamrec bench`: its reports, and that its ways to compute a list agree. No test here depends on time."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sasrec import SASRecConfig
from sasrec.checkpoint import save_model
from streamrec.bench.daemon import Load, measure_daemon
from streamrec.bench.engine import ClickingUsers, measure_engine, measure_half_cache, random_model
from streamrec.bench.memory import measure_redis, measure_resident
from streamrec.bench.peers import measure_peers
from streamrec.bench.report import as_markdown, sections
from streamrec.commands.main import main

SMALL = ("--items", "50", "--hidden-units", "8", "--num-blocks", "1", "--max-len", "8")


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["bench", *arguments, "--json", "-"]) == 0
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    return report


def test_the_engine_part_reports_every_way_for_every_batch(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "--only", "engine", "--quick", *SMALL)
    rows = report["engine"]
    assert isinstance(rows, list)
    assert [row["batch"] for row in rows] == [16, 64]
    for row in rows:
        assert (row["hidden"], row["blocks"], row["heads"], row["max_len"], row["items"]) == (8, 1, 1, 8, 50)
        assert min(row["cached_us"], row["reencode_us"], row["full_us"]) > 0
        assert row["reencode_us"] <= row["torch_us"]
        assert row["ratio"] == pytest.approx(row["reencode_us"] / row["cached_us"])
    assert report.keys() == {"machine", "versions", "commit", "engine"}


def test_the_measured_ways_compute_the_same_states() -> None:
    users = ClickingUsers(random_model(SASRecConfig(30, max_len=16, hidden_units=8)), batch=4)
    users.engine.take_stats()
    users.cached_us()
    stats, number = users.engine.take_stats(), len(users.counts)
    assert (stats.hits, stats.misses, stats.evictions) == (7 * number, number, 0), (
        "each window jumped once in eight clicks"
    )
    group = [0, 1, 2, 3]
    windows = [users._window(user) for user in group]
    cached = users.engine.encode(windows, group)
    for row, window in enumerate(windows):
        for encode in (users.packed, users.newest, users.full):
            assert encode(window[None])[0].sub(cached[row]).abs().max() < 1e-5


def test_the_daemon_part_measures_every_case_and_processes_all_clicks(capsys: pytest.CaptureFixture[str]) -> None:
    subject = random_model(SASRecConfig(50, max_len=8, hidden_units=8, num_blocks=1))
    load = Load(users=20, capacity_events=200, naive_events=50, repeats=2, seconds_per_rate=0.5)
    lines: list[str] = []
    report = measure_daemon(subject, load, cache_bytes=2**20, progress=lines.append)
    rates = ("events_per_s", "two_daemons_per_s", "cluster_events_per_s", "naive_events_per_s", "cold_events_per_s")
    assert min(report[name] for name in rates) > 0
    assert list(report["latency_ms"]) == ["25", "50", "80"]
    for found in report["latency_ms"].values():
        assert 0 < found["p50"] <= found["p95"] <= found["p99"] <= found["p999"]
        assert found["lag"] >= 0
    assert (report["users"], report["max_len"]) == (20, 8)
    assert len(lines) == 9
    assert capsys.readouterr().err == "", "daemon and feeder log nothing"


def test_float16_hardly_changes_the_lists() -> None:
    found = measure_half_cache(random_model(SASRecConfig(200, max_len=20, hidden_units=16)), users=32)
    assert found["float16_bytes"] * 2 == found["float32_bytes"] == 2 * 2 * 20 * 16 * 4
    assert 0.97 < found["same_top_10"] <= 1


def test_redis_memory_is_header_items_and_list_of_a_user() -> None:
    subject = random_model(SASRecConfig(50, max_len=8, hidden_units=8, num_blocks=1))
    short = measure_redis(subject, users=300)
    long = measure_redis(random_model(SASRecConfig(50, max_len=200, hidden_units=8, num_blocks=1)), users=300)
    assert (short["max_len"], long["max_len"]) == (8, 200)
    items_bytes = 192 * 2.8  # ids of one and two digits, and a NUL each
    assert 0.8 * items_bytes < long["sequence_bytes"] - short["sequence_bytes"] < 1.5 * items_bytes
    assert short["list_bytes"] > 8 * len('"12",-12.34567,')


def test_the_process_grows_by_its_cache_only() -> None:
    bytes_per_user = 2 * 2 * 200 * 64 * 4
    rows = measure_resident(100 * bytes_per_user, users=(50, 150, 300))
    assert [row["users"] for row in rows] == [0, 50, 150, 300]
    assert [row["cached_users"] for row in rows] == [0, 50, 100, 100]
    taken = [row["resident_bytes"] - rows[0]["resident_bytes"] for row in rows]
    assert taken[1] > 40 * bytes_per_user
    assert taken[3] < 100 * bytes_per_user + 200 * 2**20


def test_an_own_model_is_measured_and_the_table_has_its_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, vocab = random_model(SASRecConfig(40, max_len=6, hidden_units=12, num_heads=2))
    save_model(tmp_path / "m", model, vocab)
    figures = tmp_path / "figures.json"
    command = ["bench", "--model-dir", str(tmp_path / "m"), "--only", "engine", "--quick", "--json", str(figures)]
    assert main(command) == 0
    assert json.loads(figures.read_text())["engine"][0]["heads"] == 2
    out = capsys.readouterr().out
    assert "reencode" in out
    assert "12" in out


def test_the_markdown_has_tables_machine_and_commit(tmp_path: Path) -> None:
    tables = tmp_path / "tables.md"
    assert main(["bench", "--only", "engine", "--quick", *SMALL, "--markdown", str(tables)]) == 0
    first, _, title, _, header, rule, *rows = tables.read_text().splitlines()
    assert "commit" in first
    assert "cores" in first
    assert title.startswith("**Engine")
    assert header.split(" | ")[:2] == ["| hidden", "blocks"]
    assert rule.count("---:") == header.count("|") - 1
    assert [row.split(" | ")[3] for row in rows] == ["16", "64"]


def test_every_part_of_a_report_has_its_table() -> None:
    row = dict.fromkeys(("users", "ms", "peer_ms", "epoch_s", "peer_epoch_s", "ratio", "spread"), 1.0)
    training = row | {"events_per_s": 2_000.0, "peer_events_per_s": 1_000.0}
    report = {"machine": {"processor": "p", "cores": 2, "system": "s", "python": "3"}, "versions": {}, "commit": None}
    report |= {"training": training, "recommend": [row]}
    assert [len(section.rows) for section in sections(report)] == [1, 1]
    assert "| 1.00 | 2,000 | 1.00 | 1,000 | 1.00 | 1.00 |" in as_markdown(report)


def test_peers_are_measured_on_the_same_data(tmp_path: Path) -> None:
    pytest.importorskip("skrec", reason="scikit-rec is not installed: make bench installs it")
    ratings = tmp_path / "ratings.csv"
    rows = [f"u{user},i{(user + step) % 7},{step},5" for user in range(20) for step in range(6)]
    ratings.write_text("user_id,item_id,timestamp,rating\n" + "\n".join(rows) + "\n")
    report = measure_peers(ratings, repeats=1, users=(1, 64))
    assert report["training"]["events"] == 20 * 5
    assert [row["users"] for row in report["recommend"]] == [1, 20]
    assert min(min(row["ms"], row["peer_ms"]) for row in report["recommend"]) > 0


@pytest.mark.skipif(find_spec("skrec") is not None, reason="scikit-rec is installed")
def test_a_missing_peer_is_an_error_before_any_measurement(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "--only", "engine", "peers"]) == 1
    lines = capsys.readouterr().err
    assert "pip install 'streamrec[bench]'" in lines
    assert "engine:" not in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-dir", "nowhere"], "there is no model directory at"),
        (["--model-dir", "nowhere", "--items", "5"], "give a model or a shape, not both"),
        (["--hidden-units", "7"], "must be even"),
        (["--only", "engine", "--quick", *SMALL, "--json", "no/such/folder"], "cannot write no/such/folder"),
    ],
)
def test_a_wrong_model_shape_or_path_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_number_of_threads_is_restored_after_measuring() -> None:
    before = torch.get_num_threads()
    measure_engine([random_model(SASRecConfig(20, max_len=4, hidden_units=8))], batches=(2,), repeats=1)
    assert torch.get_num_threads() == before
