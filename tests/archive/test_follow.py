"""`streamrec archive`: the archive equals the topic, whatever was killed when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from streamrec.archive.segments import EventArchive
from streamrec.commands.main import main
from streamrec.kafka.topics import topic_partitions
from streamrec.local.daemon import EMBEDDED, environment
from streamrec.settings import Settings

from support.harness import Record, click, eventually, feed, feeding, read_topic, workload
from support.oracle import is_bad

MakeSettings = Callable[..., Settings]


@contextlib.contextmanager
def archiving(settings: Settings, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A `streamrec archive follow` process; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", *EMBEDDED, "archive", "follow", *arguments],
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def ends(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = await asyncio.to_thread(process.communicate, None, 60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out


def rows(archive: EventArchive) -> list[tuple[str, str, int]]:
    found = archive.read()
    return list(zip(found.user_ids, found.item_ids, found.timestamps_ms.tolist(), strict=True))


async def assert_equals_the_topic(archive: EventArchive, settings: Settings) -> None:
    records = await read_topic(settings, settings.kafka.topic)
    expected = []
    for record in records:
        if not is_bad(record):
            event = json.loads(record.value)
            ts_ms = event.get("timestamp") or record.timestamp
            expected.append((str(event["user_id"]), str(event["item_id"]), ts_ms))
    assert rows(archive) == expected
    assert archive.stats().dead_letters == sum(is_bad(record) for record in records)


async def test_the_archive_is_the_topic_and_dead_letters_are_only_counted(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(archive_dir=tmp_path / "archive")
    archive = EventArchive(tmp_path / "archive")
    await feed(settings, islice(workload(1, bad_share=0.1), 500))
    with archiving(settings, "--burst") as process:
        assert "events archived in" in await ends(process)
    await assert_equals_the_topic(archive, settings)
    assert archive.stats().dead_letters > 10
    assert await read_topic(settings, settings.kafka.dead_letters) == []
    await feed(settings, islice(workload(2), 200))
    with archiving(settings, "--burst") as process:
        await ends(process)
    await assert_equals_the_topic(archive, settings)


async def test_a_follower_that_is_killed_again_and_again_loses_nothing_and_doubles_nothing(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(archive_dir=tmp_path / "archive", archive_flush_s=0.05)
    archive = EventArchive(tmp_path / "archive")
    rng = random.Random(5)
    async with feeding(settings, seed=6, per_s=400, at_least=1_500):
        for _ in range(3):
            before = sum(archive.next_offsets().values())

            async def grown(before: int = before) -> bool:
                return sum(archive.next_offsets().values()) > before

            with archiving(settings) as process:
                await eventually(grown)
                await asyncio.sleep(rng.uniform(0, 0.3))  # the random moment
                process.kill()
    with archiving(settings, "--burst") as process:
        await ends(process)
    await assert_equals_the_topic(archive, settings)


async def test_told_to_stop_it_writes_down_what_it_has_read(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(archive_dir=tmp_path / "archive", archive_flush_s=3600)
    archive = EventArchive(tmp_path / "archive")
    await feed(settings, [Record(b"ann", click("ann", f"i{n}", 1000 + n)) for n in range(50)])
    with archiving(settings) as process:
        assert process.stderr is not None
        line = await asyncio.to_thread(process.stderr.readline)
        assert "archiving" in line
        await asyncio.sleep(1)  # it polls; whether it has read all by now does not matter
        assert archive.next_offsets() == {}
        process.send_signal(signal.SIGTERM)
        await ends(process)
    with archiving(settings, "--burst") as process:
        await ends(process)
    await assert_equals_the_topic(archive, settings)


async def test_a_topic_that_does_not_exist_is_created(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(archive_dir=tmp_path / "archive")
    with archiving(settings, "--burst") as process:
        assert (await ends(process)).startswith("0 events archived")
    assert await topic_partitions(settings.kafka, [settings.kafka.topic]) == {settings.kafka.topic: 4}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `streamrec archive ...`; gives status, output and what stands on stderr."""
    monkeypatch.setenv("STREAMREC_ARCHIVE_DIR", str(tmp_path / "archive"))

    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = main(["archive", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


def test_a_file_is_imported_once_looked_at_and_pruned(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("user_id,item_id,timestamp\nann,a,1700000000000\nbob,b,1700000001000\n")
    assert run("import", str(path)) == (0, f"2 events of {path} imported\n", "")
    assert run("import", str(path)) == (0, f"{path} was imported before\n", "")
    out = run("stats")[1]
    assert out.startswith("2 events, 2 of them imported; 0 dead letters\nfrom 2023-11-14 22:13:20 UTC to 2023-11-14")
    assert json.loads(run("stats", "--json")[1])["imported_events"] == 2
    assert run("prune", "--days", "1")[1] == "1 segments without an event of the last 1 days removed\n"
    assert run("stats")[1].startswith("0 events")


def test_mistakes_are_one_clear_line(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("import", str(tmp_path / "none.csv"))[2].startswith("streamrec: cannot read ")
    status, out, err = run("follow", "--kafka-bootstrap-servers", "127.0.0.1:1")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("streamrec: Kafka at 127.0.0.1:1 cannot be reached")
    monkeypatch.delenv("STREAMREC_ARCHIVE_DIR")
    assert run("stats") == (1, "", "streamrec: no archive: set STREAMREC_ARCHIVE_DIR or --archive-dir\n")
