"""Access to the page of a daemon: tokens, host names, security headers, no writes."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import ClientSession

from streamrec.web.access import MAX_BEARERS, MAX_LOGINS, is_loopback
from streamrec.web.tries import MAX_ADDRESSES, WINDOW_S, Tries

from support.daemon_process import Daemon
from support.page import get_json, status
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]

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


async def test_an_address_may_try_few_tokens_a_minute(start_daemon: StartDaemon, http: ClientSession) -> None:
    daemon = start_daemon(http_token=TOKEN)
    await daemon.wait_ready()
    login = f"{daemon.http}/login"
    async with http.post(login, data={"token": TOKEN}, allow_redirects=False) as answer:
        cookie = {"Cookie": answer.headers["Set-Cookie"].split(";")[0]}
    answers = []
    for number in range(MAX_LOGINS + 20):
        token = TOKEN if number > MAX_LOGINS + 10 else f"guess {number}"
        async with http.post(login, data={"token": token}, allow_redirects=False) as answer:
            answers.append(answer.status)
    assert answers == [303] * MAX_LOGINS + [429] * 20, "the right token is not looked at either"
    async with http.post(login, data={"token": TOKEN}, allow_redirects=False) as answer:
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert "try again in" in await answer.text()
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert await status(http, daemon.http, headers=right) == 200, "programs are not affected"
    assert await status(http, daemon.http, headers=cookie) == 200
    assert daemon.output.count("login refused") == MAX_LOGINS
    for number in range(MAX_BEARERS + 1):
        guess = {"Authorization": f"Bearer guess-{number}"}
        expected = 401 if number < MAX_BEARERS else 429
        assert await status(http, f"{daemon.http}/metrics", headers=guess) == expected
    assert await status(http, f"{daemon.http}/metrics", headers=right) == 429
    assert await status(http, daemon.http, headers=right | cookie) == 200
    assert await status(http, f"{daemon.http}/livez", headers=guess) == 200


def test_tries_count_by_address_and_window_in_bounded_memory() -> None:
    now = [1_000.0]
    tries = Tries(3, lambda: now[0])
    for _ in range(3):
        assert tries.wait_s("10.0.0.1") == 0
        tries.failed("10.0.0.1")
        now[0] += 1
    assert tries.wait_s("10.0.0.1") == WINDOW_S - 3
    assert tries.wait_s("::ffff:10.0.0.1") == WINDOW_S - 3
    assert tries.wait_s("10.0.0.2") == tries.wait_s(None) == 0
    now[0] += WINDOW_S
    assert tries.wait_s("10.0.0.1") == 0
    for number in range(3):
        tries.failed(f"2001:db8::{number}")
    assert tries.wait_s("2001:db8::ffff") == WINDOW_S, "one customer has a whole network"
    assert tries.wait_s("2001:db8:0:1::1") == 0
    for number in range(5_000):
        tries.failed(f"10.{number // 250}.{number % 250}.1")
    assert len(tries._failed) == MAX_ADDRESSES


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
