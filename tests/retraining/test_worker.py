"""`streamrec retrain`, a process beside the daemon: when it trains, the lock, and kills at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sasrec import Event, ItemVocab, SASRec, SASRecConfig, save_model
from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveError, RetrainError, RetrainStopped
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.redis.lock import take_lock
from streamrec.registry import Registry
from streamrec.retraining.lock import LOCK_TTL_MS
from streamrec.retraining.worker import RetrainWorker
from streamrec.settings import Settings

from support.daemon_process import Daemon, Retrain, models, serves, versions_published
from support.kafka_client import feed, raw_producer, read_topic, wait_caught_up
from support.oracle import assert_delivered
from support.s3_server import SECRET, S3Server
from support.waiting import eventually
from support.workload import Record, click

MakeSettings = Callable[..., Settings]
StartDaemon = Callable[..., Daemon]
ITEMS, USERS = 12, 30
BASE_MS = 1_700_000_000_000
QUICK: dict[str, Any] = {
    "model_max_len": 8,
    "model_hidden_units": 16,
    "model_num_blocks": 1,
    "model_dropout_rate": 0.0,
    "train_epochs": 40,
    "retrain_update_epochs": 10,
    "train_batch_size": 16,
    "train_learning_rate": 0.01,
    "retrain_update_learning_rate": 0.01,
    "train_patience": 0,
    "lists_filter_seen": False,
    "archive_flush_s": 0.2,
    "registry_poll_s": 3600,
}


def ring(steps: int, start: int = 0) -> list[Event]:
    """Return clicks in which item n + 1 always follows item n."""
    return [
        Event(f"u{user}", f"i{(user + step) % ITEMS}", BASE_MS + 1_000 * (step * USERS + user))
        for step in range(start, start + steps)
        for user in range(USERS)
    ]


def records(events: list[Event]) -> list[Record]:
    return [Record(e.user_id.encode(), click(e.user_id, e.item_id, e.timestamp_ms)) for e in events]


@pytest.fixture
def settings(make_settings: MakeSettings, tmp_path: Path) -> Settings:
    return make_settings(archive_dir=tmp_path / "archive", registry_dir=tmp_path / "registry", **QUICK)


def changed(settings: Settings, **changes: Any) -> Settings:
    return settings.but(**changes)


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[..., Retrain]]:
    """Start `streamrec retrain` processes; kill those that still run when the test ends."""
    started: list[Retrain] = []

    def run(*arguments: str, killed_at_step: int | None = None, **changes: Any) -> Retrain:
        started.append(Retrain(settings.but(**changes), *arguments, killed_at_step=killed_at_step))
        return started[-1]

    yield run
    for process in started:
        process.kill()


StartRetrain = Callable[..., Retrain]


def champion_of(settings: Settings) -> str | None:
    assert settings.registry.dir is not None
    champion = Registry(settings.registry.dir).champion()
    return champion.version if champion else None


# --- rounds


def rounds(settings: Settings) -> list[tuple[str, int, bool]]:
    """Return mode, rounds since the last full one, and promoted or not, of every version."""
    assert settings.registry.dir is not None
    found = [version.metadata for version in Registry(settings.registry.dir).versions()]
    return [(each["mode"], each["rounds_since_full"], each["refused"] is None) for each in found]


async def train_once(settings: Settings, **changes: Any) -> Any:
    return await RetrainWorker(changed(settings, **changes), follow=False).once()


async def test_rounds_train_the_champion_further_and_every_nth_from_scratch(settings: Settings) -> None:
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir)
    modes = []
    for number in range(5):
        archive.import_events(ring(steps=10, start=10 * number))
        verdict = await train_once(settings, retrain_full_every=3, registry_keep_versions=10)
        assert verdict.promoted, verdict.reason
        modes.append(verdict.mode)
    assert modes == ["full", "incremental", "incremental", "full", "incremental"]
    assert [since for _, since, _ in rounds(settings)] == [0, 1, 2, 0, 1]


async def test_an_incremental_round_leaves_known_items_in_their_rows_and_learns_new_ones(settings: Settings) -> None:
    assert settings.archive.dir is not None and settings.registry.dir is not None
    archive, registry = EventArchive(settings.archive.dir), Registry(settings.registry.dir)
    archive.import_events(ring(steps=10))
    first = registry.load((await train_once(settings)).version)
    news = [Event(f"v{e.user_id}", f"new-{e.item_id}", (e.timestamp_ms or 0) + 10**6) for e in ring(steps=10)]
    archive.import_events(news)
    verdict = await train_once(settings, retrain_update_epochs=40)
    second = registry.load(verdict.version)
    assert second.vocab.ids[: len(first.vocab)] == first.vocab.ids
    assert set(second.vocab.ids[len(first.vocab) :]) == {f"new-i{n}" for n in range(ITEMS)}
    assert verdict.report["challenger"]["ndcg@10"] > 0.9 > verdict.report["champion"]["ndcg@10"] == 0
    assert second.metadata["parent"] == first.version


@pytest.mark.parametrize(
    ("change", "why"),
    [({"model_hidden_units": 8}, "has another shape"), ({"retrain_mode": "full"}, "retrain_mode is full")],
)
async def test_the_log_says_why_a_round_trains_from_scratch(
    settings: Settings, change: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir)
    archive.import_events(ring(steps=10))
    await train_once(settings)
    archive.import_events(ring(steps=10, start=10))
    caplog.set_level("INFO")
    assert (await train_once(settings, **change)).mode == "full"
    assert any(why in str(getattr(record, "why", "")) for record in caplog.records)


async def test_held_out_clicks_are_newer_than_those_that_the_champion_was_trained_on(settings: Settings) -> None:
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir)
    archive.import_events(ring(steps=10))
    await train_once(settings, retrain_holdout_share=0.01)  # the champion is trained on all but three clicks
    archive.import_events(ring(steps=1, start=10))
    with pytest.raises(RetrainError, match="wait for more"):
        await train_once(settings, retrain_holdout_share=0.5)
    verdict = await train_once(settings, retrain_holdout_share=0.5, retrain_mode="full")
    assert verdict.report["cases"] == 33, "instead of half of all clicks, those new to the champion are held out"


@pytest.mark.parametrize(("new", "cases"), [(4, 7), (50, 50), (90, 50), (300, 151)])
async def test_half_of_a_few_new_clicks_are_held_out_and_the_rest_are_trained_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, new: int, cases: int
) -> None:
    """Three more clicks than ``new`` are new to the champion; 90 % of all clicks would be all of these."""
    monkeypatch.setattr("streamrec.retraining.timeline.MIN_HOLDOUT_CLICKS", 50)
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir)
    archive.import_events(ring(steps=10))
    await train_once(settings, retrain_holdout_share=0.01)
    archive.import_events(ring(steps=10, start=10)[:new])
    verdict = await train_once(settings, retrain_mode="full", retrain_holdout_share=0.9)
    assert verdict.report["cases"] == cases


# --- one at a time


async def test_only_one_worker_trains(settings: Settings, redis: RedisClient) -> None:
    assert settings.archive.dir is not None
    EventArchive(settings.archive.dir).import_events(ring(steps=10))
    lock = Keys(settings.redis.key_prefix).training
    assert await take_lock(redis, lock, "another", 60_000) == "another"
    with pytest.raises(RetrainError, match="another worker trains: another holds"):
        await train_once(settings)
    assert champion_of(settings) is None
    assert await take_lock(redis, lock, "a third", 0) == "another", "only its holder can release a lock"
    assert await take_lock(redis, lock, "another", 0) == "another"
    await train_once(settings)
    assert await redis.get_many([lock]) == [None], "the lock is released at the end"


async def test_a_worker_that_loses_the_lock_publishes_nothing(
    settings: Settings, redis: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.archive.dir is not None
    EventArchive(settings.archive.dir).import_events(ring(steps=10))
    monkeypatch.setattr("streamrec.retraining.lock.RENEW_EVERY_S", 0.05)
    lock = Keys(settings.redis.key_prefix).training
    training = asyncio.create_task(train_once(settings, train_epochs=100_000))

    async def is_locked() -> bool:
        return (await redis.get_many([lock]))[0] is not None

    await eventually(is_locked)
    await redis.set(lock, b"another", 60)
    with pytest.raises(RetrainStopped):
        await training
    assert champion_of(settings) is None
    assert await redis.get_many([lock]) == [b"another"]


@pytest.mark.long
async def test_a_worker_that_was_stopped_for_longer_than_its_lock_lives_promotes_nothing(
    settings: Settings, start: StartRetrain
) -> None:
    assert settings.archive.dir is not None
    EventArchive(settings.archive.dir).import_events(ring(steps=10))
    slow = start("--once", "--no-follow", train_epochs=2_000)
    await slow.says(" training ")
    slow.process.send_signal(signal.SIGSTOP)
    await eventually(lambda: lock_is_free(settings), LOCK_TTL_MS / 1000 + 5)
    assert "promoted: it passed the gate" in await start("--once", "--no-follow").ends()
    other = champion_of(settings)
    slow.process.send_signal(signal.SIGCONT)
    output = await slow.ends()
    assert f"not promoted: it was judged against no champion, and meanwhile {other} has become champion" in output
    assert champion_of(settings) == other


async def test_two_workers_do_not_write_one_archive(settings: Settings) -> None:
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir)
    with archive.following(), pytest.raises(ArchiveError, match="another process writes the topic into"):
        await RetrainWorker(settings).once()
    await feed(settings, records(ring(steps=10)))
    assert (await RetrainWorker(settings).once()).promoted


# --- as a process


async def test_a_worker_follows_the_topic_and_trains_whenever_enough_clicks_are_new(
    settings: Settings, start: StartRetrain
) -> None:
    await feed(settings, [])
    worker = start("--every", "1s", "--min-new-events", "300")
    await worker.says("retraining")
    assert champion_of(settings) is None
    await feed(settings, records(ring(steps=9)))  # 270 are not enough
    await worker.says("events=270")
    assert champion_of(settings) is None
    await feed(settings, records(ring(steps=5, start=9)))

    async def first() -> str | None:
        return champion_of(settings)

    before = await eventually(first)
    await feed(settings, records(ring(steps=12, start=14)))

    async def second() -> bool:
        return champion_of(settings) != before

    await eventually(second)
    worker.process.send_signal(signal.SIGTERM)
    assert "stopped" in await worker.ends()
    assert [mode for mode, _, _ in rounds(settings)] == ["full", "incremental"]
    await assert_archive_is_the_topic(settings)


async def test_a_signal_during_training_ends_the_process_without_a_model(
    settings: Settings, start: StartRetrain
) -> None:
    await feed(settings, records(ring(steps=10)))
    once = start("--once", train_epochs=100_000)
    await once.says(" training ")
    once.process.send_signal(signal.SIGTERM)
    assert "streamrec: stopped during training; nothing was published" in await once.ends(1)
    assert champion_of(settings) is None
    assert "promoted: it passed the gate" in await start("--once").ends(), "the lock was released"


async def test_without_clicks_a_worker_waits_for_them(settings: Settings, start: StartRetrain) -> None:
    worker = start("--every", "1s", retrain_min_new_events=0)
    await worker.says("no model this time: the archive is empty")
    await feed(settings, records(ring(steps=10)))

    async def trained() -> str | None:
        return champion_of(settings)

    await eventually(trained)


# --- what fails for a while


def stray_file(settings: Settings) -> Callable[[], object]:
    path = below(settings.archive.dir, "epoch-0/partition-0/notes.txt")
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    return path.unlink


def another_format(settings: Settings) -> Callable[[], object]:
    path = below(settings.registry.dir, "format")
    whole = path.read_text()
    path.write_text("9\n")
    return lambda: path.write_text(whole)


def folder_instead_of_a_file(settings: Settings) -> Callable[[], object]:
    """A registry that cannot be read: the alias is a folder."""
    path = below(settings.registry.dir, "champion.json")
    whole = path.read_bytes()
    path.unlink()
    path.mkdir()
    return lambda: (path.rmdir(), path.write_bytes(whole))


def below(place: object, name: str) -> Path:
    assert isinstance(place, Path)
    return place / name


@pytest.mark.parametrize("fault", [stray_file, another_format, folder_instead_of_a_file])
async def test_a_look_that_fails_ends_no_rounds_and_is_shown(
    settings: Settings, start: StartRetrain, fault: Callable[[Settings], Callable[[], object]]
) -> None:
    assert settings.archive.dir is not None
    archive = EventArchive(settings.archive.dir)
    archive.import_events(ring(steps=10))
    await train_once(settings)
    before = champion_of(settings)
    worker = start("--every", "1s", "--no-follow", retrain_min_new_events=0, retrain_http_port=0)
    await worker.says("retraining")
    mended = fault(settings)
    await worker.says("the loop rounds fails and is tried again: ")
    status, text = await worker.get("/readyz")
    assert (status, text) == (503, "the loop rounds fails, and the log says why\n")
    assert await worker.get("/livez") == (200, "ok\n"), "a restart would not help"
    metrics = (await worker.get("/metrics"))[1]
    assert 'streamrec_loop_failing{loop="rounds"} 1.0' in metrics
    reasons = {"stray_file": "archive", "another_format": "registry", "folder_instead_of_a_file": "store"}
    assert f'streamrec_retrain_failures_total{{reason="{reasons[fault.__name__]}"}} 0.0' not in metrics
    mended()
    await worker.says("the loop rounds works again")
    archive.import_events(ring(steps=10, start=10))

    async def another() -> bool:
        return champion_of(settings) != before

    await eventually(another)
    assert await worker.get("/readyz") == (200, "ok\n")
    assert worker.output.count("the loop rounds fails") == 1


async def test_a_version_dated_years_ahead_delays_no_round(
    settings: Settings, start: StartRetrain, tmp_path: Path
) -> None:
    assert settings.archive.dir is not None and settings.registry.dir is not None
    EventArchive(settings.archive.dir).import_events(ring(steps=10))
    first = await train_once(settings)
    saved = Registry(settings.registry.dir).load(first.version)
    version = save_model(tmp_path / "m", saved.model, saved.vocab, {"created_at": "2031-01-01T00:00:00.000+00:00"})
    shutil.rmtree(settings.registry.dir)
    Registry(settings.registry.dir).publish(
        ring_model(), ItemVocab(["i1"]), {"created_at": "2031-01-01T00:00:00+00:00"}
    )
    (tmp_path / "m").rename(below(settings.registry.dir, f"versions/{version}"))  # without a number, as of before
    start("--every", "1s", "--no-follow", retrain_min_new_events=0)

    async def trained() -> bool:
        return champion_of(settings) is not None

    await eventually(trained)


def ring_model() -> SASRec:
    return SASRec(SASRecConfig(num_items=1, max_len=4, hidden_units=8, num_blocks=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "soon"], "write a time as 90s, 30m, 6h or 1d"),
        (["--every", "0s"], "write a time as 90s, 30m, 6h or 1d"),
        (["--once", "--every", "1h"], "not allowed with argument"),
        (["--once", "--min-new-events", "-1"], "retrain_min_new_events='-1'"),
        (["--once", "--kafka-bootstrap-servers", "127.0.0.1:1"], "Kafka at 127.0.0.1:1 cannot be reached"),
        (["--once", "--no-follow", "--redis-url", "redis://127.0.0.1:1/0"], "Redis at redis://127.0.0.1:1/0"),
    ],
)
async def test_a_mistake_is_reported_in_one_clear_line(start: StartRetrain, arguments: list[str], message: str) -> None:
    worker = start(*arguments)
    assert await asyncio.to_thread(worker.process.wait, 60) in (1, 2)
    assert message in worker.output.splitlines()[-1]


async def test_archive_and_registry_may_be_in_an_object_store(
    settings: Settings, start: StartRetrain, s3: S3Server
) -> None:
    where = {"archive_dir": s3.new_bucket(), "registry_dir": s3.new_bucket()}
    there = settings.but(**where)
    await feed(settings, records(ring(steps=20)))
    assert "promoted: it passed the gate" in await start("--once", **where).ends()
    await assert_archive_is_the_topic(there)
    first = champion_of(there)
    await feed(settings, records(ring(steps=10, start=20)))
    dying = start("--once", **where)
    await dying.says(" training ")
    dying.kill()
    assert champion_of(there) == first
    await release_lock_of_dead_worker(settings)
    output = await start("--once", **where).ends()
    assert " promoted: it passed the gate" in output
    assert rounds(there) == [("full", 0, True), ("incremental", 1, True)]
    await assert_archive_is_the_topic(there)
    assert SECRET not in output


# --- proof


async def assert_archive_is_the_topic(settings: Settings) -> None:
    assert settings.archive.dir is not None
    expected = []
    for record in await read_topic(settings, settings.kafka.topic):
        event = json.loads(record.value)
        expected.append((event["user_id"], event["item_id"], event["timestamp"]))
    found = EventArchive(settings.archive.dir).read()
    assert list(zip(found.user_ids, found.item_ids, found.timestamps_ms.tolist(), strict=True)) == expected


@contextlib.asynccontextmanager
async def clicking(settings: Settings, start_step: int, per_s: float) -> Any:
    """Let the users of the ring click while the block runs."""
    ended = asyncio.Event()

    async def stream() -> None:
        async with raw_producer(settings) as producer:
            step = start_step
            while not ended.is_set():
                for record in records(ring(1, step)):
                    await producer.send_and_wait(settings.kafka.topic, record.value, key=record.key)
                    await asyncio.sleep(1 / per_s)
                step += 1

    async with asyncio.TaskGroup() as group:
        group.create_task(stream())
        yield
        ended.set()


@pytest.mark.timeout(600)
async def test_promotion_refusal_damage_rollback_and_kills_while_the_daemon_serves(
    settings: Settings, start: StartRetrain, start_daemon: StartDaemon, make_settings: MakeSettings, tmp_path: Path
) -> None:
    assert settings.registry.dir is not None and settings.archive.dir is not None
    registry = Registry(settings.registry.dir)
    await feed(settings, records(ring(steps=20)))
    assert "promoted: it passed the gate" in await start("--once").ends()
    first = champion_of(settings)
    where = {
        "model_dir": None,
        "registry_dir": settings.registry.dir,
        "registry_poll_s": 3600,
        "lists_filter_seen": False,
    }
    daemon = start_daemon(**where)
    await daemon.wait_ready()
    old_clicks = len(ring(steps=20))

    async with clicking(settings, start_step=20, per_s=30):
        await daemon.wait_handled(old_clicks + 4 * USERS)  # clicks that a round can train on
        # promoted while clicks arrive: the daemon learns of it by the message alone
        await start("--once").ends()
        second = champion_of(settings)
        assert second != first
        await eventually(lambda: serves(daemon, str(second)))

        # killed while archiving
        archiving = start("--every", "1h")
        ends = sum(EventArchive(settings.archive.dir).next_offsets().values())

        async def has_archived() -> bool:
            return sum(EventArchive(settings.archive.dir).next_offsets().values()) > ends

        await eventually(has_archived)
        archiving.kill()
        # killed while training: its lock expires
        training = start("--once", train_epochs=100_000, retrain_mode="full")
        await training.says(" training ")
        training.kill()
        assert "another worker trains" in await start("--once", "--no-follow").ends(1)
        assert champion_of(settings) == second

        # trained on shuffled clicks, compared on real ones
        shuffled = ring(steps=30)
        items = [event.item_id for event in shuffled[: 27 * USERS]]
        random.Random(3).shuffle(items)
        wrong = [Event(e.user_id, item, e.timestamp_ms) for e, item in zip(shuffled, items, strict=False)]
        later = [Event(e.user_id, e.item_id, (e.timestamp_ms or 0) + 10**9) for e in shuffled[27 * USERS :]]
        EventArchive(tmp_path / "shuffled").import_events([*wrong, *later])
        await eventually(lambda: lock_is_free(settings), LOCK_TTL_MS / 1000 + 5)
        refused = start("--once", "--no-follow", archive_dir=tmp_path / "shuffled", retrain_mode="full")
        output = await refused.ends()
        assert "not promoted: NDCG@10" in output
        assert "is below the champion's" in output or "is no better than popularity's" in output
        assert champion_of(settings) == second

        # killed while publishing and while promoting: every version is whole, and the next round works
        for step in (1, 12, 24):
            dying = start("--once", "--no-follow", retrain_mode="full", killed_at_step=step)
            assert await asyncio.to_thread(dying.process.wait, 100) == -signal.SIGKILL, dying.output
            assert all(version.problem is None for version in registry.versions())
            assert champion_of(settings) == second
            await release_lock_of_dead_worker(settings)

        # a damaged version is refused, and the champion before it comes back
        await start("--once").ends()
        third = champion_of(settings)
        assert third not in (first, second)
        await eventually(lambda: serves(daemon, str(third)))
        weights = registry.place / "versions" / str(second) / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-4] + b"rust")
        damaged = await asyncio.to_thread(models, settings, "promote", str(second))
        assert (damaged.returncode, "is damaged" in damaged.stderr) == (1, True)
        assert await serves(daemon, str(third))
        weights.write_bytes(whole)
        assert (await asyncio.to_thread(models, settings, "rollback")).returncode == 0
        await eventually(lambda: serves(daemon, str(second)))
    await wait_caught_up(settings)

    async def every_list_is_of_the_champion() -> bool:
        return set((await versions_published(settings)).values()) <= {second, "popular"}

    await eventually(every_list_is_of_the_champion)
    await assert_delivered(make_settings(model_dir=registry.place / "versions" / str(second), lists_filter_seen=False))
    assert daemon.lines("ERROR") == []
    await start("--once").ends()
    await assert_archive_is_the_topic(settings)


async def lock_is_free(settings: Settings) -> bool:
    async with RedisClient(settings.redis) as redis:
        return await redis.get_many([Keys(settings.redis.key_prefix).training]) == [None]


async def release_lock_of_dead_worker(settings: Settings) -> None:
    """Release the lock now instead of waiting until it expires."""
    key = Keys(settings.redis.key_prefix).training
    async with RedisClient(settings.redis) as redis:
        (holder,) = await redis.get_many([key])
        assert holder is not None
        await take_lock(redis, key, holder.decode(), 0)
