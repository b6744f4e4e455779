"""The benchmark command: what it reports, and that its ways to a list agree. No test here is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sasrec import SASRecConfig
from sasrec.checkpoint import save_model
from streamrec.bench_daemon import Load, measure_daemon
from streamrec.bench_engine import _Clicks, measure_engine, measure_half_cache, random_model
from streamrec.bench_memory import measure_resident
from streamrec.cli import main

SMALL = ("--items", "50", "--hidden-units", "8", "--num-blocks", "1", "--max-len", "8")


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["bench", *arguments, "--json", "-"]) == 0
    report: dict[str, object] = json.loads(capsys.readouterr().out)
    return report


def test_the_engine_part_reports_every_way_for_every_batch(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "--only", "engine", "--quick", *SMALL)
    rows = report["engine"]
    assert isinstance(rows, list)
    assert [row["batch"] for row in rows] == [1, 64]
    for row in rows:
        assert (row["hidden"], row["blocks"], row["heads"], row["max_len"], row["items"]) == (8, 1, 1, 8, 50)
        assert min(row["cached_us"], row["reencode_us"], row["full_us"]) > 0
        assert row["ratio"] == pytest.approx(row["reencode_us"] / row["cached_us"])
    assert report.keys() == {"machine", "versions", "commit", "engine"}


def test_what_is_timed_gives_the_same_answer_cached_re_encoded_and_in_full() -> None:
    clicks = _Clicks(random_model(SASRecConfig(30, max_len=16, hidden_units=8)), batch=4)
    clicks.engine.take_stats()
    clicks.cached_us()
    stats, users = clicks.engine.take_stats(), len(clicks.counts)
    assert (stats.hits, stats.misses, stats.evictions) == (3 * users, users, 0), (
        "each window jumped once in four clicks"
    )
    group = [0, 1, 2, 3]
    windows = [clicks._window(user) for user in group]
    cached = clicks.engine.encode(windows, group)
    for row, window in enumerate(windows):
        for newest_alone in (True, False):
            assert clicks._hidden(torch.tensor([window]), newest_alone)[0].sub(cached[row]).abs().max() < 1e-5


def test_the_daemon_is_fed_in_every_way_and_handles_all(capsys: pytest.CaptureFixture[str]) -> None:
    subject = random_model(SASRecConfig(50, max_len=8, hidden_units=8, num_blocks=1))
    load = Load(users=20, capacity_events=200, naive_events=50, seconds_a_rate=0.5)
    said: list[str] = []
    report = measure_daemon(subject, load, cache_bytes=2**20, progress=said.append)
    assert min(report[name] for name in ("events_per_s", "naive_events_per_s", "cold_events_per_s")) > 0
    assert list(report["latency_ms"]) == ["25", "50", "80"]
    for found in report["latency_ms"].values():
        assert 0 < found["p50"] <= found["p95"] <= found["p99"] <= found["p999"]
        assert found["lag"] >= 0
    assert (report["users"], report["max_len"]) == (20, 8)
    assert len(said) == 7
    assert capsys.readouterr().err == "", "neither daemon nor feeder had anything to complain of"


def test_half_the_memory_hardly_changes_the_lists() -> None:
    found = measure_half_cache(random_model(SASRecConfig(200, max_len=20, hidden_units=16)), users=32)
    assert found["float16_bytes"] * 2 == found["float32_bytes"] == 2 * 2 * 20 * 16 * 4
    assert 0.97 < found["same_top_10"] <= 1


def test_the_process_stays_within_its_cache_as_users_become_more() -> None:
    a_user = 2 * 2 * 200 * 64 * 4
    rows = measure_resident(100 * a_user, users=(50, 150, 300))
    assert [row["users"] for row in rows] == [0, 50, 150, 300]
    assert [row["cached_users"] for row in rows] == [0, 50, 100, 100]
    taken = [row["resident_bytes"] - rows[0]["resident_bytes"] for row in rows]
    assert taken[1] > 40 * a_user
    assert taken[3] < 100 * a_user + 200 * 2**20


def test_one_s_own_model_is_measured_and_the_table_names_its_shape(
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-dir", "nowhere"], "there is no model directory at"),
        (["--model-dir", "nowhere", "--items", "5"], "give a model or a shape, not both"),
        (["--hidden-units", "7"], "must be even"),
        (["--only", "engine", "--quick", *SMALL, "--json", "no/such/folder"], "cannot write no/such/folder"),
    ],
)
def test_what_cannot_be_measured_or_written_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_batches_are_measured_with_one_thread_and_the_others_come_back() -> None:
    before = torch.get_num_threads()
    measure_engine([random_model(SASRecConfig(20, max_len=4, hidden_units=8))], batches=(2,), repeats=1)
    assert torch.get_num_threads() == before
