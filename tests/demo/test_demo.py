"""`streamrec demo`: its figures, its data, and whole runs with own clicks."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest

from sasrec import Event, Interactions, ItemVocab, SASRec, SASRecConfig, save_model
from streamrec.demo.data import DemoData
from streamrec.demo.hits import HitCounter, HitRates, ScoredClick, hit_rate_of
from streamrec.demo.retrain import prepare
from streamrec.demo.screen import sparkline
from streamrec.demo.watch import Latencies
from streamrec.local.daemon import environment
from streamrec.local.movielens import CLICKS, TITLES, FetchError, fetch_movielens
from streamrec.local.simulator import simulate_clicks
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings
from streamrec.web.titles import read_titles

from support.daemon_process import get
from support.preloaded import run_command
from support.waiting import eventually


def past_clicks(*clicks: tuple[str, str]) -> Interactions:
    return Interactions.from_events(Event(user, item, at) for at, (user, item) in enumerate(clicks))


def hits_of(counter: HitCounter, user: str, item: str, listed: list[str]) -> tuple[int, int]:
    """Add a click; return whether the list and the baseline had it."""
    before = counter.hits, counter.popularity_hits
    counter.add(Event(user, item, 0), listed)
    return counter.hits - before[0], counter.popularity_hits - before[1]


def test_a_click_is_a_hit_only_among_the_first_ten_of_the_list_published_before() -> None:
    listed = [f"i{n}" for n in range(20)]
    counter = HitCounter(past_clicks(("a", "x")), filter_seen=True)
    assert hits_of(counter, "u", "i9", listed) == (1, 0)
    assert hits_of(counter, "u", "i10", listed) == (0, 0)
    assert hits_of(counter, "u", "i3", []) == (0, 0)


def test_the_popularity_baseline_leaves_out_seen_items() -> None:
    clicks = [("a", f"i{n}") for n in range(11)] + [("b", f"i{n}") for n in range(10)]
    counter = HitCounter(past_clicks(*clicks), filter_seen=True)
    assert hits_of(counter, "new", "i10", []) == (0, 0), "the eleventh most popular item"
    counter = HitCounter(past_clicks(*clicks), filter_seen=True)
    assert hits_of(counter, "b", "i10", []) == (0, 1), "the most popular item that b has not seen"
    counter = HitCounter(past_clicks(*clicks), filter_seen=False)
    assert hits_of(counter, "b", "i10", []) == (0, 0)


def test_hit_rates_cover_the_clicks_after_earlier_counts() -> None:
    counter = HitCounter(past_clicks(("a", "x"), ("a", "y")), filter_seen=True)
    assert counter.rates() is None
    counter.add(Event("u", "x", 0), ["x"])
    then = counter.counts()
    assert counter.rates(then) is None
    counter.add(Event("u", "z", 0), ["x"])
    assert counter.rates(then) == HitRates(1, 0.0, 0.0)
    assert counter.rates() == HitRates(2, 0.5, 0.5)


def test_latencies_of_a_period_exclude_other_periods() -> None:
    def scrape(fast: int, slow: int) -> list[tuple[float, float]]:
        return [(0.01, fast), (0.1, fast + slow), (float("inf"), fast + slow)]

    latencies = Latencies()
    assert latencies.p99_ms(0, 1) is None
    for at_s, (fast, slow) in enumerate([(100, 0), (200, 0), (200, 100), (200, 100), (300, 100)]):
        latencies.add(float(at_s), scrape(fast, slow))
    assert latencies.p99_ms(-float("inf"), 1.0) == pytest.approx(9.9), "only fast ones"
    assert latencies.p99_ms(1.0, 2.0) == pytest.approx(99.1), "only slow ones"
    assert latencies.p99_ms(2.0, 3.0) is None, "no click came"
    assert latencies.p99_ms(2.5, 99.0) == pytest.approx(9.9), "up to the last scrape"


def test_a_child_process_gets_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"redis_url": "redis://:secret@localhost:1/2", "registry_dir": tmp_path, "lists_filter_seen": False}
    settings = load_settings(flags=flags)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings().shown() == settings.shown()
    assert load_settings().redis.url == settings.redis.url


def test_the_hit_rate_of_another_model_is_that_of_the_lists_it_would_have_published(tmp_path: Path) -> None:
    settings = load_settings(
        flags={
            "registry_dir": tmp_path / "registry",
            "archive_dir": tmp_path / "archive",
            "lists_filter_seen": True,
        }
    )
    vocab = ItemVocab.from_items([f"i{n}" for n in range(11)])
    version = save_model(tmp_path / "model", SASRec(SASRecConfig(len(vocab), max_len=4, hidden_units=4)), vocab, {})
    prepare(settings, tmp_path / "model", past_clicks(("a", "i1"), ("a", "i2")))
    listed = [ScoredClick(["i0"], f"i{n}", False) for n in range(11)]
    assert hit_rate_of(settings, version, listed) == pytest.approx(10 / 11), "all but the seen item"
    popular = [ScoredClick([], "i1", True), ScoredClick([], "i1", False)]
    assert hit_rate_of(settings, version, popular) == 0.5, "the popular list is the same for every model"


def test_seen_items_are_recommended_if_clicks_repeat() -> None:
    once = past_clicks(*[("a", f"i{n}") for n in range(20)])
    again = past_clicks(*[("a", f"i{n % 5}") for n in range(20)])
    assert DemoData("", once, once, {}).filter_seen
    assert not DemoData("", again, again, {}).filter_seen


def test_simulated_clicks_are_the_same_for_a_seed_and_in_time_order() -> None:
    events, titles = simulate_clicks(events=500, seed=1)
    assert (events, titles) == simulate_clicks(events=500, seed=1)
    assert events != simulate_clicks(events=500, seed=2)[0]
    times = [event.timestamp_ms or 0 for event in events]
    assert times == sorted(times)
    assert {event.item_id for event in events} <= titles.keys()


def test_a_failed_fetch_of_movielens_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="pip cannot download recbole"):
        fetch_movielens(tmp_path / "cache")


def test_a_wheel_with_another_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        wheel.writestr(
            "recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("recbole-1.2.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="SHA-256"):
        fetch_movielens(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_movielens_in_the_cache_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / CLICKS).write_text("x")
    (tmp_path / TITLES).write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\n7\tBrazil\t1985\n")
    assert fetch_movielens(tmp_path) == tmp_path / CLICKS
    assert read_titles(tmp_path / TITLES) == {"7": "Brazil (1985)"}


def test_a_sparkline_is_as_long_as_its_values_and_highest_at_the_highest() -> None:
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([]) == sparkline([0.0]) == ""


@pytest.fixture
def own_clicks(tmp_path: Path) -> Path:
    events, _ = simulate_clicks(events=4_000, users=60)
    path = tmp_path / "clicks.csv"
    rows = (f"{event.user_id},{event.item_id},{event.timestamp_ms}" for event in events)
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    return path


NOON_MS = 1_700_000_000_000


def start_demo(clicks: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "streamrec", "demo", "--data", str(clicks), "--epochs", "3", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(clicks.parent / "cache"), "OMP_NUM_THREADS": "1"},
    )


def test_the_demo_runs_with_own_clicks_and_swaps_in_a_new_model(own_clicks: Path, tmp_path: Path) -> None:
    summary, items = tmp_path / "summary.json", tmp_path / "items.csv"
    _, titles = simulate_clicks(events=1)
    items.write_text("item_id,title\n" + "".join(f"{item},My {title}\n" for item, title in titles.items()))
    # slow enough that a list is published before its user's next click, even on a busy machine
    with start_demo(own_clicks, "--rate", "40", "--json", str(summary), "--items", str(items)) as demo:
        output, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, output
    written = json.loads(summary.read_text())
    assert written.keys() == {
        "events",
        "events_per_s",
        "latency_ms",
        "hit_rate_at_10",
        "popularity_hit_rate_at_10",
        "dead_letters",
        "swap",
    }
    assert written["events"] == 800
    assert re.search("clicked My .*; now first: My ", output)
    assert written["dead_letters"] == 0
    assert 0 < written["latency_ms"]["p50"] <= written["latency_ms"]["p99"]
    assert 0 < written["hit_rate_at_10"] <= 1
    swap = written["swap"]
    assert swap, output
    assert f"model {swap['version']} replaces " in output
    assert 400 < swap["after_clicks"] <= 800
    assert 0 < swap["hit_rate_before"] <= 1
    assert swap["train_s"] > 0
    assert swap["p99_ms"].keys() == {"before", "training", "swap"}
    assert swap["p99_ms"]["before"] > 0 and swap["p99_ms"]["training"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", "no.csv"], "--items has the titles of your own clicks: also give their file with --data"),
        (["--items", "no.csv", "--data", "clicks.csv"], "titles in no.csv: cannot be read: No such file or directory"),
    ],
)
def test_unreadable_titles_are_an_error_before_training(arguments: list[str], message: str) -> None:
    done = run_command(Settings.of(), "demo", *arguments)
    assert (done.returncode, done.stderr) == (1, f"streamrec: {message}\n")


def test_the_demo_works_with_too_few_clicks_for_retraining_and_times_in_seconds(tmp_path: Path) -> None:
    path, summary = tmp_path / "clicks.csv", tmp_path / "summary.json"
    path.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"u{n % 2},i{n % 3},{NOON_MS // 1000 + n}\n" for n in range(12))
    )
    refused = subprocess.run(
        [sys.executable, "-m", "streamrec", "demo", "--data", str(path)], capture_output=True, text=True
    )
    assert refused.returncode == 1 and "timestamp 1700000000 looks like seconds" in refused.stderr
    with start_demo(path, "--json", str(summary), "--timestamp-unit", "s") as demo:
        output, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, output
    found = json.loads(summary.read_text())
    assert found["swap"] is None
    assert (found["events"] > 0, found["dead_letters"]) == (True, 0)
    assert "no new model this time: no user has a new event" in output


@pytest.mark.parametrize("command", ["streamrec.demo.daemon", "retrain"])
async def test_ctrl_c_ends_the_demo_and_its_child_processes(own_clicks: Path, command: str) -> None:
    with start_demo(own_clicks, "--rate", "60" if command == "retrain" else "20") as demo:
        family = psutil.Process(demo.pid)

        async def command_runs() -> list[psutil.Process]:
            assert demo.poll() is None, demo.stdout
            children = family.children(recursive=True)
            running = any(command in child.cmdline() and child.net_connections() for child in children)
            return children if running and len(children) >= 3 else []

        children = await eventually(command_runs, timeout_s=120)
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in output
    assert "summary (stopped early)" in output
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


async def test_with_stay_the_page_answers_after_the_last_click_until_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u{n % 2},i{n % 3},{NOON_MS + n}\n" for n in range(12)))
    with start_demo(path, "--stay") as demo:
        assert demo.stdout is not None
        output = ""
        while "until Ctrl-C" not in output:
            line = await asyncio.to_thread(demo.stdout.readline)
            assert line, output
            output += line
        (address,) = set(re.findall(r"http://\S+", output))
        assert output.index("see it live") < output.index("summary") < output.index("The page runs")
        status, page = await asyncio.to_thread(get, address)
        assert status == 200 and "<title>streamrec</title>" in page
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, rest
    assert "Traceback" not in rest
    assert (await asyncio.to_thread(get, address))[0] == 0
