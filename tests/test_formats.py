"""Stored data carry a format version; an unknown one is refused in one line before anything is read or written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from sasrec import Event, load_model
from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveError, RegistryError, StreamrecError
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.registry import Registry
from streamrec.retraining.worker import RetrainWorker
from streamrec.schemas import ClickEvent
from streamrec.settings import Settings

from support.daemon_process import Daemon
from support.preloaded import run_command
from support.redis_access import raw_redis

MakeSettings = Callable[..., Settings]
CLICK = ClickEvent("ann", "a", 5, 0, 0, 5)


def command(settings: Settings, *arguments: str) -> tuple[int, str, str]:
    found = run_command(settings, *arguments)
    return found.returncode, found.stdout, found.stderr


async def format_key(settings: Settings) -> bytes | None:
    async with raw_redis(settings) as raw:
        value: bytes | None = await raw.get(Keys(settings.redis.key_prefix).format)
        return value


async def test_a_daemon_stores_the_format(start_daemon: Callable[..., Daemon], make_settings: MakeSettings) -> None:
    settings = make_settings()
    assert await format_key(settings) is None
    assert await start_daemon("--burst").wait_exit() == 0
    assert await format_key(settings) == b"1"
    assert await start_daemon("--burst").wait_exit() == 0
    assert await format_key(settings) == b"1"


@pytest.mark.parametrize("name", ["serve", "retrain", "rebuild", "check"])
async def test_commands_refuse_a_redis_of_another_format_in_one_line(
    make_settings: MakeSettings, model_dir: Path, tmp_path: Path, name: str
) -> None:
    archive = EventArchive(tmp_path / "archive")
    archive.append(0, 0, 1, [CLICK])
    settings = make_settings(model_dir=model_dir, archive_dir=archive.place)
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).format, "2")
        arguments = {"retrain": ["--once", "--no-follow", "--registry-dir", str(tmp_path / "registry")]}.get(name, [])
        if name == "retrain":
            settings = make_settings(archive_dir=archive.place)
        status, out, err = command(settings, name, *arguments)
        assert await raw.keys(f"{settings.redis.key_prefix}*") == [Keys(settings.redis.key_prefix).format.encode()]
    assert status == 1
    line = (out if name == "check" else err).splitlines()[1 if name == "check" else -1]
    assert f"key {settings.redis.key_prefix}:format of Redis at {settings.redis.address} holds format '2'" in line
    assert "knows format '1': upgrade streamrec, or set another STREAMREC_REDIS_KEY_PREFIX" in line
    assert "Traceback" not in err


async def test_a_waiting_retrain_worker_refuses_another_format_too(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(archive_dir=tmp_path / "archive", registry_dir=tmp_path / "registry", retrain_http_port=0)
    async with raw_redis(settings) as raw:
        await raw.set(Keys(settings.redis.key_prefix).format, "2")
    with pytest.raises(StreamrecError, match="holds format '2'"):
        await RetrainWorker(settings, follow=False).run()


async def test_a_format_key_of_another_type_is_refused_and_a_check_writes_no_key(
    redis: RedisClient, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    await redis.check_format(claim=False)
    assert await format_key(settings) is None
    async with raw_redis(settings) as raw:
        await raw.lpush(Keys(settings.redis.key_prefix).format, "1")
    with pytest.raises(StreamrecError, match="holds format 'another type'"):
        await redis.check_format()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "2\n",
            r"archive/format holds format '2', and this streamrec knows format '1': upgrade streamrec, or set "
            "another STREAMREC_ARCHIVE_DIR",
        ),
        ("junk " * 50, r"holds format 'junk junk junk junk ',"),
        (None, r"archive/format is missing.*restore that file; if this version wrote them all, its content is '1'"),
    ],
)
def test_an_archive_of_another_format_is_neither_read_nor_written(
    tmp_path: Path, content: str | None, message: str
) -> None:
    archive = EventArchive(tmp_path / "archive")
    archive.append(0, 0, 10, [CLICK])
    archive.import_events([Event("ann", "a", 5)])
    assert (archive.place / "format").read_text() == "1\n"
    (archive.place / "format").unlink()
    if content is not None:
        (archive.place / "format").write_text(content)
    before = sorted(archive.place.rglob("*"))
    uses: list[Callable[[], object]] = [
        archive.read,
        archive.stats,
        archive.next_offsets,
        lambda: archive.prune(0),
        archive.following().__enter__,
        lambda: archive.append(0, 10, 11, []),
        lambda: archive.import_events([Event("bob", "b", 1)]),
    ]
    for use in uses:
        with pytest.raises(ArchiveError, match=message):
            use()
    assert sorted(archive.place.rglob("*")) == before


async def test_following_the_topic_into_a_new_folder_writes_the_format_first(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    with EventArchive(tmp_path / "archive").following():
        assert (tmp_path / "archive" / "format").read_text() == "1\n"
    (tmp_path / "archive" / "format").write_text("7")
    with pytest.raises(ArchiveError, match="holds format '7'"):
        await Archiver(
            make_settings().kafka,
            make_settings().events,
            EventArchive(tmp_path / "archive"),
            make_settings().archive.flush_s,
        ).run(asyncio.Event())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("2", "registry/format holds format '2', .*upgrade streamrec, or set another STREAMREC_REGISTRY_DIR"),
        (None, "registry/format is missing"),
    ],
)
def test_a_registry_of_another_format_is_neither_read_nor_written(
    tmp_path: Path, model_dir: Path, content: str | None, message: str
) -> None:
    saved = load_model(model_dir)
    registry = Registry(tmp_path / "registry")
    assert (registry.champion(), registry.versions()) == (None, [])
    version = registry.publish(saved.model, saved.vocab)
    registry.promote(version, "test")
    assert (registry.place / "format").read_text() == "1\n"
    (registry.place / "format").unlink()
    if content is not None:
        (registry.place / "format").write_text(content)
    before = sorted(registry.place.rglob("*"))
    uses: list[Callable[[], object]] = [
        registry.champion,
        registry.shadow,
        registry.versions,
        registry.end_shadow,
        lambda: registry.load(version),
        lambda: registry.publish(saved.model, saved.vocab),
        lambda: registry.promote(version, "again"),
        lambda: registry.rollback("back"),
        lambda: registry.set_shadow(version),
        lambda: registry.prune(1),
    ]
    for use in uses:
        with pytest.raises(RegistryError, match=message):
            use()
    assert sorted(registry.place.rglob("*")) == before


def test_a_daemon_refuses_a_registry_of_another_format_in_one_line(make_settings: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "format").write_text("9")
    status, _, err = command(make_settings(registry_dir=tmp_path), "serve")
    assert (status, "Traceback" in err) == (1, False)
    assert err.splitlines()[-1].startswith(f"streamrec: {tmp_path}/format holds format '9'")
