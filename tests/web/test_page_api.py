"""The API of the live page over plain HTTP: the stream of updates, users, the demo's clicks, viewers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from streamrec.redis.keys import Keys
from streamrec.web.explain import MAX_CLICKS
from streamrec.web.page import MAX_VIEWERS

from support.daemon_process import Daemon
from support.kafka_client import feed, produce_clicks
from support.page import events, get_json, status
from support.redis_access import raw_redis
from support.waiting import eventually
from support.workload import NO_EVENTS, Record

StartDaemon = Callable[..., Daemon]

DEMO = ("streamrec.demo.daemon",)


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
    offsets: list[int] = []  # of the list that the page shows

    async def produce() -> None:
        for _ in range(total):
            await feed(daemon.settings, [Record(b"k", NO_EVENTS["not JSON"], bad=True)])
            await asyncio.sleep(0.2)

    async with ClientSession() as http, asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(produce())
        async with contextlib.aclosing(events(http, f"{daemon.http}/api/live")) as stream:
            async for name, update in stream:
                if name != "live":
                    continue
                if update["dead_letters"] is not None:
                    offsets = [letter["offset"] for letter in update["dead_letters"]]
                assert update["now"]["dead_letters"] == len(offsets)
                assert len(await get_json(http, f"{daemon.http}/api/dead-letters")) >= len(offsets)
                if len(offsets) == total:
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


async def test_in_the_demo_a_visitor_clicks_as_a_new_user_only(
    start_daemon: StartDaemon, http: ClientSession, tmp_path: Path
) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\ni7,Brazil\ni8,Alien\n")
    daemon = start_daemon(command=DEMO, http_titles=items)
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


async def test_asking_for_the_head_of_the_stream_takes_no_place(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    await daemon.wait_ready()
    async with contextlib.AsyncExitStack() as requests:
        http = await requests.enter_async_context(ClientSession())
        for _ in range(2 * MAX_VIEWERS):
            answer = await requests.enter_async_context(http.head(f"{daemon.http}/api/live"))
            assert (answer.status, answer.content_type) == (200, "text/event-stream")
            assert await answer.read() == b""
        host, port = daemon.http.removeprefix("http://").rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HEAD /api/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 200 ") and body == b""
        for _ in range(MAX_VIEWERS):
            assert (await requests.enter_async_context(http.get(f"{daemon.http}/api/live"))).status == 200
        answer = await requests.enter_async_context(http.head(f"{daemon.http}/api/live"))
        assert answer.status == 200


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
