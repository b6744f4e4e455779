"""What all clicks of a user make is, byte for byte, what append.lua makes of them one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sasrec import Event
from streamrec.archive.segments import EventArchive
from streamrec.errors import ArchiveError
from streamrec.rebuild.past_clicks import PastClicks
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.schemas import ClickEvent
from streamrec.settings import Settings

from support.archives import CENTURY_S, archived
from support.redis_access import BASE_MS, batch, event, raw_redis, record
from support.sequences import against_redis, fresh, ids, store_of
from support.sessions import current_session

MakeSettings = Callable[..., Settings]


@st.composite
def topics(draw: st.DrawFn) -> list[list[ClickEvent]]:
    """Records of a few users on three partitions, keyed by user, the times in any order."""
    users = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    next_offsets = [draw(st.integers(0, 3)) for _ in range(3)]
    events = []
    for _ in range(draw(st.integers(1, 30))):
        number = draw(st.integers(0, len(users) - 1))
        partition = number % 3
        at_ms = draw(st.just(0) | st.integers(BASE_MS, BASE_MS + 60))
        items = draw(st.lists(ids, min_size=1, max_size=draw(st.sampled_from([1, 1, 4]))))
        events.append(record(users[number], items, at_ms, partition, next_offsets[partition], at_ms))
        next_offsets[partition] += draw(st.sampled_from([1, 1, 1, 2, 10]))
    return events


def flat(records: list[list[ClickEvent]]) -> list[ClickEvent]:
    return [click for clicks in records for click in clicks]


@against_redis
@given(topics(), st.integers(0, 30), st.integers(1, 7), st.sampled_from([0, 0.005, 0.02]), st.sampled_from([0, 3]))
async def test_the_sequence_of_all_clicks_is_what_is_appended_one_by_one(
    redis: RedisClient,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
    records: list[list[ClickEvent]],
    in_archive: int,
    max_len: int,
    gap_s: float,
    epoch: int,
) -> None:
    settings = fresh(make_settings, sequences_session_gap_s=gap_s, kafka_topic_epoch=epoch)
    store = store_of(redis, settings, max_len)
    for clicks in records:
        await store.append(batch(*clicks))
    earlier, later = flat(records[: in_archive + 1]), flat(records[in_archive + 1 :])
    past = PastClicks(archived(tmp_path_factory.mktemp("archive"), earlier, epoch), settings.sequences, max_len)
    past.add(later)
    events = earlier + later
    assert len(past) == len(events)
    assert sorted(past.users()) == sorted({e.user_id for e in events})
    async with raw_redis(settings) as raw:
        for user in past.users():
            stored = await raw.get(Keys(settings.redis.key_prefix).sequence(user))
            assert past.sequence_of(user).encode() == stored


@against_redis
@given(topics(), st.sampled_from([0, 0.005, 0.02]))
def test_the_sequence_is_the_last_session_by_definition(
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
    records: list[list[ClickEvent]],
    gap_s: float,
) -> None:
    events = flat(records)
    settings = make_settings(sequences_session_gap_s=gap_s)
    past = PastClicks(archived(tmp_path_factory.mktemp("archive"), events), settings.sequences, 100)
    for user in {click.user_id for click in events}:
        own = [click for click in events if click.user_id == user]
        times = [click.timestamp_ms for click in own]
        session = own[current_session(times, gap_s * 1000) :]
        found = past.sequence_of(user)
        assert (found.items.ids(), found.session_n) == ([click.item_id for click in session], len(session))
        assert (found.n, found.last_event_ts_ms) == (len(own), max(times))


def items_of(past: PastClicks, user: str) -> list[str]:
    return past.sequence_of(user).items.ids()


def test_imported_clicks_come_first_by_time_and_guard_nothing(make_settings: MakeSettings, tmp_path: Path) -> None:
    archive = archived(tmp_path, [event("ann", "t1", 4, BASE_MS), event("ann", "t2", 5, BASE_MS + 1)])
    archive.import_events([Event("ann", "f3", BASE_MS + 30), Event("ann", "f1", 1), Event("bob", "b", 1)])
    archive.import_events([Event("ann", "f2", 2)])
    past = PastClicks(archive, make_settings(sequences_ttl_s=CENTURY_S).sequences, 10)
    assert items_of(past, "ann") == ["f1", "f2", "f3", "t1", "t2"]
    found = past.sequence_of("ann")
    assert (found.n, found.last_event_ts_ms, found.offsets) == (5, BASE_MS + 30, {0: 5})
    assert past.sequence_of("bob").encode() == b"1 1 1 1 1 0 \0b\0"
    assert (past.has_imported, past.first_ts_ms, past.next_offsets) == (True, 1, {0: 6})


def test_a_topic_before_it_was_created_again_comes_first_and_guards_nothing(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    archived(tmp_path, [event("ann", "old", 900, BASE_MS + 5)], epoch=0)
    archived(tmp_path, [event("ann", "older", 900, BASE_MS)], epoch=10)
    archive = archived(tmp_path, [event("ann", "new", 0, BASE_MS + 9)], epoch=11)
    archived(tmp_path, [event("ann", "of an epoch to come", 0, BASE_MS + 10)], epoch=12)
    past = PastClicks(archive, make_settings(kafka_topic_epoch=11).sequences, 10)
    assert items_of(past, "ann") == ["old", "older", "new"]
    assert (past.sequence_of("ann").offsets, past.sequence_of("ann").topic_epoch) == ({0: 0}, 11)


def test_clicks_of_a_user_in_several_partitions_are_merged_by_time_each_in_its_own_order(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    """The user was in partition 2, and in 0 since partitions were added; one producer does not key by user."""
    before = [event("ann", f"b{n}", n, BASE_MS + n, partition=2) for n in range(3)]
    late = event("ann", "late", 3, BASE_MS - 50, partition=2)
    after = [event("ann", f"a{n}", n, BASE_MS + 10 + n, partition=0) for n in range(3)]
    past = PastClicks(archived(tmp_path, [*before, late, after[0]]), make_settings().sequences, 10)
    past.add([*after[1:], event("ann", "no key", 0, BASE_MS + 11, partition=1)])
    assert items_of(past, "ann") == ["b0", "b1", "b2", "late", "a0", "a1", "no key", "a2"]
    assert past.sequence_of("ann").offsets == {0: 2, 1: 0, 2: 3}


def test_a_sequence_that_expired_is_not_restored(make_settings: MakeSettings, tmp_path: Path) -> None:
    clicks = [event("ann", "long ago", 0, BASE_MS), event("ann", "back", 1, BASE_MS + 2_000_001)]
    clicks += [event("bob", "b1", 2, BASE_MS), event("bob", "b2", 3, BASE_MS + 2_000_000)]
    past = PastClicks(archived(tmp_path, clicks), make_settings(sequences_ttl_s=2_000).sequences, 10)
    assert (items_of(past, "ann"), past.sequence_of("ann").n) == (["back"], 1)
    assert (items_of(past, "bob"), past.sequence_of("bob").n) == (["b1", "b2"], 2)


@pytest.mark.parametrize("wrong_ms", [1_700_000_000_000_000, 1_700_000_000_000_000_000])
def test_clicks_of_a_year_to_come_are_skipped_with_a_warning(
    make_settings: MakeSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong_ms: int
) -> None:
    archive = archived(tmp_path, [event("ann", "t1", 4, BASE_MS)])
    archive.import_events([Event("ann", "wrong", wrong_ms), Event("bob", "wrong", wrong_ms)])
    past = PastClicks(archive, make_settings().sequences, 10)
    assert (past.users(), items_of(past, "ann"), past.sequence_of("ann").last_event_ts_ms) == (["ann"], ["t1"], BASE_MS)
    assert past.popularity(10) == ({"t1": 1.0}, BASE_MS) or past.popularity(10)[0]["wrong"] == 0.0
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"2 clicks in {archive.store} are skipped: timestamp_ms {wrong_ms} looks like ")


@pytest.mark.parametrize("times", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("archived_clicks", [1, 2, 3])
def test_a_click_whose_time_is_years_old_neither_cuts_nor_ages_a_sequence(
    make_settings: MakeSettings, tmp_path: Path, times: tuple[int, ...], archived_clicks: int
) -> None:
    clicks = [event("ann", f"i{n}", n, time and BASE_MS + time) for n, time in enumerate(times)]
    past = PastClicks(archived(tmp_path, clicks[:archived_clicks]), make_settings().sequences, 10)
    past.add(clicks[archived_clicks:])
    found = past.sequence_of("ann")
    assert (found.items.ids(), found.n, found.session_n) == (["i0", "i1", "i2"], 3, 3)
    assert found.last_event_ts_ms == max(click.timestamp_ms for click in clicks)


def test_the_user_with_the_newest_click_comes_first_whatever_came_last(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    clicks = [event("ann", "new", 0, BASE_MS + 9), event("bob", "b", 1, BASE_MS + 5), event("ann", "late", 2, BASE_MS)]
    past = PastClicks(archived(tmp_path, clicks[:2]), make_settings().sequences, 10)
    past.add(clicks[2:])
    assert past.users() == ["ann", "bob"]


def test_the_latest_user_comes_first_and_a_click_halves_in_popularity(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    past = PastClicks(
        archived(tmp_path, [event("ann", "x", 0, 0), event("bob", "y", 1, 20_000), event("cid", "x", 2, 10_000)]),
        make_settings().sequences,
        10,
    )
    assert past.users() == ["bob", "cid", "ann"]
    assert past.first_ts_ms == 0
    assert past.popularity(10) == ({"x": 0.75, "y": 1.0}, 20_000)
    past.add([event("ann", "z", 3, 30_000)])
    assert past.users() == ["ann", "bob", "cid"]
    assert past.popularity(10) == ({"x": 0.375, "y": 0.5, "z": 1.0}, 30_000)


def test_an_empty_archive_is_an_error_that_says_how_to_fill_it(make_settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=f"{tmp_path}/none is empty; fill it with: streamrec archive follow"):
        PastClicks(EventArchive(tmp_path / "none"), make_settings().sequences, 10)
