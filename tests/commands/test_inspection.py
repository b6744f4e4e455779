"""`streamrec recs` and `streamrec user`: output for people and programs, missing and unreadable values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from streamrec.local.process import free_port
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import Recommendation
from streamrec.serving.publisher import Publisher
from streamrec.settings import Settings

from support.command_line import Result, write_users
from support.redis_access import BASE_MS, raw_redis

MakeSettings = Callable[..., Settings]


def lines_of_json(out: str) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in out.splitlines()), key=lambda found: str(found["user_id"]))


async def test_recs_as_json_is_the_stored_list_a_line_a_user(
    run: Callable[..., Any], make_settings: MakeSettings
) -> None:
    await write_users(make_settings(), {"ann": ["a"], "b b": ["a", "b"]})
    result = await run("recs", "b b", "ann", "--json")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [(f["user_id"], f["n"]) for f in found] == [("b b", 2), ("ann", 1)]
    assert list(found[0]) == ["user_id", "items", "scores", "model", "event_ts_ms", "published_ts_ms", "n"]
    assert (found[0]["items"], found[0]["scores"], found[0]["model"]) == (["é 1", "2"], [2.5, -1.0], "m1")
    assert (result.status, result.err) == (0, "")


async def test_user_as_json_has_the_promised_fields(run: Callable[..., Any], make_settings: MakeSettings) -> None:
    await write_users(make_settings(), {"ann": ["a", "é", "a"]})
    result = await run("user", "ann", "--json")
    assert json.loads(result.out) == {
        "user_id": "ann",
        "items": ["a", "é", "a"],
        "n": 3,
        "last_event_ts_ms": BASE_MS + 2,
    }


async def test_all_lists_every_user_with_any_id(run: Callable[..., Any], make_settings: MakeSettings) -> None:
    users = ["*", "[a]", "?", "{x}", "a\nb", "é", "--json", "ann"]
    await write_users(make_settings(), {user: ["a"] for user in users})
    for command in ("recs", "user"):
        result = await run(command, "--all", "--json")
        assert result.status == 0
        assert [found["user_id"] for found in lines_of_json(result.out)] == sorted(users)


async def test_a_user_id_is_not_a_pattern(run: Callable[..., Any], make_settings: MakeSettings) -> None:
    await write_users(make_settings(), {"ann": ["a"], "*": ["b"]})
    result = await run("user", "*", "a*", "[a]nn", "--json")
    assert [found["items"] for found in lines_of_json(result.out)] == [["b"]]
    assert result.status == 1


CONTROLS = "\x1b[31m\x07\x9b2J\x7f\u202e\u2028\r\n"


@pytest.mark.parametrize("command", ["recs", "user"])
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["for people", "JSON"])
async def test_nothing_that_clients_sent_controls_the_terminal(
    run: Callable[..., Any], make_settings: MakeSettings, command: str, form: tuple[str, ...]
) -> None:
    user = f"ann{CONTROLS}"
    await write_users(make_settings(), {user: [f"item{CONTROLS}", "é"]})
    for arguments in ((user,), ("--all",), (f"none{CONTROLS}",)):
        result = await run(command, *arguments, *form)
        for text in (result.out, result.err):
            assert all(line.isprintable() for line in text.split("\n")), repr(text)
    if form:
        (found,) = lines_of_json((await run(command, user, *form)).out)
        assert found["user_id"] == user
    assert "é" in (await run(command, user, *form)).out


async def test_a_time_that_no_calendar_has_is_shown_as_a_number(
    run: Callable[..., Any], make_settings: MakeSettings
) -> None:
    settings = make_settings()
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).sequence("ann"), b"1 1 1 1 1700000000000000 0 0:1\0a\0")
    assert "the last at 1700000000000000 ms since 1970" in (await run("user", "ann")).out


async def test_for_people_lists_are_ranked_and_sequences_dated(
    run: Callable[..., Any], make_settings: MakeSettings
) -> None:
    await write_users(make_settings(), {"ann": ["a", "b"]})
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
    await write_users(make_settings(), {"ann": ["a"]})
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
    await write_users(settings, {user: ["a"] for user in users})
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
    await write_users(settings, {user: [item]})
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
