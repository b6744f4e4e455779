"""The commands as a person sees them: output, exit status, one clear line for an error."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import streamrec.commands.main
import streamrec.daemon
from streamrec.commands.main import _parser, main
from streamrec.commands.options import KAFKA, REDIS
from streamrec.commands.serve import FLAGS as SERVE_FLAGS
from streamrec.local.daemon import EMBEDDED, environment
from streamrec.local.servers import free_port
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.redis_urls import MASK
from streamrec.schemas import Recommendation
from streamrec.serving.publisher import Publisher
from streamrec.serving.sequences import SequenceStore
from streamrec.settings import Settings, all_settings
from streamrec.settings_sources import secret_variables

from support.redis_access import BASE_MS, clicks, raw_redis

MakeSettings = Callable[..., Settings]


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Run a command in this process, with the test's own servers and keys."""
    for name, value in environment(make_settings()).items():
        if name.startswith("STREAMREC_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "1000")  # each help text on one line
    # configure_logging would remove pytest's handlers
    monkeypatch.setattr(streamrec.commands.main, "configure_logging", lambda *_: None)

    def call(arguments: tuple[str, ...]) -> int:
        try:
            return main(list(arguments))
        except SystemExit as end:  # argparse
            return int(end.code or 0)

    async def run_command(*arguments: str) -> Result:
        status = await asyncio.to_thread(call, arguments)
        return Result(status, *capsys.readouterr())

    return run_command


async def write(settings: Settings, users: dict[str, list[str]]) -> None:
    """Store clicks of users, and publish a list for each user."""
    async with RedisClient(settings.redis) as redis:
        store = SequenceStore(redis, settings.sequences, settings.kafka.topic_epoch, 50, Metrics())
        for user, items in users.items():
            await store.append(clicks(user, items))
        lists = [
            Recommendation(user, ["é 1", "2"], [2.5, -1.0], "m1", BASE_MS, len(items)) for user, items in users.items()
        ]
        await Publisher(redis, settings.lists.ttl_s, Metrics()).publish(lists)


def lines_of_json(out: str) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in out.splitlines()), key=lambda found: str(found["user_id"]))


async def test_recs_as_json_is_the_stored_list_a_line_a_user(
    run: Callable[..., Any], make_settings: MakeSettings
) -> None:
    await write(make_settings(), {"ann": ["a"], "b b": ["a", "b"]})
    result = await run("recs", "b b", "ann", "--json")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [(f["user_id"], f["n"]) for f in found] == [("b b", 2), ("ann", 1)]
    assert list(found[0]) == ["user_id", "items", "scores", "model", "event_ts_ms", "published_ts_ms", "n"]
    assert (found[0]["items"], found[0]["scores"], found[0]["model"]) == (["é 1", "2"], [2.5, -1.0], "m1")
    assert (result.status, result.err) == (0, "")


async def test_user_as_json_has_the_promised_fields(run: Callable[..., Any], make_settings: MakeSettings) -> None:
    await write(make_settings(), {"ann": ["a", "é", "a"]})
    result = await run("user", "ann", "--json")
    assert json.loads(result.out) == {
        "user_id": "ann",
        "items": ["a", "é", "a"],
        "n": 3,
        "last_event_ts_ms": BASE_MS + 2,
    }


async def test_all_lists_every_user_with_any_id(run: Callable[..., Any], make_settings: MakeSettings) -> None:
    users = ["*", "[a]", "?", "{x}", "a\nb", "é", "--json", "ann"]
    await write(make_settings(), {user: ["a"] for user in users})
    for command in ("recs", "user"):
        result = await run(command, "--all", "--json")
        assert result.status == 0
        assert [found["user_id"] for found in lines_of_json(result.out)] == sorted(users)


async def test_a_user_id_is_not_a_pattern(run: Callable[..., Any], make_settings: MakeSettings) -> None:
    await write(make_settings(), {"ann": ["a"], "*": ["b"]})
    result = await run("user", "*", "a*", "[a]nn", "--json")
    assert [found["items"] for found in lines_of_json(result.out)] == [["b"]]
    assert result.status == 1


async def test_for_people_lists_are_ranked_and_sequences_dated(
    run: Callable[..., Any], make_settings: MakeSettings
) -> None:
    await write(make_settings(), {"ann": ["a", "b"]})
    recs = await run("recs", "ann")
    assert re.match(r"user ann: model m1, after 2 events, published \d s ago\n", recs.out)
    assert recs.out.splitlines()[1:] == ["    1  é 1  2.500", "    2  2  -1.000"]
    user = await run("user", "ann")
    assert user.out == "user ann: 2 events, the last at 2023-11-14 22:13:20 UTC; oldest first:\n  a b\n"


@pytest.mark.parametrize("command", ["recs", "user"])
@pytest.mark.parametrize("extra", [[], ["--json"]])
async def test_a_missing_user_is_reported_and_the_others_are_shown(
    run: Callable[..., Any], make_settings: MakeSettings, command: str, extra: list[str]
) -> None:
    await write(make_settings(), {"ann": ["a"]})
    result = await run(command, "bob", "ann", *extra)
    assert result.status == 1
    missing = {"recs": "no list is published for user bob\n", "user": "no sequence is stored for user bob\n"}
    assert result.err == missing[command]
    assert "ann" in result.out


@pytest.mark.parametrize("command", ["recs", "user"])
async def test_all_without_users_prints_nothing(run: Callable[..., Any], command: str) -> None:
    assert await run(command, "--all") == Result(0, "", "")


@pytest.mark.parametrize("command", ["recs", "user"])
@pytest.mark.parametrize("arguments", [[], ["ann", "--all"]])
async def test_users_or_all_must_be_named_but_not_both(
    run: Callable[..., Any], command: str, arguments: list[str]
) -> None:
    assert await run(command, *arguments) == Result(1, "", "streamrec: name the users, or give --all\n")


async def test_a_user_id_must_be_utf_8(run: Callable[..., Any]) -> None:
    result = await run("recs", "\udcff")  # a byte of the command line that is not UTF-8
    assert (result.status, result.out) == (1, "")
    assert "UTF-8" in result.err


async def test_an_unreadable_value_is_one_line(run: Callable[..., Any], make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).recommendation("ann"), "garbage")
    result = await run("recs", "ann")
    assert result.status == 1
    assert re.fullmatch(r"streamrec: the published list of user 'ann' cannot be read: .*\n", result.err)


async def test_unreadable_values_are_reported_and_the_others_are_shown(
    run: Callable[..., Any], make_settings: MakeSettings
) -> None:
    settings = make_settings()
    keys = Keys(settings.redis.key_prefix)
    users = [f"u{n}" for n in range(20)]
    await write(settings, {user: ["a"] for user in users})
    async with raw_redis(settings) as raw:
        for key_of in (keys.recommendation, keys.sequence):
            await raw.set(key_of("u3"), "garbage")
    for command in ("recs", "user"):
        result = await run(command, "--all", "--json")
        assert sorted(found["user_id"] for found in lines_of_json(result.out)) == sorted(set(users) - {"u3"})
        assert result.status == 1
        assert re.fullmatch(r"streamrec: the .* of user 'u3' cannot be read: .*\n", result.err)


async def test_stored_control_characters_do_not_reach_the_terminal(
    run: Callable[..., Any], make_settings: MakeSettings
) -> None:
    steering = "\x1b[2J\x9b2J\r\u202e"
    user, item = f"u{steering}", f"i{steering}"
    settings = make_settings()
    await write(settings, {user: [item]})
    async with RedisClient(settings.redis) as redis:
        newer = Recommendation(user, [item], [1.0], "m", BASE_MS, 2)
        await Publisher(redis, settings.lists.ttl_s, Metrics()).publish([newer])
    for command in ("recs", "user"):
        shown = (await run(command, user)).out
        assert shown.replace("\n", "").isprintable()
        assert shown.count("\\x1b[2J\\x9b2J\\r\\u202e") == 2
        missing = await run(command, f"no{steering}body")
        assert missing.err.replace("\n", "").isprintable()


@pytest.mark.parametrize("arguments", [["recs", "ann"], ["user", "--all"]])
async def test_without_redis_there_is_one_line(run: Callable[..., Any], arguments: list[str]) -> None:
    result = await run(*arguments, "--redis-url", f"redis://:s3cr3t@127.0.0.1:{free_port()}")
    assert result.status == 1
    assert re.fullmatch(r"streamrec: Redis at redis://:\*+@127.0.0.1:\d+: .*STREAMREC_REDIS_URL.*\n", result.err)
    assert "s3cr3t" not in result.err


async def test_check_reports_each_part(run: Callable[..., Any], model_dir: Path) -> None:
    good = await run("check", "--model-dir", str(model_dir))
    assert good.status == 0
    assert [line[:14].split() for line in good.out.splitlines()] == [
        ["ok", "model"],
        ["ok", "Redis"],
        ["ok", "Kafka"],
        ["ok", "topic"],
        ["ok", "topic"],
    ]
    bad = await run("check", "--kafka-bootstrap-servers", f"127.0.0.1:{free_port()}")
    assert bad.status == 1
    assert [line[:14].split() for line in bad.out.splitlines()] == [
        ["FAILED", "model"],
        ["ok", "Redis"],
        ["FAILED", "Kafka"],
    ]
    assert good.err == bad.err == ""


async def test_check_show_masks_secrets_and_is_a_settings_file(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMREC_KAFKA_SASL_PASSWORD", "s3cr3t")
    monkeypatch.setenv("STREAMREC_EVENTS_TYPES", "click,view")
    arguments = ["check", "--show", "--redis-url", "redis://u:s3cr3t@h:1/0", "--kafka-topic", "views"]
    result = await run(*arguments)
    assert (result.status, result.err) == (0, "")
    assert "s3cr3t" not in result.out
    shown = tomllib.loads(result.out)
    assert shown["redis"]["url"] == f"redis://u:{MASK}@h:1/0"
    assert (shown["kafka"]["sasl_password"], shown["kafka"]["topic"]) == (MASK, "views")
    assert shown["events"]["types"] == ["click", "view"]
    assert (shown["lists"]["top_k"], shown["lists"]["filter_seen"], shown["sequences"]["session_gap_s"]) == (
        20,
        True,
        0,
    )
    lines = result.out.splitlines()
    for setting in all_settings().values():
        assert any(re.match(rf"(# )?{setting.key} (=|is not set)", line) for line in lines), setting.name
        monkeypatch.delenv(setting.variable, raising=False)
    path = tmp_path / "streamrec.toml"
    path.write_text(result.out)
    assert (await run("check", "--show", "--config", str(path))).out == result.out


async def test_replay_prints_number_of_events_topic_and_time(
    run: Callable[..., Any], make_settings: MakeSettings, tmp_path: Path
) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("user_id,item_id,timestamp\nann,a,1700000000000\nann,b,1700000001000\n")
    topic = make_settings().kafka.topic
    result = await run("replay", str(path), "--rate", "1000")
    assert result.status == 0
    assert re.fullmatch(rf"2 events to topic {topic} in 0\.\d s\n", result.out)
    assert result.err == f"topic {topic} created with 4 partitions\n"
    path.write_text("user_id,item_id,timestamp\nann,a,1700000000\nann,b\n")
    result = await run("replay", str(path), "--timestamp-unit", "s")
    assert (result.status, result.out) == (1, "")
    assert result.err == f"streamrec: {path}:3: 3 columns expected, got 2 (1 events before it were sent)\n"


async def test_a_misspelt_variable_is_a_warning(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMREC_TOPK", "7")
    result = await run("check", "--show")
    assert result.err == "streamrec: STREAMREC_TOPK is not a setting; did you mean STREAMREC_LISTS_TOP_K?\n"


FLAGS = {
    "serve": (*KAFKA, *REDIS, *SERVE_FLAGS, "config", "burst", "embedded"),
    "replay": (*KAFKA, "config", "rate", "limit", "timestamp_unit"),
    "recs": (*REDIS, "config", "all", "json"),
    "user": (*REDIS, "config", "all", "json"),
    "check": (*KAFKA, *REDIS, "model_dir", "registry_dir", "config", "show"),
    "retrain": (
        *KAFKA,
        *REDIS,
        "archive_dir",
        "registry_dir",
        "retrain_mode",
        "config",
        "json",
        "once",
        "every",
        "min_new_events",
        "no_follow",
    ),
    "rebuild": (*KAFKA, *REDIS, "archive_dir", "model_dir", "registry_dir", "config", "rate", "dry_run"),
    "demo": ("config", "data", "json", "rate", "epochs", "stay"),
    "bench": (
        "model_dir",
        "inference_cache_bytes",
        "config",
        "only",
        "quick",
        "json",
        "hidden_units",
        "num_blocks",
        "num_heads",
    ),
}
ACTIONS = ("list", "show", "publish", "promote", "rollback", "shadow", "diff", "prune")


async def test_help_names_every_command(run: Callable[..., Any]) -> None:
    result = await run("--help")
    assert (result.status, result.err) == (0, "")
    assert re.findall(r"^    (\w+)  ", result.out, re.MULTILINE) == [
        *list(FLAGS)[:-2],
        "models",
        "archive",
        "demo",
        "bench",
    ]
    assert re.findall(r"^    (\w+)  ", (await run("models", "--help")).out, re.MULTILINE) == list(ACTIONS)
    assert "streamrec demo" in result.out


def test_the_redis_url_is_the_only_secret_flag_since_the_list_of_processes_shows_flags() -> None:
    parsers = [_parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    flags = {action.dest for parser in parsers for action in parser._actions}
    assert flags & set(secret_variables().values()) == {"redis_url"}
    assert len(parsers) > 15


@pytest.mark.parametrize("command", FLAGS)
async def test_the_help_of_a_command_explains_its_settings_and_options(run: Callable[..., Any], command: str) -> None:
    result = await run(command, "--help")
    assert (result.status, result.err) == (0, "")
    assert "STREAMREC_*" in result.out
    for name in FLAGS[command]:
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"^  {flag}\b.*  +\S|^  {flag}\b.*\n +\S", result.out, re.MULTILINE), flag
        if name in all_settings():
            assert all_settings()[name].help in result.out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "required: COMMAND"),
        (["nope"], 2, "invalid choice: 'nope'"),
        (["recs", "ann", "--nope"], 2, "unrecognized arguments: --nope"),
        (["replay"], 2, "required: FILE"),
        (["replay", "f", "--rate", "fast"], 2, "--rate"),
        (["replay", "f", "--rate", "-1"], 2, "a number per second"),
        (["replay", "f", "--rate", "nan"], 2, "a number per second"),
        (["replay", "f", "--limit", "-1"], 2, "at least 1"),
        (["replay", "/no/such/file"], 1, "there is no file /no/such/file"),
        (["serve", "--log-format", "xml"], 2, "invalid choice: 'xml'"),
        (["serve", "--sequences-max-len", "many"], 1, "sequences_max_len='many': Input should be a valid integer"),
        (["serve", "--kafka-bootstrap-servers", "localhost"], 1, "'localhost' is not host:port"),
        (["serve"], 1, "no model: set STREAMREC_MODEL_DIR or --model-dir"),
        (["serve", "--embedded"], 1, "no model: set STREAMREC_MODEL_DIR or --model-dir"),
        (["serve", "--model-dir", "/no/such/model"], 1, "/no/such/model"),
        (["check", "--config", "/no/such.toml"], 1, "there is no settings file at /no/such.toml"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
async def test_wrong_usage_ends_in_one_clear_line(
    run: Callable[..., Any], arguments: list[str], status: int, message: str
) -> None:
    result = await run(*arguments)
    assert (result.status, result.out) == (status, "")
    assert message in result.err.splitlines()[-1]
    assert result.err.splitlines()[-1].startswith("streamrec")
    assert all(line.startswith("usage: ") for line in result.err.splitlines()[:-1])


async def test_embedded_serving_keeps_the_other_settings(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    served: list[Settings] = []

    async def serve(settings: Settings, burst: bool) -> int:
        async with RedisClient(settings.redis) as redis:
            await redis.ping()
        served.append(settings)
        return 7

    monkeypatch.setattr(streamrec.daemon, "serve", serve)
    monkeypatch.delenv("STREAMREC_HTTP_PORT")
    monkeypatch.setenv("STREAMREC_KAFKA_SASL_PASSWORD", "s3cr3t")
    for name, of_other_servers in {
        "USERNAME": "ann",
        "PASSWORD": "s3cr3t",
        "URL": "rediss://h",
        "TLS_CA_FILE": "/c",
    }.items():
        monkeypatch.setenv(f"STREAMREC_REDIS_{name}", of_other_servers)
    result = await run(
        "serve", "--embedded", "--model-dir", str(model_dir), "--lists-top-k", "3", "--events-types", "a,b"
    )
    assert result.status == 7
    (settings,) = served
    assert result.out == (
        f"export STREAMREC_KAFKA_BOOTSTRAP_SERVERS={settings.kafka.bootstrap_servers}\n"
        f"export STREAMREC_REDIS_URL={settings.redis.url.get_secret_value()}\n"
    )
    assert (settings.lists.top_k, settings.events.types, settings.model.dir) == (3, ("a", "b"), model_dir)
    assert settings.kafka.sasl_password is not None
    assert settings.kafka.sasl_password.get_secret_value() == "s3cr3t"
    assert "http_port" not in settings.given  # so a taken default port is still replaced


def process(settings: Settings, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *EMBEDDED, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(settings), "PYTHONUNBUFFERED": ""},
    )


@pytest.mark.parametrize(
    ("arguments", "status"), [(["recs"], 1), (["nope"], 2), (["check", "--config", "x.toml"], 1), (["--help"], 0)]
)
def test_the_process_ends_with_the_status_and_without_a_traceback(
    make_settings: MakeSettings, arguments: list[str], status: int
) -> None:
    child = process(make_settings(), *arguments)
    _, err = child.communicate(timeout=60)
    assert child.returncode == status
    assert "Traceback" not in err


@pytest.mark.parametrize("users", [1, 1_500], ids=["fits into the buffer", "larger than the buffer"])
@pytest.mark.parametrize("command", ["recs", "user"])
async def test_a_closed_pipe_is_no_error(make_settings: MakeSettings, users: int, command: str) -> None:
    settings = make_settings()
    await write(settings, {f"u{k}": ["a"] * 20 for k in range(users)})
    child = process(settings, command, "--all", "--json")
    assert child.stdout is not None
    assert child.stderr is not None
    if users > 1:
        assert json.loads(await asyncio.to_thread(child.stdout.readline))["user_id"].startswith("u")
    child.stdout.close()
    err = await asyncio.to_thread(child.stderr.read)
    await asyncio.to_thread(child.wait, 60)
    child.stderr.close()
    assert err == ""


def test_ctrl_c_ends_with_one_line(make_settings: MakeSettings, tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("user_id,item_id,timestamp\n" + "ann,a,1700000000000\n" * 100)
    settings = make_settings()
    child = process(settings, "replay", str(path), "--rate", "1")
    assert child.stderr is not None
    first = child.stderr.readline()
    assert "created" in first
    child.send_signal(2)
    with contextlib.closing(child.stderr):
        rest = child.stderr.read()
    assert child.wait(60) == 130
    assert rest == "streamrec: stopped\n"
    assert child.stdout is not None
    child.stdout.close()


def test_showing_a_list_does_not_import_torch(make_settings: MakeSettings) -> None:
    code = (
        "import sys; from streamrec.commands.main import main; main(['recs', 'ann']); sys.exit('torch' in sys.modules)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment(make_settings()), capture_output=True, text=True, timeout=60
    )
    assert (child.returncode, child.stderr) == (0, "no list is published for user ann\n")
