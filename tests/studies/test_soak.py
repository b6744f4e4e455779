"""A short soak, which gets SIGKILL itself; and its verdict finds what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamrec.kafka.topics import ensure_topics
from streamrec.settings import Settings

from studies.soak.state import load
from studies.soak.verdict import judged_letters, judged_sequences
from support.kafka_client import feed, produce_to
from support.oracle import expected_sequences, is_bad
from support.raw_batches import RawBatch, RawRecord, produce_raw
from support.servers import apache_kafka_home, own_servers
from support.topic_files import StoredRecord, read_topic_files
from support.waiting import eventually
from support.workload import BAD, Record, click

TESTS = Path(__file__).parents[1]


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    home = apache_kafka_home()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        more = ("--folder", str(tmp_path), "--kills", "12", "--events", "3000", "--kill-every", "1", "--seed", "12")
        paths = os.pathsep.join((str(TESTS), *sys.path))
        environ = {**os.environ, "PYTHONPATH": paths, "KAFKA_HOME": str(home)}
        started.append(subprocess.Popen([sys.executable, "-m", "studies.soak", *more], env=environ))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_soak_that_gets_sigkill_continues_and_nothing_is_lost(
    soak: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    first = soak()

    async def is_amid() -> bool:
        assert first.poll() is None
        state = load(tmp_path)
        return state is not None and len(state.killed) >= 5 and state.produced > 500

    await eventually(is_amid, timeout_s=300)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = soak()
    await eventually(lambda: has_ended(second), timeout_s=500)
    result = json.loads((tmp_path / "result.json").read_text())
    assert second.returncode == 0, result
    assert result["right"] and result["faults"] == []
    assert result["runs"] == 2 and result["kills"] >= 12 and result["records"] >= 3_000
    assert result["verdict"]["numbers_missing"] == result["verdict"]["lost"] == result["verdict"]["doubled"] == 0
    assert (tmp_path / "soak.png").stat().st_size > 10_000


async def has_ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


def record(number: int, value: bytes, *headers: tuple[str, bytes]) -> StoredRecord:
    return StoredRecord(0, number, 1_000, b"ann", value, headers)


def test_the_verdict_counts_what_is_lost_doubled_and_wrong(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    users = expected_sequences([record(n, click(user, f"i{n}", n)) for n, user in enumerate("aabbc")], settings, 8)
    right: dict[str, Any] = {user: dataclasses.replace(expected) for user, expected in users.items()}
    said: list[str] = []
    assert judged_sequences(right, users, said.append) == {"lost": 0, "doubled": 0, "wrong_sequences": 0}
    lacking = expected_sequences([record(n, click(user, f"i{n}", n)) for n, user in enumerate("abbb")], settings, 8)
    wrong: dict[str, Any] = {**lacking}  # one of a, c is lost, b has one more
    assert judged_sequences(wrong, users, said.append) == {"lost": 2, "doubled": 1, "wrong_sequences": 3}
    assert len(said) == 3


def test_the_verdict_counts_dead_letters_that_are_missing_wrong_and_copies() -> None:
    def letter(of: int, value: bytes) -> StoredRecord:
        names = {"streamrec.partition": b"0", "streamrec.offset": str(of).encode(), "streamrec.reason": b"why"}
        return record(0, value, *names.items())

    bad = [record(n, b"bad %d" % n) for n in range(3)]
    letters = [letter(0, b"bad 0"), letter(0, b"bad 0"), letter(1, b"other"), letter(9, b"good")]
    found = judged_letters(letters, bad, lambda _: None)
    assert found == {"dead_letters_missing": 2, "dead_letters_wrong": 2, "dead_letter_copies": 1}


async def test_topic_files_have_what_was_written(make_settings: Callable[..., Settings]) -> None:
    with own_servers() as servers:
        settings = make_settings(kafka_bootstrap_servers=servers.kafka_bootstrap_servers, kafka_partitions=2)
        await ensure_topics(settings.kafka, (settings.kafka.topic,))
        await produce_to(settings, 0, b"first", b"key")
        await produce_raw(settings, RawBatch([RawRecord(None, b"raw", [(b"\xff", None), (BAD.encode(), b"")])]))
        await feed(settings, [Record(b"ann", click("ann", "i1"), bad=False)])
        found = read_topic_files(servers.folder / "kafka" / "data", settings.kafka.topic)
    assert [(r.offset, r.key, r.value) for r in found if r.key != b"ann"] == [(0, b"key", b"first"), (1, b"raw", None)]
    assert [name for name, _ in found[1].headers] == ["\ufffd", BAD]
    assert [is_bad(r) for r in found].count(True) == 1
    assert [r.value for r in found if r.key == b"ann"] == [click("ann", "i1")]
