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
from streamrec.demo.retrain import HitRates, Judged, Latencies, hit_rate_of, prepare
from streamrec.demo.run import DemoData, Judge
from streamrec.demo.screen import sparkline
from streamrec.local.daemon import environment
from streamrec.local.movielens import CLICKS, TITLES, FetchError, fetch_movielens
from streamrec.local.simulator import simulate_clicks
from streamrec.settings_sources import load_settings
from streamrec.web.titles import read_titles

from support.daemon_process import get
from support.waiting import eventually


def past_clicks(*clicks: tuple[str, str]) -> Interactions:
    return Interactions.from_events(Event(user, item, at) for at, (user, item) in enumerate(clicks))


def judge_one(judge: Judge, user: str, item: str, listed: list[str]) -> tuple[int, int]:
    before = judge.hits, judge.popularity_hits
    judge.judge(Event(user, item, 0), listed)
    return judge.hits - before[0], judge.popularity_hits - before[1]


def test_a_click_is_a_hit_only_among_the_first_ten_of_the_list_published_before() -> None:
    listed = [f"i{n}" for n in range(20)]
    judge = Judge(past_clicks(("a", "x")), filter_seen=True)
    assert judge_one(judge, "u", "i9", listed) == (1, 0)
    assert judge_one(judge, "u", "i10", listed) == (0, 0)
    assert judge_one(judge, "u", "i3", []) == (0, 0)


def test_the_popularity_baseline_leaves_out_what_the_user_has_seen() -> None:
    clicks = [("a", f"i{n}") for n in range(11)] + [("b", f"i{n}") for n in range(10)]
    judge = Judge(past_clicks(*clicks), filter_seen=True)
    assert judge_one(judge, "new", "i10", []) == (0, 0), "the eleventh most popular item"
    judge = Judge(past_clicks(*clicks), filter_seen=True)
    assert judge_one(judge, "b", "i10", []) == (0, 1), "the most popular one that b has not seen"
    judge = Judge(past_clicks(*clicks), filter_seen=False)
    assert judge_one(judge, "b", "i10", []) == (0, 0)


def test_hit_rates_are_of_the_clicks_since_a_moment() -> None:
    judge = Judge(past_clicks(("a", "x"), ("a", "y")), filter_seen=True)
    assert judge.rates() is None
    judge.judge(Event("u", "x", 0), ["x"])
    then = judge.counts()
    assert judge.rates(then) is None
    judge.judge(Event("u", "z", 0), ["x"])
    assert judge.rates(then) == HitRates(1, 0.0, 0.0)
    assert judge.rates() == HitRates(2, 0.5, 0.5)


def test_latencies_of_one_time_leave_out_those_of_another() -> None:
    def scrape(fast: int, slow: int) -> list[tuple[float, float]]:
        return [(0.01, fast), (0.1, fast + slow), (float("inf"), fast + slow)]

    latencies = Latencies()
    assert latencies.p99_ms(0, 1) is None
    for at_s, (fast, slow) in enumerate([(100, 0), (200, 0), (200, 100), (200, 100), (300, 100)]):
        latencies.add(float(at_s), scrape(fast, slow))
    assert latencies.p99_ms(-float("inf"), 1.0) == pytest.approx(9.9), "fast ones alone"
    assert latencies.p99_ms(1.0, 2.0) == pytest.approx(99.1), "slow ones alone"
    assert latencies.p99_ms(2.0, 3.0) is None, "no click came"
    assert latencies.p99_ms(2.5, 99.0) == pytest.approx(9.9), "up to the last scrape"


def test_a_child_is_under_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"redis_url": "redis://:secret@localhost:1/2", "registry_dir": tmp_path, "lists_filter_seen": False}
    settings = load_settings(flags=flags)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings().shown() == settings.shown()
    assert load_settings().redis.url == settings.redis.url


def test_the_hit_rate_of_another_model_is_that_of_the_lists_it_would_have_made(tmp_path: Path) -> None:
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
    listed = [Judged(["i0"], f"i{n}", False) for n in range(11)]
    assert hit_rate_of(settings, version, listed) == pytest.approx(10 / 11), "all but the one that the user has seen"
    popular = [Judged([], "i1", True), Judged([], "i1", False)]
    assert hit_rate_of(settings, version, popular) == 0.5, "whichever model it is, the popular list is the same"


def test_seen_items_are_recommended_where_clicks_repeat() -> None:
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


def test_movielens_that_cannot_be_fetched_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="pip cannot download recbole"):
        fetch_movielens(tmp_path / "cache")


def test_a_wheel_that_is_not_the_expected_one_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_demo_runs_on_ones_own_clicks_and_a_new_model_takes_over(own_clicks: Path, tmp_path: Path) -> None:
    summary, items = tmp_path / "summary.json", tmp_path / "items.csv"
    _, titles = simulate_clicks(events=1)
    items.write_text("item_id,title\n" + "".join(f"{item},My {title}\n" for item, title in titles.items()))
    # slow enough for lists to be there before a user's next click, whatever else the machine does
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
    assert f"model {swap['version']} takes over" in output
    assert 400 < swap["after_clicks"] <= 800
    assert 0 < swap["hit_rate_before"] <= 1
    assert swap["train_s"] > 0
    assert swap["p99_ms"].keys() == {"before", "training", "swap"}
    assert swap["p99_ms"]["before"] > 0 and swap["p99_ms"]["training"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", "no.csv"], "--items gives the titles of your own clicks: name their file with --data too"),
        (["--items", "no.csv", "--data", "clicks.csv"], "items=no.csv: cannot be read: No such file or directory"),
    ],
)
def test_titles_that_cannot_be_had_are_said_before_anything_is_trained(arguments: list[str], message: str) -> None:
    demo = [sys.executable, "-m", "streamrec", "demo", *arguments]
    done = subprocess.run(demo, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, f"streamrec: {message}\n")


def test_clicks_too_few_for_a_retrain_leave_the_demo_working(tmp_path: Path) -> None:
    path, summary = tmp_path / "clicks.csv", tmp_path / "summary.json"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u{n % 2},i{n % 3},{NOON_MS + n}\n" for n in range(12)))
    with start_demo(path, "--json", str(summary)) as demo:
        output, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, output
    assert json.loads(summary.read_text())["swap"] is None
    assert "no new model this time: no user has a new event" in output


@pytest.mark.parametrize("command", ["streamrec.demo.daemon", "retrain"])
async def test_ctrl_c_ends_the_demo_cleanly_and_leaves_no_child_behind(own_clicks: Path, command: str) -> None:
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


async def test_with_stay_the_page_is_up_after_the_last_click_until_ctrl_c(tmp_path: Path) -> None:
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
        assert output.index("see it live") < output.index("summary") < output.index("The page stays")
        status, page = await asyncio.to_thread(get, address)
        assert status == 200 and "<title>streamrec</title>" in page
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, rest
    assert "Traceback" not in rest
    assert (await asyncio.to_thread(get, address))[0] == 0
