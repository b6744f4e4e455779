"""The API of the live page over plain HTTP: access, responses, and that it only reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout

from streamrec.redis.keys import Keys
from streamrec.settings import Settings
from streamrec.web.access import is_loopback
from streamrec.web.explain import MAX_CLICKS
from streamrec.web.page import MAX_VIEWERS

from support.harness import NO_EVENTS, Daemon, Record, eventually, feed, produce_clicks
from support.redis_access import raw_redis

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]

TOKEN = "t0ken-of-enough-characters"
PATHS = (
    "/",
    "/api/live",
    "/api/user?id=ann",
    "/api/why?id=ann",
    "/api/users",
    "/api/dead-letters",
    "/metrics",
    "/page/page.js",
)
DEMO = ("streamrec.demo.daemon",)


@pytest.fixture
async def http() -> AsyncIterator[ClientSession]:
    async with ClientSession(timeout=ClientTimeout(20)) as session:
        yield session


async def status(http: ClientSession, url: str, method: str = "GET", **options: Any) -> int:
    async with http.request(method, url, allow_redirects=False, **options) as answer:
        return answer.status


async def get_json(http: ClientSession, url: str) -> Any:
    async with http.get(url) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def events(http: ClientSession, url: str) -> AsyncIterator[tuple[str, Any]]:
    """Yield server-sent events as (name, value)."""
    async with http.get(url, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.content_type == "text/event-stream"
        name = ""
        async for line in answer.content:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


async def test_the_stream_sends_the_past_first_and_then_updates(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    await produce_clicks(daemon.settings, [("ann", f"i{n}") for n in range(20)])
    await daemon.wait_handled(20)
    await feed(daemon.settings, [Record(b"k", NO_EVENTS["not JSON"], bad=True)])

    async def received_all() -> bool:
        async with ClientSession() as http:
            async with contextlib.aclosing(events(http, f"{daemon.http}/api/live")) as stream:
                name, about = await anext(stream)
                assert (name, about["topic"], about["demo"]) == ("about", daemon.settings.kafka.topic, False)
                _, first = await anext(stream)
                began = time.monotonic()
                _, second = await anext(stream)
                assert time.monotonic() - began < 1.0, "an update at least every second"
            now = first["now"]
            assert second["now"]["at_ms"] > now["at_ms"]
            assert len(second["points"]) <= 1, "a point is sent once"
            return now["dead_letters"] == 1 and sum(point[1] for point in first["points"]) > 0

    await eventually(received_all)
    async with ClientSession() as http:
        (letter,) = await get_json(http, f"{daemon.http}/api/dead-letters")
        assert letter["reason"].startswith("not a click event: ")
        assert letter["offset"] >= 0


async def test_every_update_has_as_many_dead_letters_as_it_counts(start_daemon: StartDaemon) -> None:
    daemon, total = start_daemon(), 6
    await daemon.wait_ready()
    bad = [Record(b"k", NO_EVENTS["not JSON"], bad=True)]
    listed, offsets = 0, []

    async with ClientSession() as http, asyncio.timeout(60), asyncio.TaskGroup() as group:

        async def produce() -> None:
            for _ in range(total):
                await feed(daemon.settings, bad)
                await asyncio.sleep(0.2)

        group.create_task(produce())
        async with contextlib.aclosing(events(http, f"{daemon.http}/api/live")) as stream:
            async for name, update in stream:
                if name != "live":
                    continue
                counted, letters = update["now"]["dead_letters"], update["dead_letters"]
                assert (letters is None) == (counted == listed and offsets != []) or counted == listed == 0
                if letters is not None:
                    listed, offsets = len(letters), [letter["offset"] for letter in letters]
                assert counted == listed
                assert len(await get_json(http, f"{daemon.http}/api/dead-letters")) >= counted
                if counted == total:
                    break
    assert len(set(offsets)) == total


async def test_a_user_is_shown_by_title_with_scores_model_and_age(
    start_daemon: StartDaemon, http: ClientSession, tmp_path: Path
) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\ni1,<script>alert(1)</script>\ni2,Brazil\n")
    daemon = start_daemon(http_titles=items, lists_top_k=50, lists_filter_seen=False)
    await daemon.wait_ready()
    await produce_clicks(daemon.settings, [("ann", f"i{n % 9}") for n in range(30)])

    async def shown() -> Any:
        user = await get_json(http, f"{daemon.http}/api/user?id=ann")
        return user if user["list"] and user["list"]["n"] == 30 else None

    user = await eventually(shown)
    assert (user["n"], len(user["clicks"])) == (30, 8), "all stored clicks"
    assert user["clicks"][0] == {"id": "i2", "title": "Brazil"}, "newest first"
    assert user["clicks"][1] == {"id": "i1", "title": "<script>alert(1)</script>"}
    listed = user["list"]
    assert len(listed["items"]) == 50
    assert (listed["n"], listed["items"][0]["score"] >= listed["items"][1]["score"]) == (30, True)
    assert listed["model"] == user["list"]["model"] != "popular"
    assert 0 <= user["now_ms"] - listed["published_ts_ms"] < 60_000
    why = await get_json(http, f"{daemon.http}/api/why?id=ann")
    assert (why["id"], why["n"]) == (listed["items"][0]["id"], 30)
    assert why["score"] == pytest.approx(listed["items"][0]["score"], abs=1e-2)
    assert [click["id"] for click in why["clicks"]] == [click["id"] for click in user["clicks"]][:MAX_CLICKS]
    assert any(click["fall"] for click in why["clicks"])
    other = await get_json(http, f"{daemon.http}/api/why?id=ann&item=i2")
    assert (other["id"], other["title"]) == ("i2", "Brazil")
    assert await get_json(http, f"{daemon.http}/api/users?like=AN") == ["ann"]
    assert await get_json(http, f"{daemon.http}/api/users?like=bob") == []


async def test_bad_requests_are_answered_and_the_daemon_continues(
    start_daemon: StartDaemon, http: ClientSession
) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    user = await get_json(http, f"{daemon.http}/api/user?id=unknown")
    assert (user["n"], user["clicks"], user["list"]) == (0, [], None)
    assert await status(http, f"{daemon.http}/api/why?id=unknown") == 404
    for bad in ("", f"?id={'x' * 257}", "?id=%00", "?id="):
        assert await status(http, f"{daemon.http}/api/user{bad}") == 400
    for path in ("/page/../web.py", "/page/%2e%2e%2fweb.py", "/page/login.html", "/page/", "/api/none"):
        assert await status(http, daemon.http + path) == 404, path
    keys = Keys(daemon.settings.redis.key_prefix)
    async with raw_redis(daemon.settings) as redis:
        await redis.set(keys.sequence("ann"), "garbage")
        await redis.lpush(keys.recommendation("bob"), "not a string")  # type: ignore[misc]
    async with http.get(f"{daemon.http}/api/user?id=ann") as answer:
        assert answer.status == 503
        assert "the stored sequence of user 'ann' cannot be read" in await answer.text()
    assert await get_json(http, f"{daemon.http}/api/user?id=bob")
    assert (await daemon.get("/readyz"))[0] == 200
    assert "Traceback" not in daemon.output


async def test_every_response_forbids_content_from_elsewhere(start_daemon: StartDaemon, http: ClientSession) -> None:
    daemon = start_daemon(http_token=TOKEN)
    await daemon.wait_ready()
    for path in (*PATHS, "/livez", "/login", "/none"):
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}"}):
            async with http.get(daemon.http + path, headers=headers) as answer:
                policy = answer.headers["Content-Security-Policy"].split("; ")
                assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
                assert "unsafe" not in " ".join(policy)
                assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_with_a_token_all_but_the_health_checks_requires_it(
    start_daemon: StartDaemon, http: ClientSession
) -> None:
    daemon = start_daemon(http_token=TOKEN)
    await daemon.wait_ready()
    right = {"Authorization": f"Bearer {TOKEN}"}
    for path in PATHS:
        url = daemon.http + path
        assert await status(http, url) == 401, path
        for wrong in ("Bearer wrong", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer \xff", "Bearer"):
            assert await status(http, url, headers={"Authorization": wrong}) == 401, wrong
        assert await status(http, url, headers={"Cookie": f"streamrec={TOKEN}"}) == 401
        if path != "/api/why?id=ann":  # there is no list
            assert await status(http, url, headers=right) == 200, path
    for path in ("/livez", "/readyz"):
        assert await status(http, daemon.http + path) == 200
    assert TOKEN not in daemon.output


async def test_the_form_sets_a_cookie_that_does_not_reveal_the_token(
    start_daemon: StartDaemon, http: ClientSession
) -> None:
    daemon = start_daemon(http_token=TOKEN)
    await daemon.wait_ready()
    for data in ({"token": "wrong"}, {}, {"other": TOKEN}):
        async with http.post(f"{daemon.http}/login", data=data, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (303, "./#wrong")
            assert "Set-Cookie" not in answer.headers
    assert await status(http, f"{daemon.http}/login", "POST", data={"token": "x" * 100_000}) == 413
    async with http.post(f"{daemon.http}/login", data={"token": TOKEN}, allow_redirects=False) as answer:
        cookie = answer.headers["Set-Cookie"]
    assert TOKEN not in cookie
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    async with ClientSession(headers={"Cookie": cookie.split(";")[0]}) as known:
        assert await status(known, daemon.http) == 200
        assert await get_json(known, f"{daemon.http}/api/users") == []


async def test_without_a_token_only_names_of_this_machine_open_the_page(
    start_daemon: StartDaemon, http: ClientSession
) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    for host, expected in (("rebound.example", 403), ("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:9", 200)):
        assert await status(http, f"{daemon.http}/api/users", headers={"Host": host}) == expected, host
        assert await status(http, f"{daemon.http}/metrics", headers={"Host": host}) == 200
    assert "STREAMREC_HTTP_TOKEN" not in daemon.output


async def test_a_port_open_to_other_machines_without_a_token_logs_a_warning(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(http_host="0.0.0.0")
    await eventually(lambda: daemon.has_logged("can read what users click: set STREAMREC_HTTP_TOKEN"))


def test_loopback_is_decided_by_the_name_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", "")))


async def test_outside_the_demo_nothing_can_be_written(start_daemon: StartDaemon, http: ClientSession) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    click = {"user_id": "visitor-abcd", "item_id": "i1"}
    for path in ("/", *(path.partition("?")[0] for path in PATHS), "/api/click", "/api/items", "/login"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert await status(http, daemon.http + path, method, json=click) in (404, 405), (method, path)
    assert await status(http, f"{daemon.http}/api/items") == 404
    assert "sends" not in daemon.output
    assert await daemon.metric("streamrec_events_total") == 0


async def test_in_the_demo_a_visitor_clicks_as_a_new_user_only(
    start_daemon: StartDaemon, http: ClientSession, tmp_path: Path
) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\ni7,Brazil\ni8,Alien\n")
    daemon = start_daemon(program=DEMO, http_titles=items)
    await daemon.wait_ready()
    click, own = f"{daemon.http}/api/click", {"user_id": "visitor-abcd", "item_id": "i7"}
    assert await status(http, click, "POST", json=own) == 503, "the replay has not begun"
    await produce_clicks(daemon.settings, [("ann", "i1")], base_ms=1_000_000_000_000)
    await daemon.wait_handled(1)
    assert [found["id"] for found in await get_json(http, f"{daemon.http}/api/items?like=brAz")] == ["i7"]
    assert (await get_json(http, f"{daemon.http}/api/items"))[0]["id"] == "i0", "the popular items"
    for bad, expected in (
        ({"json": own | {"user_id": "ann"}}, 403),
        ({"json": own | {"item_id": ""}}, 400),
        ({"json": own | {"item_id": 7}}, 400),
        ({"json": {"user_id": "visitor-abcd"}}, 400),
        ({"data": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": json.dumps(own).encode(), "headers": {"Content-Type": "text/plain"}}, 415),
        ({"data": own}, 415),
    ):
        assert await status(http, click, "POST", **bad) == expected, bad
    assert await status(http, click, "POST", json=own) == 200
    await daemon.wait_handled(2)

    async def listed() -> Any:
        return (await get_json(http, f"{daemon.http}/api/user?id=visitor-abcd"))["list"]

    assert (await eventually(listed))["n"] == 1
    user = await get_json(http, f"{daemon.http}/api/user?id=visitor-abcd")
    assert user["clicks"] == [{"id": "i7", "title": "Brazil"}]
    assert user["last_event_ts_ms"] == 1_000_000_000_000, "the time of the replayed stream"


async def test_viewers_are_limited_and_do_not_stop_a_daemon_from_exiting(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    async with contextlib.AsyncExitStack() as open_pages:
        http = await open_pages.enter_async_context(ClientSession())
        live = f"{daemon.http}/api/live"
        for _ in range(MAX_VIEWERS):
            await open_pages.enter_async_context(http.get(live))
        assert await status(http, live) == 503
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert await daemon.wait_exit() == 0
        assert time.monotonic() - began < 6.0
    assert "Traceback" not in daemon.output


async def test_a_closed_page_makes_room_for_another(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    for _ in range(3):
        async with ClientSession() as http:
            answers = [await http.get(f"{daemon.http}/api/live") for _ in range(MAX_VIEWERS // 2)]
            assert {answer.status for answer in answers} == {200}
            for answer in answers:
                answer.close()
        await asyncio.sleep(1.2)  # time for a write or two, which notice the closed connections
    assert "Traceback" not in daemon.output
