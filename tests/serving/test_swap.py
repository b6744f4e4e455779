"""A new champion takes over while clicks continue: nothing lost, recent users re-scored, bad versions refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sasrec.checkpoint import FILES, MANIFEST
from streamrec.registry import Registry
from streamrec.settings import Settings
from streamrec.storage import Place

from support.daemon_process import Daemon, models, serves, versions_published
from support.kafka_client import feeding, produce_clicks, wait_caught_up
from support.oracle import assert_delivered
from support.registry import damage, publish
from support.s3_server import SECRET, S3Server
from support.waiting import eventually

StartDaemon = Callable[..., Daemon]
MakeSettings = Callable[..., Settings]


@pytest.fixture
def registry(place: Place) -> Registry:
    return Registry(place)


async def test_a_new_champion_takes_over_in_mid_stream_and_recent_users_get_its_lists(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry
) -> None:
    old = publish(registry, seed=1)
    registry.promote(old, "first")
    # a larger vocabulary in another order, and longer windows: nothing of the old engine fits the new one
    new = publish(registry, seed=2, items=range(59, -1, -1), max_len=12)
    where = {"model_dir": None, "registry_dir": registry.place, "registry_poll_s": 3600, "sequences_max_len": 12}
    settings = make_settings(**where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    async with feeding(settings, seed=4, per_s=300, at_least=1_200):
        await daemon.wait_handled(300)
        assert await serves(daemon, old)
        promoted = models(settings, "promote", new)  # only the message notifies the daemon
        assert (promoted.returncode, promoted.stderr) == (0, "")
        await eventually(lambda: serves(daemon, new))
        assert not await serves(daemon, old)
    await wait_caught_up(settings)

    async def all_users_have_the_new_list() -> bool:
        return set((await versions_published(settings)).values()) <= {new, "popular"}

    await eventually(all_users_have_the_new_list)
    with registry.store.local(f"versions/{new}", (*FILES, MANIFEST)) as model:
        await assert_delivered(make_settings(model_dir=model, sequences_max_len=12))
    assert await daemon.metric("streamrec_model_swaps_total", outcome="swapped") == 1
    assert daemon.lines("ERROR") == []


async def test_users_who_do_not_click_again_are_re_scored(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry
) -> None:
    old, new = publish(registry, seed=1), publish(registry, seed=2)
    registry.promote(old, "first")
    where = {"model_dir": None, "registry_dir": registry.place, "registry_poll_s": 0.2, "serving_rescore_users": 30}
    settings = make_settings(**where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    await produce_clicks(settings, [(f"u{n}", f"i{n}") for n in range(40)])
    await daemon.wait_handled(40)
    await wait_caught_up(settings)
    assert set((await versions_published(settings)).values()) == {old}
    registry.promote(new, "better")  # no message: the daemon polls

    async def thirty_have_new_lists() -> bool:
        return sorted((await versions_published(settings)).values()).count(new) == 30

    await eventually(thirty_have_new_lists)
    await eventually(lambda: daemon.has_logged("users re-scored"))
    await produce_clicks(settings, [(f"u{n}", "i7") for n in range(40)])
    await wait_caught_up(settings)
    assert set((await versions_published(settings)).values()) == {new}


async def test_a_damaged_version_is_refused_and_a_good_one_taken_later(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry
) -> None:
    old, broken, good = (publish(registry, seed) for seed in (1, 2, 3))
    registry.promote(old, "first")
    registry.promote(broken, "looked good")
    registry.promote(old, "for now")
    damage(registry, broken)
    where = {"model_dir": None, "registry_dir": registry.place, "registry_poll_s": 0.1}
    settings = make_settings(**where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    alias = json.loads(registry.store.read("champion.json") or b"")
    registry.store.write("champion.json", json.dumps(alias | {"version": broken}).encode())

    async def refused() -> bool:
        return await daemon.metric("streamrec_model_swaps_total", outcome="refused") == 1

    await eventually(refused)
    await produce_clicks(settings, [("ann", "i1")])
    await daemon.wait_handled(1)
    assert await serves(daemon, old)
    (line,) = daemon.lines("ERROR")
    assert f"the new champion is refused, {old} continues" in line
    assert "model.safetensors is damaged" in line
    assert models(settings, "promote", good).returncode == 0
    await eventually(lambda: serves(daemon, good))
    rolled_back = models(settings, "rollback")
    assert rolled_back.returncode == 1, "the champion before is the damaged one"
    assert "model.safetensors is damaged" in rolled_back.stderr
    await produce_clicks(settings, [("ann", "i2")])
    await wait_caught_up(settings)
    assert (await versions_published(settings))["ann"] == good


@pytest.mark.parametrize("broken", ["weights", "metadata", "manifest is gone", "format"])
async def test_a_champion_that_cannot_be_read_for_a_moment_is_served_once_it_is_whole(
    start_daemon: StartDaemon, make_settings: MakeSettings, tmp_path: Path, broken: str
) -> None:
    """Nobody promotes another one: the copy of the version takes a while, or the folder is away for a moment."""
    registry = Registry(tmp_path / "registry")
    old, new = publish(registry, seed=1), publish(registry, seed=2)
    registry.promote(old, "first")
    daemon = start_daemon(model_dir=None, registry_dir=registry.place, registry_poll_s=0.1)
    await daemon.wait_ready()
    names = {"weights": "model.safetensors", "metadata": "metadata.json", "manifest is gone": "manifest.json"}
    name = f"versions/{new}/{names[broken]}" if broken in names else "format"
    whole = registry.store.read(name)
    assert whole is not None
    daemon.signal(signal.SIGSTOP)  # else it may load the new one while it is whole
    registry.promote(new, "better")  # no message: the daemon polls
    alias = registry.store.read("champion.json") or b""
    registry.promote(old, "by hand")
    registry.store.delete(name) if broken == "manifest is gone" else registry.store.write(name, b"half")
    registry.store.write("champion.json", alias)
    daemon.signal(signal.SIGCONT)

    async def refused() -> bool:
        return await daemon.metric("streamrec_model_swaps_total", outcome="refused") == 1

    await eventually(refused)
    registry.store.write(name, whole)
    await eventually(lambda: serves(daemon, new))
    assert daemon.output.count("the new champion is refused") == 1


async def test_a_hold_is_shown_by_the_daemons(
    start_daemon: StartDaemon, make_settings: MakeSettings, registry: Registry
) -> None:
    where = {"model_dir": None, "registry_dir": registry.place, "registry_poll_s": 3600}
    for seed in (1, 2):
        registry.promote(publish(registry, seed), "in turn")
    daemon = start_daemon(**where)
    await daemon.wait_ready()

    async def held(expected: bool) -> bool:
        return await daemon.metric("streamrec_model_on_hold") == expected

    for arguments, expected in ((["rollback"], True), (["hold", "--off"], False), (["hold"], True)):
        assert models(make_settings(**where), *arguments).returncode == 0  # only the message notifies the daemon
        await eventually(lambda expected=expected: held(expected))  # type: ignore[misc]


def test_without_redis_a_promotion_reports_that_daemons_load_it_later(
    make_settings: MakeSettings, registry: Registry
) -> None:
    version = publish(registry, seed=1)
    settings = make_settings(registry_dir=registry.place, redis_url="redis://127.0.0.1:1/0")
    promoted = models(settings, "promote", version)
    assert promoted.returncode == 0
    assert "the daemons will load it within 5 s" in promoted.stderr
    champion = registry.champion()
    assert champion is not None
    assert champion.version == version


async def test_a_daemon_serves_on_while_its_object_store_does_not_answer_and_swaps_afterwards(
    start_daemon: StartDaemon, make_settings: MakeSettings, own_s3: S3Server
) -> None:
    registry = Registry(own_s3.new_bucket())
    old, new = publish(registry, seed=1), publish(registry, seed=2)
    registry.promote(old, "first")
    where = {"model_dir": None, "registry_dir": registry.place, "registry_poll_s": 0.2}
    settings = make_settings(**where)
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    own_s3.pause()
    await eventually(lambda: daemon.has_logged("the registry is unavailable"), timeout_s=120)
    await produce_clicks(settings, [("ann", "i1")])
    await daemon.wait_handled(1)
    await wait_caught_up(settings)
    assert (await versions_published(settings))["ann"] == old
    own_s3.resume()
    assert models(settings, "promote", new).returncode == 0
    await eventually(lambda: serves(daemon, new))
    (line,) = daemon.lines("WARNING")
    assert f"the registry is unavailable, {old} continues: cannot read {registry.store}/" in line
    assert "the store cannot be reached" in line
    assert daemon.lines("ERROR") == []
    assert SECRET not in daemon.output
