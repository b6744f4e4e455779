"""The command line: check, replay, help texts, wrong usage, embedded serving."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamrec.daemon
from streamrec.commands.main import _parser
from streamrec.commands.options import KAFKA, REDIS
from streamrec.commands.serve import FLAGS as SERVE_FLAGS
from streamrec.local.process import free_port
from streamrec.redis.client import RedisClient
from streamrec.redis_urls import MASK
from streamrec.settings import Settings, all_settings
from streamrec.settings_sources import secret_variables

from support.served_schemas import ServedSchemas

MakeSettings = Callable[..., Settings]


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


async def test_check_reports_the_schema_registry_and_the_items_topic(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedSchemas(login=("ann", "s3cret"))
    monkeypatch.setenv("STREAMREC_EVENTS_SCHEMA_REGISTRY_URL", served.url)
    monkeypatch.setenv("STREAMREC_ITEMS_TOPIC", "items-of-check")
    away = await run("check")
    async with served.up():
        refused = await run("check")
        monkeypatch.setenv("STREAMREC_EVENTS_SCHEMA_REGISTRY_USERNAME", "ann")
        monkeypatch.setenv("STREAMREC_EVENTS_SCHEMA_REGISTRY_PASSWORD", "s3cret")
        answers = await run("check")
    lines = [next(line for line in found.out.splitlines() if "schema" in line) for found in (away, refused, answers)]
    assert lines[0].startswith("FAILED  schema") and "cannot be reached" in lines[0]
    assert lines[1].startswith("FAILED  schema") and "STREAMREC_EVENTS_SCHEMA_REGISTRY_USERNAME" in lines[1]
    assert lines[2] == f"ok      schema  {served.url} answers"
    assert "items-of-check does not exist yet" in answers.out


async def test_check_show_masks_secrets_and_is_a_settings_file(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMREC_KAFKA_SASL_PASSWORD", "s3cr3t")
    monkeypatch.setenv("STREAMREC_EVENTS_ROLES", "click=click,add to cart=ignore")
    arguments = ["check", "--show", "--redis-url", "redis://u:s3cr3t@h:1/0", "--kafka-topic", "views"]
    result = await run(*arguments)
    assert (result.status, result.err) == (0, "")
    assert "s3cr3t" not in result.out
    shown = tomllib.loads(result.out)
    assert shown["redis"]["url"] == f"redis://u:{MASK}@h:1/0"
    assert (shown["kafka"]["sasl_password"], shown["kafka"]["topic"]) == (MASK, "views")
    assert shown["events"]["roles"] == {"click": "click", "add to cart": "ignore"}
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
    assert re.fullmatch(rf"2 events to topic {topic} in \d+\.\d s\n", result.out)
    assert result.err == f"topic {topic} created with 4 partitions\n"
    path.write_text("user_id,item_id,timestamp\nann,a,1700000000\nann,b\n")
    result = await run("replay", str(path), "--timestamp-unit", "s")
    assert (result.status, result.out) == (1, "")
    problem = "3 columns expected, got 2; correct the row, or --separator"
    assert result.err == f"streamrec: {path}:3: {problem} (1 events before it were sent)\n"


async def test_a_misspelt_variable_is_a_warning(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMREC_TOPK", "7")
    result = await run("check", "--show")
    assert result.err == "streamrec: STREAMREC_TOPK is not a setting; did you mean STREAMREC_LISTS_TOP_K?\n"


FLAGS = {
    "serve": (*KAFKA, *REDIS, *SERVE_FLAGS, "config", "burst", "embedded"),
    "replay": (*KAFKA, "config", "rate", "limit", "user_column", "item_column", "separator", "timestamp_unit"),
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
ACTIONS = ("list", "show", "publish", "promote", "rollback", "hold", "shadow", "diff", "prune")


async def test_help_names_every_command(run: Callable[..., Any]) -> None:
    result = await run("--help")
    assert (result.status, result.err) == (0, "")
    assert re.findall(r"^    (\w+)  ", result.out, re.MULTILINE) == [
        *list(FLAGS)[:-2],
        "models",
        "items",
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

    async def serve(settings: Settings, burst: bool, on_end: Callable[[int], None]) -> int:
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
        "serve", "--embedded", "--model-dir", str(model_dir), "--lists-top-k", "3", "--events-roles", "a=click"
    )
    assert result.status == 7
    (settings,) = served
    assert result.out == (
        f"export STREAMREC_KAFKA_BOOTSTRAP_SERVERS={settings.kafka.bootstrap_servers}\n"
        f"export STREAMREC_REDIS_URL={settings.redis.url.get_secret_value()}\n"
    )
    assert (settings.lists.top_k, settings.events.roles, settings.model.dir) == (3, {"a": "click"}, model_dir)
    assert settings.kafka.sasl_password is not None
    assert settings.kafka.sasl_password.get_secret_value() == "s3cr3t"
    assert "http_port" not in settings.given  # so a taken default port is still replaced
