"""Sentinels that are away, know no primary, or refuse: one line says what to do. One sentinel is enough."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator

import pytest

from streamrec.errors import EmbeddedError, RedisRefused, RedisUnavailable
from streamrec.redis.client import RedisClient
from streamrec.settings import Settings

from support.redis_cluster import node
from support.redis_rights import RIGHTS
from support.redis_sentinels import NAME, WatchedServers
from support.waiting import eventually

MakeSettings = Callable[..., Settings]
PASSWORD = "s3cr3t-a@b"


@pytest.fixture(scope="module")
def lone() -> Iterator[WatchedServers]:
    """A primary without replicas, so that no failover can happen."""
    found = WatchedServers(replicas=0, down_after_ms=200)
    try:
        found.start()
    except EmbeddedError as error:
        found.stop()
        pytest.skip(f"needs sentinels: {error}")
    yield found
    found.stop()


async def refusal_of(settings: Settings) -> str:
    async with RedisClient(settings.redis) as redis, asyncio.timeout(10):
        with pytest.raises(RedisUnavailable) as raised:
            await redis.ping()
    message = str(raised.value)
    assert "\n" not in message and PASSWORD not in message
    return message


async def test_one_sentinel_is_enough_and_no_call_waits_long_for_another(
    make_settings: MakeSettings, lone: WatchedServers
) -> None:
    settings = make_settings(redis_url=lone.redis_url, redis_timeout_s=0.3)
    dead, hangs, _ = lone.sentinels
    dead.kill()
    hangs.pause()
    try:
        async with RedisClient(settings.redis) as redis, asyncio.timeout(3):
            await redis.ping()
    finally:
        hangs.resume()
        dead.start()


async def test_a_daemon_needs_no_sentinel_while_the_primary_answers(
    make_settings: MakeSettings, lone: WatchedServers
) -> None:
    async with RedisClient(make_settings(redis_url=lone.redis_url).redis) as redis:
        await redis.ping()
        for sentinel in lone.sentinels:
            sentinel.kill()
        try:
            await redis.ping()
            await redis.set("k", b"v", 60)
        finally:
            for sentinel in lone.sentinels:
                sentinel.start()


async def test_no_reachable_sentinel_is_reported_soon_and_without_the_password(
    make_settings: MakeSettings, unused_tcp_port: int
) -> None:
    url = f"redis+sentinel://u:s3cr3t@127.0.0.1:{unused_tcp_port},127.0.0.1:{unused_tcp_port}/{NAME}/0"
    message = await refusal_of(make_settings(redis_url=url))
    assert re.fullmatch(
        r"Redis at redis\+sentinel://u:\*+@127\.0\.0\.1:\d+,127\.0\.0\.1:\d+/clicks/0: no sentinel answers \(127.*\); "
        r"is STREAMREC_REDIS_URL right, and are the sentinels up\?",
        message,
    )
    assert "s3cr3t" not in message


async def test_an_unknown_name_is_reported_with_the_known_ones(
    make_settings: MakeSettings, lone: WatchedServers
) -> None:
    message = await refusal_of(make_settings(redis_url=lone.redis_url.replace(NAME, "mymaster")))
    assert "know no primary 'mymaster' (they know: clicks); correct the name in STREAMREC_REDIS_URL" in message


async def test_sentinels_that_monitor_nothing_say_so(make_settings: MakeSettings, lone: WatchedServers) -> None:
    async with node(lone.sentinels[2]) as client:
        await client.execute_command("SENTINEL REMOVE", NAME)
        url = f"redis+sentinel://127.0.0.1:{lone.sentinels[2].port}/{NAME}"
        message = await refusal_of(make_settings(redis_url=url))
        await client.execute_command("SENTINEL MONITOR", NAME, "127.0.0.1", lone.servers[0].port, 2)
        await client.execute_command("SENTINEL SET", NAME, "down-after-milliseconds", 200)
    assert "(they know: none); correct the name in STREAMREC_REDIS_URL, or let the sentinels monitor it" in message


async def test_a_primary_that_is_down_without_a_replica_is_named(
    make_settings: MakeSettings, lone: WatchedServers
) -> None:
    settings, primary = make_settings(redis_url=lone.redis_url), lone.servers[0]
    primary.kill()
    try:

        async def is_down() -> bool:
            states = [await lone.state(number) for number in range(3)]
            return all(state["is_sdown"] for state in states)

        await eventually(is_down)
        message = await refusal_of(settings)
    finally:
        primary.start()
    assert f"see the primary 'clicks' (127.0.0.1:{primary.port}) down and name no other" in message
    assert "`SENTINEL CKQUORUM clicks`" in message


async def test_a_mix_up_of_sentinel_and_server_is_explained(make_settings: MakeSettings, lone: WatchedServers) -> None:
    server, sentinel = lone.servers[0].port, lone.sentinels[0].port
    message = await refusal_of(make_settings(redis_url=f"redis+sentinel://127.0.0.1:{server}/{NAME}"))
    assert f"127.0.0.1:{server} is no sentinel" in message and f"or write redis://127.0.0.1:{server}/DB" in message
    message = await refusal_of(make_settings(redis_url=f"redis://127.0.0.1:{sentinel}/0"))
    assert "it is a sentinel, no server; write redis[s]+sentinel://" in message


async def test_password_and_user_of_server_and_sentinels_are_separate(make_settings: MakeSettings) -> None:
    servers = WatchedServers(
        replicas=0,
        server_options=("--requirepass", "0f-the-server"),
        sentinel_lines=(
            f"sentinel auth-pass {NAME} 0f-the-server",
            f"user default on >{PASSWORD} ~* &* +@all",
            f"user streamrec {RIGHTS['streamrec'].replace('PASSWORD', PASSWORD)}",
        ),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(servers.stop)
        servers.start()

        def settings(**more: str) -> Settings:
            url = servers.redis_url.replace("//", "//:0f-the-server@")
            return make_settings(redis_url=url, **more)

        for login in ({}, {"redis_sentinel_username": "streamrec"}):
            right = settings(redis_sentinel_password=PASSWORD, **login)
            async with RedisClient(right.redis) as redis:
                await eventually(lambda redis=redis: answers(redis))  # a sentinel needs a moment to see the server
        for wrong in (settings(), settings(redis_sentinel_password="wr0ng")):
            async with RedisClient(wrong.redis) as redis:
                with pytest.raises(
                    RedisRefused, match="set STREAMREC_REDIS_SENTINEL_USERNAME and STREAMREC_REDIS_SENT"
                ):
                    await redis.ping()
            message = await refusal_of(wrong)
            assert "0f-the-server" not in message and "wr0ng" not in message
        without = make_settings(redis_url=servers.redis_url, redis_sentinel_password=PASSWORD)
        assert "set STREAMREC_REDIS_USERNAME and STREAMREC_REDIS_PASSWORD" in await refusal_of(without)


async def answers(redis: RedisClient) -> bool:
    with contextlib.suppress(RedisRefused):
        await redis.ping()
        return True
    return False
