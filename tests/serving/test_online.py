"""Online figures: they add up over daemons, outlive them and an outage of Redis, and stand in `models list`."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sasrec import ItemVocab, SASRec, SASRecConfig
from streamrec.commands.main import main
from streamrec.errors import RedisRejected, RedisUnavailable
from streamrec.local.daemon import environment
from streamrec.local.process import free_port
from streamrec.metrics import Metrics
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.registry import Registry
from streamrec.serving.online import TTL_S, OnlineCounts, OnlineFigures, read_figures
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.kafka_client import produce_clicks, wait_caught_up
from support.redis_access import RedisThatFailsScripts, raw_redis
from support.servers import OwnRedis
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]
METRICS = {
    "judged": "streamrec_judged_clicks_total",
    "hits": "streamrec_hits_total",
    "reciprocal_ranks": "streamrec_reciprocal_ranks_total",
    "popularity_hits": "streamrec_popularity_hits_total",
}


async def stored(settings: Settings, version: str) -> dict[str, float]:
    async with RedisClient(settings.redis) as redis:
        found = await read_figures(redis, [version])
    return {name: getattr(found.get(version, OnlineFigures()), name) for name in METRICS}


async def counted(daemon: Daemon, version: str) -> dict[str, float]:
    return {name: await daemon.metric(metric, model=version) for name, metric in METRICS.items()}


def figures(*values: float) -> dict[str, float]:
    return dict(zip(METRICS, values, strict=True))


def total(*parts: dict[str, float]) -> Any:
    return pytest.approx({name: sum(part[name] for part in parts) for name in METRICS})


def clicks(first: int, last: int) -> list[tuple[str, str]]:
    return [(f"u{n % 16}", f"i{n * 7 % 50}") for n in range(first, last)]


# --- in Redis


async def test_counts_are_added_to_the_stored_ones_and_expire_after_90_days(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    one, other = (OnlineCounts(redis, Metrics()) for _ in range(2))
    one.count("m1", ["a", "b"], ["x", "b"], 1)
    one.count("m2", ["a"], ["a"], 0)
    await one.flush()
    await one.flush()
    key = Keys(settings.redis.key_prefix).online("m1")
    async with raw_redis(settings) as raw:
        await raw.expire(key, 60)
        other.count("m1", ["x"], ["x"], 0)
        await other.flush()
        assert TTL_S - 60 < await raw.ttl(key) <= TTL_S
    found = await read_figures(redis, ["m1", "m2", "m3"])
    assert found == {"m1": OnlineFigures(3, 2, 1.5, 1), "m2": OnlineFigures(1, 1, 1, 0)}
    assert found["m1"].rates() == {
        "judged": 3,
        "hr@10": pytest.approx(2 / 3),
        "mrr@10": 0.5,
        "popularity_hr@10": pytest.approx(1 / 3),
    }


async def test_the_counts_of_a_flush_that_fails_are_flushed_later(make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with RedisThatFailsScripts(settings.redis) as redis:
        counts = OnlineCounts(redis, Metrics())
        counts.count("m1", ["a"], ["a"], 0)
        flush = asyncio.create_task(counts.flush())
        await redis.arrived.wait()
        counts.count("m1", ["b"], ["a", "b"], 1)  # clicks continue while Redis hangs
        redis.fail.set()
        with pytest.raises(RedisUnavailable):
            await flush
        redis.broken = False
        await counts.flush()
    assert await stored(settings, "m1") == figures(2, 2, 1.5, 1)


async def test_the_last_flush_waits_for_the_current_one(make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with RedisThatFailsScripts(settings.redis) as redis:
        counts = OnlineCounts(redis, Metrics())
        counts.count("m1", ["a"], ["a"], 0)
        periodic = asyncio.create_task(counts.flush())
        await redis.arrived.wait()
        last = asyncio.create_task(counts.flush())
        redis.broken = False
        periodic.cancel()
        await last
    assert await stored(settings, "m1") == figures(1, 1, 1, 0)


async def test_a_version_whose_key_has_another_type_does_not_affect_other_versions(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    counts = OnlineCounts(redis, Metrics())
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).online("taken"), "by another program")
    for version in ("taken", "m1"):
        counts.count(version, ["a"], ["a"], 0)
    for _ in range(2):
        with pytest.raises(RedisRejected, match="WRONGTYPE"):
            await counts.flush()
    assert await stored(settings, "m1") == figures(1, 1, 1, 0)


# --- of daemons


async def test_the_figures_of_two_daemons_add_up_and_outlive_them(
    start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    one, other = start_daemon(lists_refresh_s=0.1), start_daemon(lists_refresh_s=3600)  # the other flushes when it ends
    for daemon in (one, other):
        await daemon.wait_ready()

    async def share_the_partitions() -> bool:
        lags = [await daemon.get("/metrics") for daemon in (one, other)]
        return all(text.count("\nstreamrec_lag_records{") == 2 for _, text in lags)

    await eventually(share_the_partitions)
    for first in range(0, 400, 50):  # in turns, for the clicks of one batch see the list before all of them
        await produce_clicks(settings, clicks(first, first + 50))
        await wait_caught_up(settings)
    version = settings_version(one)
    parts = [await counted(daemon, version) for daemon in (one, other)]
    assert all(part["judged"] > 50 for part in parts)
    assert 0 < sum(part["hits"] for part in parts) < sum(part["judged"] for part in parts)
    for daemon in (one, other):
        daemon.signal(signal.SIGTERM)
        assert await daemon.wait_exit() == 0
    assert await stored(settings, version) == total(*parts)
    again = start_daemon(lists_refresh_s=0.1)
    await again.wait_ready()
    await produce_clicks(settings, clicks(400, 500))
    await wait_caught_up(settings)
    parts.append(await counted(again, version))

    async def flushed() -> bool:
        return await stored(settings, version) == total(*parts)

    await eventually(flushed)
    assert sum(part["judged"] for part in parts) + (await stored(settings, "popular"))["judged"] == 500


def settings_version(daemon: Daemon) -> str:
    return daemon.output.split("model=")[1].split()[0]


async def test_an_outage_of_redis_loses_no_figures(
    own_redis: OwnRedis, start_daemon: StartDaemon, make_settings: MakeSettings
) -> None:
    where = {
        "redis_url": own_redis.redis_url,
        "lists_refresh_s": 0.1,
        "kafka_session_timeout_s": 6,
    }
    settings = make_settings(**where)
    async with RedisClient(settings.redis) as redis:
        await redis._call("CONFIG", "SET", "appendfsync", "always")
        counts = OnlineCounts(redis, Metrics())
        daemon = start_daemon(**where)
        await daemon.wait_ready()
        await produce_clicks(settings, clicks(0, 100))
        await wait_caught_up(settings)
        counts.count("m1", ["a"], ["a"], 0)
        own_redis.redis.stop()
        with pytest.raises(RedisUnavailable):
            await counts.flush()
        counts.count("m1", ["a"], ["b", "a"], 0)
        await produce_clicks(settings, clicks(100, 200))
        await eventually(lambda: daemon.has_logged("the batch waits"))
        own_redis.redis.start()
        await counts.flush()
    assert await stored(settings, "m1") == figures(2, 2, 1.5, 0)
    await wait_caught_up(settings)
    version = settings_version(daemon)

    async def flushed() -> bool:
        return await stored(settings, version) == total(await counted(daemon, version))

    await eventually(flushed)
    both = [await stored(settings, model) for model in (version, "popular")]
    assert [part["judged"] for part in both] == [100, 100], "at their first clicks users have no list"


# --- in the list


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def publish(registry: Registry, seed: int, **metadata: Any) -> str:
    torch.manual_seed(seed)
    model = SASRec(SASRecConfig(num_items=3, max_len=4, hidden_units=8, num_blocks=1))
    made = {"created_at": f"2026-01-0{seed}T12:30:00.123+00:00"}
    return registry.publish(model, ItemVocab(["a", "b", "c"]), made | metadata)


@pytest.fixture
def run(
    registry: Registry,
    make_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Any]:
    """Run `streamrec models ...` under the test's settings; return status, lines of output, and stderr."""
    for name, value in environment(make_settings(registry_dir=registry.place)).items():
        monkeypatch.setenv(name, value)

    async def run_command(*arguments: str) -> tuple[int, list[str], str]:
        status = await asyncio.to_thread(main, ["models", *arguments])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run_command


async def test_the_list_shows_offline_figures_and_online_ones(
    run: Callable[..., Any], registry: Registry, redis: RedisClient, make_settings: MakeSettings
) -> None:
    assert await run("list") == (0, [], "")
    trained = publish(registry, 1, validation={"hr@10": 0.25, "ndcg@10": 0.125})
    judged = publish(
        registry, 2, validation={"hr@10": 0.9}, report={"challenger": {"hr@10": 0.5, "ndcg@10": 0.25, "mrr@10": 0.125}}
    )
    broken = publish(registry, 3)
    (registry.place / "versions" / broken / "metadata.json").write_text("{}")
    registry.promote(judged, "better")
    counts = OnlineCounts(redis, Metrics())
    for _ in range(1_000):
        counts.count(judged, ["a", "b"], ["b", "a"], 1)
    await counts.flush()
    status, lines, err = await run("list")
    assert (status, err) == (0, "")
    heads = ["version", "made, UTC", "offline on", "hr@10", "ndcg@10", "mrr@10", "online hr@10", "online mrr@10"]
    heads += ["popular hr@10", "clicks"]
    starts = [lines[0].index(f" {head} " if head != "clicks" else f" {head}") + 1 for head in heads]
    cells = [[line[a:b].strip() for a, b in zip([0, *starts], [*starts, None], strict=True)] for line in lines[2:4]]
    assert cells == [
        ["", trained, "2026-01-01 12:30:00", "validation", "0.2500", "0.1250", "-", "-", "-", "-", "0"],
        [
            "champion",
            judged,
            "2026-01-02 12:30:00",
            "newest clicks",
            "0.5000",
            "0.2500",
            "0.1250",
            "1.0000",
            "0.7500",
            "0.5000",
            "2,000",
        ],
    ]
    assert lines[1].split()[:2] == [broken, "damaged:"]
    as_json = [json.loads(line) for line in (await run("list", "--json"))[1]]
    assert [found["online"] for found in as_json] == [
        None,
        None,
        {"judged": 2_000, "hr@10": 1.0, "mrr@10": 0.75, "popularity_hr@10": 0.5},
    ]
    assert as_json[2]["report"]["challenger"]["hr@10"] == 0.5


async def test_the_list_is_shown_without_redis_too(run: Callable[..., Any], registry: Registry) -> None:
    version = publish(registry, 1, validation={"hr@10": 0.25})
    for arguments in (["list"], ["list", "--json"]):
        url = f"redis://:s3cr3t@127.0.0.1:{free_port()}"
        status, lines, err = await run(*arguments, "--redis-url", url)
        assert status == 0
        assert version in lines[-1]
        assert err.startswith("streamrec: without the online figures (Redis at redis://:")
        assert err.count("\n") == 1
        assert "s3cr3t" not in err


async def test_figures_that_cannot_be_read_are_reported_and_the_list_is_shown(
    run: Callable[..., Any], registry: Registry, make_settings: MakeSettings
) -> None:
    version, settings = publish(registry, 1), make_settings()
    async with raw_redis(settings) as raw:
        key = Keys(settings.redis.key_prefix).online(version)
        await raw.hset(key, mapping={"judged": "many", "of a newer version": "1"})  # type: ignore[misc]
    status, lines, err = await run("list")
    assert (status, version in lines[1]) == (0, True)
    assert f"the online figures of version {version} cannot be read: " in err
