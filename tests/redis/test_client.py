"""The client of Redis: its errors, time-outs, and cancellations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from streamrec.errors import RedisRejected, RedisUnavailable
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.script import Script
from streamrec.serving.publisher import PUBLISH
from streamrec.serving.sequences import APPEND
from streamrec.settings import Settings

from support.redis_cluster import node
from support.servers import OwnRedis

MakeSettings = Callable[..., Settings]


async def ping_for_ever(redis: RedisClient) -> None:
    while True:
        await redis.ping()


async def run_for_ever(redis: RedisClient) -> None:
    while True:
        await redis.run(PUBLISH, [], [1, 2])


@pytest.mark.parametrize("work", [ping_for_ever, run_for_ever])
async def test_a_task_that_uses_redis_can_be_cancelled_at_any_moment(
    redis: RedisClient, work: Callable[..., object]
) -> None:
    await redis.ping()
    for turns in range(200):
        task: asyncio.Task[None] = asyncio.create_task(work(redis))  # type: ignore[arg-type]
        for _ in range(turns % 23):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=2)
        assert done, f"cancelled after {turns % 23} turns of the event loop, and still running"
        assert task.cancelled()


async def test_a_cancelled_task_may_use_redis_while_it_cleans_up(redis: RedisClient) -> None:
    cleaned = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await redis.ping()
            cleaned.set()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    assert cleaned.is_set()


async def test_an_unreachable_redis_is_reported_soon_and_without_the_password(
    make_settings: MakeSettings, unused_tcp_port: int
) -> None:
    url = f"redis://u:s3cr3t@127.0.0.1:{unused_tcp_port}/0"
    async with RedisClient(make_settings(redis_url=url).redis) as redis:
        async with asyncio.timeout(5):
            with pytest.raises(
                RedisUnavailable, match=rf"Redis at redis://u:\*+@127.0.0.1:{unused_tcp_port}/0: "
            ) as raised:
                await redis.ping()
        assert "s3cr3t" not in str(raised.value)


class ServerThatNeverAnswers:
    """Accepts connections, reads, and never answers."""

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._read, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    @staticmethod
    async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()


async def test_a_redis_that_hangs_is_an_error_after_the_time_out(make_settings: MakeSettings) -> None:
    async with (
        ServerThatNeverAnswers() as url,
        RedisClient(make_settings(redis_url=url, redis_timeout_s=0.1).redis) as redis,
    ):
        async with asyncio.timeout(5):
            with pytest.raises(RedisUnavailable):
                await redis.ping()


async def test_more_callers_than_connections_wait_for_their_turn(redis: RedisClient) -> None:
    await asyncio.gather(*(redis.ping() for _ in range(100)))


async def test_a_command_that_redis_refuses_is_an_error(redis: RedisClient, make_settings: MakeSettings) -> None:
    key = f"{make_settings().redis.key_prefix}:list"
    await redis.set(key, b"a string", 60)
    with pytest.raises(RedisRejected, match=rf"key {key} of Redis at .*WRONGTYPE.*remove or rename it"):
        await redis.members(key)


async def test_a_script_that_fails_is_an_error(redis: RedisClient) -> None:
    with pytest.raises(RedisRejected, match="script"):
        await redis.run(APPEND, ["no arguments"], [])


def script_of(text: str, *control: str) -> Script:
    """Return a script that is in no file."""
    script = Script("tests", "of_a_test", control=control)
    vars(script)["text"] = text
    return script


# what Redis may answer to one user's call for ever, and to the others' never
FOR_ONE_USER = [
    "redis.error_reply('ERR an error that nobody knows')",
    "redis.error_reply('STREAMREC the value is of a later version')",
    "redis.call('LPUSH', KEYS[i])",
    "tonumber(nil .. 'x')",
    "redis.call('INCR', KEYS[i])",
    "redis.call('SETRANGE', KEYS[i], 2^40, 'x')",
]


@pytest.mark.parametrize("reply", FOR_ONE_USER)
async def test_an_error_that_one_user_causes_is_that_users_alone(
    redis: RedisClient, make_settings: MakeSettings, reply: str
) -> None:
    script = script_of(
        f"""local reply = {{}}
        for i = 1, #KEYS do
          redis.call('SET', KEYS[i], ARGV[i])
          if ARGV[i] == 'bad' then
            local answer = {reply}
            if type(answer) == 'table' then return answer end
          end
          reply[i] = ARGV[i]
        end
        return reply""",
        "good",
    )
    prefix = make_settings().redis.key_prefix
    values = ["a", "bad", "b", "bad", "c"]
    replies = await redis.run_each(script, [], [([f"{prefix}:{n}"], [value]) for n, value in enumerate(values)])
    assert [reply if isinstance(reply, list) else type(reply) for reply in replies] == [
        *([b"a"], RedisRejected, [b"b"], RedisRejected, [b"c"])
    ]
    alone = await redis.run_each(script, [], [([f"{prefix}:x"], ["bad"])])
    assert isinstance(alone[0], RedisRejected), "also if no other user shows that the script works"


@pytest.mark.parametrize("size", [1_100_000, 30_000_000])
async def test_a_value_that_the_server_does_not_take_is_that_users_alone(
    make_settings: MakeSettings, own_redis: OwnRedis, size: int
) -> None:
    settings = make_settings(redis_url=own_redis.redis_url)
    async with node(own_redis.redis) as admin:
        await admin.config_set("proto-max-bulk-len", 1_048_576)
    async with RedisClient(settings.redis) as redis:
        calls = [([f"k{n}", f"k{n}"], [1, "x" * (size if n == 1 else 10)]) for n in range(3)]
        for some in (calls, calls[1:2]):  # it answers with an error, or closes the connection first
            replies = await redis.run_each(PUBLISH, [60, 2], some)
            assert [isinstance(reply, RedisRejected) for reply in replies] == [call is calls[1] for call in some]


@pytest.mark.parametrize(
    "error",
    [
        *("ERR an error that nobody knows", "ERR upstream failure", "OOM command not allowed", "MISCONF no disk"),
        *("NOREPLICAS Not enough good replicas", "READONLY You can't write", "LOADING the dataset", "BUSY script"),
        *("MASTERDOWN Link with MASTER is down", "CLUSTERDOWN The cluster is down", "TRYAGAIN Multiple keys"),
        *("ERR Error running script: -OOM command not allowed", "NOPERM this user has no permissions"),
    ],
)
async def test_an_error_that_everybody_gets_is_waited_for(redis: RedisClient, error: str) -> None:
    script = script_of(f'return redis.error_reply("{error}")', "good")
    for users in (1, 3):
        with pytest.raises(RedisUnavailable):
            await redis.run_each(script, [], [([f"k{n}"], ["x"]) for n in range(users)])


async def test_calls_are_timed_by_operation(make_settings: MakeSettings) -> None:
    metrics = Metrics()
    async with RedisClient(make_settings().redis, metrics) as redis:
        for _ in range(3):
            await redis.run(PUBLISH, [], [1, 2])
    assert metrics.registry.get_sample_value("streamrec_redis_seconds_count", {"operation": "publish"}) == 3
