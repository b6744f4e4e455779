"""`streamrec archive`: the archive equals the topic, even if the process is killed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from streamrec.archive.follow import Archiver
from streamrec.archive.segments import EventArchive
from streamrec.commands.main import main
from streamrec.kafka.topics import topic_partitions
from streamrec.metrics import RetrainMetrics
from streamrec.settings import Settings
from streamrec.storage import Place

from support.file_systems import fill, small_disk
from support.kafka_client import feed, feeding, read_topic
from support.oracle import is_bad
from support.preloaded import Command
from support.s3_server import S3Server
from support.waiting import eventually
from support.workload import Record, click, workload

MakeSettings = Callable[..., Settings]


@contextlib.contextmanager
def archiving(settings: Settings, *arguments: str) -> Iterator[Command]:
    """Run a `streamrec archive follow` process; kill it at the end if it still runs."""
    command = Command(settings, "archive", "follow", *arguments)
    try:
        yield command
    finally:
        command.kill()


async def ends(command: Command, status: int = 0) -> str:
    found, out, err = await asyncio.to_thread(command.ends, 60)
    assert found == status, err
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


async def test_a_process_that_is_killed_again_and_again_loses_and_duplicates_no_event(
    make_settings: MakeSettings, place: Place
) -> None:
    settings = make_settings(archive_dir=place, archive_flush_s=0.05)
    archive = EventArchive(place)
    rng = random.Random(5)
    async with feeding(settings, seed=6, per_s=400, at_least=1_500):
        for _ in range(3):
            before = sum(archive.next_offsets().values())

            async def has_archived(before: int = before) -> bool:
                return sum(archive.next_offsets().values()) > before

            with archiving(settings) as process:
                await eventually(has_archived)
                await asyncio.sleep(rng.uniform(0, 0.3))  # the random moment
                process.kill()
    with archiving(settings, "--burst") as process:
        await ends(process)
    await assert_equals_the_topic(archive, settings)


@pytest.mark.long
async def test_a_process_waits_for_an_object_store_that_does_not_answer(
    make_settings: MakeSettings, own_s3: S3Server
) -> None:
    place = own_s3.new_bucket()
    settings = make_settings(archive_dir=place, archive_flush_s=0.05)
    archive = EventArchive(place)
    await feed(settings, islice(workload(1), 100))

    async def archived(records: int) -> bool:
        return sum((await asyncio.to_thread(archive.next_offsets)).values()) == records

    with archiving(settings) as process:
        await eventually(lambda: archived(100), timeout_s=60)
        own_s3.pause()
        await feed(settings, islice(workload(2), 100))
        await eventually(lambda: asyncio.to_thread(process.has_logged, "the archive is unavailable"), timeout_s=120)
        own_s3.resume()
        await eventually(lambda: archived(200), timeout_s=60)
        process.process.send_signal(signal.SIGTERM)
        await ends(process)
    await assert_equals_the_topic(archive, settings)


async def test_a_stopped_process_archives_the_events_that_it_has_read(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(archive_dir=tmp_path / "archive", archive_flush_s=3600)
    archive = EventArchive(tmp_path / "archive")
    await feed(settings, [Record(b"ann", click("ann", f"i{n}", 1000 + n)) for n in range(50)])
    with archiving(settings) as process:
        line = await eventually(lambda: asyncio.to_thread(process.first_error_line))
        assert "archiving" in line
        await asyncio.sleep(1)  # it polls; the test does not depend on how much it reads
        assert archive.next_offsets() == {}
        process.process.send_signal(signal.SIGTERM)
        await ends(process)
    with archiving(settings, "--burst") as process:
        await ends(process)
    await assert_equals_the_topic(archive, settings)


def archiver_of(settings: Settings) -> Archiver:
    assert settings.archive.dir is not None
    return Archiver(settings.kafka, settings.events, EventArchive(settings.archive.dir), 0.05, RetrainMetrics())


@contextlib.asynccontextmanager
async def archiving_here(archiver: Archiver) -> AsyncIterator[None]:
    stop = asyncio.Event()
    running = asyncio.create_task(archiver.run(stop))
    try:
        yield
    finally:
        stop.set()
        await running


async def test_a_merge_without_room_stops_no_archiving(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 4 * 2**20) as disk:
        settings = make_settings(archive_dir=disk)
        archive, rng = EventArchive(disk), random.Random(1)
        for _ in range(3):
            users = [f"u{rng.randbytes(100).hex()}" for _ in range(2_000)]
            await feed(settings, [Record(user.encode(), click(user, "i1", 1_000)) for user in users])
            await archiver_of(settings).run(asyncio.Event(), burst=True)
        segments = len(archive.segments())
        fill(disk, left_bytes=100_000)
        monkeypatch.setattr("streamrec.archive.segments.MIN_SEGMENTS_TO_MERGE", 2)
        for _ in range(2):  # at every start
            await feed(settings, islice(workload(2), 40))
            await archiver_of(settings).run(asyncio.Event(), burst=True)
            await assert_equals_the_topic(archive, settings)
        warnings = warnings_in(caplog)
        assert len(warnings) == 2, "one for each start"
        assert all("small segments are not merged; this is tried again: " in line for line in warnings)
        assert all("No space left on device" in line for line in warnings)
        assert len(archive.segments()) > segments
        (disk / ".filler").unlink()
        await feed(settings, islice(workload(3), 40))
        await archiver_of(settings).run(asyncio.Event(), burst=True)
        assert len(archive.segments()) == 4, "there is room now"
        await assert_equals_the_topic(archive, settings)


@pytest.mark.parametrize("fault", ["cannot be written", "has a stray file", "fails in an unknown way"])
async def test_a_partition_that_cannot_be_written_stops_no_other(
    make_settings: MakeSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    monkeypatch.setattr("streamrec.archive.follow.SEGMENT_EVENTS", 20)  # more than that is dropped from memory
    monkeypatch.setattr("streamrec.archive.follow.RETRY_PAUSE_S", 0.05)
    settings = make_settings(archive_dir=tmp_path / "archive")
    archive = EventArchive(tmp_path / "archive")
    folder = tmp_path / "archive" / "epoch-0" / "partition-1"
    await feed(settings, [])
    archiver = archiver_of(settings)

    async def archived(partition: int, records: int) -> bool:
        found = await asyncio.to_thread(
            EventArchive(tmp_path / "archive").store.files, f"epoch-0/partition-{partition}"
        )
        ends = [int(file.name.split("-")[-1].removesuffix(".parquet")) for file in found if "parquet" in file.name]
        return max(ends, default=0) >= records

    async with archiving_here(archiver):
        await eventually(lambda: asyncio.to_thread((tmp_path / "archive" / "format").exists))
        folder.parent.mkdir()
        if fault == "cannot be written":
            folder.write_text("a file where the folder should be")
        elif fault == "has a stray file":
            folder.mkdir()
            (folder / "notes.txt").write_text("mine")
        else:
            append = archiver._archive.append

            def broken(partition: int, *arguments: Any) -> None:
                if partition == 1:
                    raise MemoryError("no memory")
                append(partition, *arguments)

            monkeypatch.setattr(archiver._archive, "append", broken)
        records = [Record(f"u{n}".encode(), click(f"u{n}", "i1", 1_000 + n)) for n in range(600)]
        await feed(settings, records)
        ends = Counter(record.partition for record in await read_topic(settings, settings.kafka.topic))
        for partition in (0, 2, 3):
            await eventually(lambda partition=partition: archived(partition, ends[partition]))  # type: ignore[misc]

        async def is_shown() -> bool:  # after the last partition of a flush
            return 'streamrec_archive_unwritten_seconds{partition="0"} 0.0' in exposed(archiver).splitlines()

        await eventually(is_shown)
        assert 'streamrec_archive_unwritten_seconds{partition="1"} 0.0' not in exposed(archiver).splitlines()
        if fault == "cannot be written":
            folder.unlink()
        elif fault == "has a stray file":
            (folder / "notes.txt").unlink()
        else:
            monkeypatch.setattr(archiver._archive, "append", append)
        await eventually(lambda: archived(1, ends[1]))
    await assert_equals_the_topic(archive, settings)
    (warning,) = warnings_in(caplog)
    assert "the archive is unavailable, waiting for it (partitions 1): " in warning
    assert f'streamrec_archive_next_offset{{partition="1"}} {ends[1]}.0' in exposed(archiver)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return our warnings; the client of Kafka has its own."""
    ours = [record for record in caplog.records if record.name.startswith("streamrec.")]
    return [record.getMessage() for record in ours if record.levelname == "WARNING"]


def exposed(archiver: Archiver) -> str:
    assert archiver._metrics is not None
    return archiver._metrics.exposition().decode()


async def test_a_topic_that_does_not_exist_is_created(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(archive_dir=tmp_path / "archive")
    with archiving(settings, "--burst") as process:
        assert (await ends(process)).startswith("0 events archived")
    assert await topic_partitions(settings.kafka, [settings.kafka.topic]) == {settings.kafka.topic: 4}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `streamrec archive ...`; return status, stdout and stderr."""
    monkeypatch.setenv("STREAMREC_ARCHIVE_DIR", str(tmp_path / "archive"))

    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = main(["archive", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


def test_a_file_is_imported_once_shown_and_pruned(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("user_id,item_id,timestamp\nann,a,1700000000000\nbob,b,1700000001000\n")
    assert run("import", str(path)) == (0, f"2 events of {path} imported\n", "")
    assert run("import", str(path)) == (0, f"{path} was imported before\n", "")
    out = run("stats")[1]
    assert out.startswith("2 events, 2 of them imported; 0 dead letters\nfrom 2023-11-14 22:13:20 UTC to 2023-11-14")
    assert json.loads(run("stats", "--json")[1])["imported_events"] == 2
    assert run("prune", "--days", "1")[1] == "1 segments without an event of the last 1 days removed\n"
    assert run("stats")[1].startswith("0 events")


@pytest.mark.parametrize(
    ("time", "says"),
    [
        ("1700000000", "looks like seconds"),
        ("1700000000000000", "looks like microseconds"),
        ("4000000000000", "as Unix time in ms it is after 20"),
        ("0", "as Unix time in ms it is before 1973-03-03"),
    ],
)
def test_a_file_with_a_time_that_the_daemon_would_refuse_is_not_imported(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: str, says: str
) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text(f"user_id,item_id,timestamp\nann,a,1700000000000\nbob,b,{time}\n")
    status, out, err = run("import", str(path))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"streamrec: {path}:3: timestamp {time}") and says in err
    assert run("stats")[1].startswith("0 events")
    monkeypatch.setenv("STREAMREC_EVENTS_MIN_TIMESTAMP_MS", "0")
    assert run("import", str(path))[0] == (0 if time == "0" else 1), (
        "what looks like another unit is refused in any case"
    )


def test_a_mistake_is_reported_in_one_clear_line(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("import", str(tmp_path / "none.csv"))[2].startswith("streamrec: cannot read ")
    assert run("follow", "--kafka-bootstrap-servers", "kafka:0")[2].endswith("'kafka:0' is not host:port\n")
    monkeypatch.delenv("STREAMREC_ARCHIVE_DIR")
    assert run("stats") == (1, "", "streamrec: no archive: set STREAMREC_ARCHIVE_DIR or --archive-dir\n")
