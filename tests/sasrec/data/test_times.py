"""Every reader of times has the same bounds, and names field, value and likely unit of a time outside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sasrec import Columns, DataFileError, read_events
from sasrec.data.datasets import InteractionsDataset, read_interactions
from sasrec.data.times import EARLIEST_MS, LATEST_MS, TimeBounds

from support.interactions import write, write_parquet

NOW_MS = 1_700_000_000_000
STRICT = TimeBounds(EARLIEST_MS, NOW_MS)


def csv(folder: Path, times: list[int]) -> Path:
    return write(folder, "user_id,item_id,timestamp\n" + "".join(f"u,i{n},{time}\n" for n, time in enumerate(times)))


def parquet(folder: Path, times: list[int]) -> Path:
    ids = {"user_id": ["u"] * len(times), "item_id": [f"i{n}" for n in range(len(times))]}
    return write_parquet(folder, ids | {"timestamp": times})


def json_lines(folder: Path, times: list[int]) -> Path:
    rows = (f'{{"user_id": "u", "item_id": "i{n}", "timestamp": {time}}}\n' for n, time in enumerate(times))
    return write(folder, "".join(rows))


SOURCES: dict[str, Callable[[Path, list[int]], Path]] = {"csv": csv, "parquet": parquet, "JSON lines": json_lines}
sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


@sources
@pytest.mark.parametrize(
    ("time", "unit", "says"),
    [
        (NOW_MS * 1000, None, "looks like microseconds: as Unix time in ms it is after 5138-11-16"),
        (NOW_MS * 10**6, None, "looks like nanoseconds: as Unix time in ms it is after 5138-11-16"),
        (NOW_MS * 1000, "ms", "looks like microseconds: as Unix time in ms it is after 5138-11-16"),
        (NOW_MS, "s", "looks like milliseconds: as Unix time in s it is after 5138-11-16"),
        (NOW_MS * 1000, "s", "looks like microseconds: as Unix time in s it is after 5138-11-16"),
        (LATEST_MS + 1, None, "looks like microseconds: as Unix time in ms it is after 5138-11-16"),
    ],
)
def test_a_time_after_the_bounds_is_refused_in_any_file(
    tmp_path: Path, source: Callable[[Path, list[int]], Path], time: int, unit: Any, says: str
) -> None:
    good = NOW_MS if unit != "s" else NOW_MS // 1000
    path = source(tmp_path, [good, time])
    with pytest.raises(DataFileError, match=f"{path}.*timestamp {time} {says}; give the right unit") as caught:
        list(read_events(path, Columns(timestamp_unit=unit)))
    assert "\n" not in str(caught.value)


@sources
@pytest.mark.parametrize("time", [0, -1, 5, NOW_MS // 1000, NOW_MS + 1, NOW_MS * 1000])
def test_given_bounds_refuse_what_the_daemon_would(
    tmp_path: Path, source: Callable[[Path, list[int]], Path], time: int
) -> None:
    path = source(tmp_path, [NOW_MS, time])
    with pytest.raises(DataFileError, match=f"timestamp {time}"):
        list(read_events(path, Columns(timestamp_unit="ms"), bounds=STRICT))
    assert len(list(read_events(source(tmp_path, [NOW_MS, EARLIEST_MS]), bounds=STRICT))) == 2


@sources
def test_small_numbers_stay_usable_where_they_only_order_the_rows(
    tmp_path: Path, source: Callable[[Path, list[int]], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = source(tmp_path, [3, 1, 2, 0, -5])
    assert [event.timestamp_ms for event in read_events(path)] == [3, 1, 2, 0, -5]
    assert read_interactions(path).timestamps.tolist() == [3, 1, 2, 0, -5]
    assert not caplog.records


def frame(folder: Path, times: list[int]) -> dict[str, Any]:
    return {"USER_ID": ["u"] * len(times), "ITEM_ID": ["i"] * len(times), "TIMESTAMP": times}


LIKELY = {
    "seconds": (NOW_MS // 1000, "s"),
    "microseconds": (NOW_MS * 1000, "us"),
    "nanoseconds": (NOW_MS * 10**6, "ns"),
}


@pytest.mark.parametrize("likely", LIKELY)
@pytest.mark.parametrize("where", [*SOURCES, "frame"])
def test_a_number_that_is_a_time_in_another_unit_is_refused_by_streams_and_tables(
    tmp_path: Path, where: str, likely: str
) -> None:
    time, unit = LIKELY[likely]
    source = frame(tmp_path, [NOW_MS, time]) if where == "frame" else SOURCES[where](tmp_path, [NOW_MS, time])
    says = rf"(?i)timestamp {time} looks like {likely}: .*; give the right unit with --timestamp-unit {unit} or "
    with pytest.raises(DataFileError, match=says):
        read_interactions(source)
    alike = frame(tmp_path, [time] * 2) if where == "frame" else SOURCES[where](tmp_path, [time] * 2)
    columns = Columns(timestamp_unit=unit)
    found = read_interactions(InteractionsDataset(alike, columns=columns)).timestamps
    assert found is not None and found.tolist() == [NOW_MS] * 2
    if where != "frame":
        with pytest.raises(DataFileError, match=says):
            list(read_events(SOURCES[where](tmp_path, [time])))
        path = SOURCES[where](tmp_path, [time] * 2)
        assert [event.timestamp_ms for event in read_events(path, columns)] == [NOW_MS] * 2


@pytest.mark.parametrize("where", [*SOURCES, "frame"])
@pytest.mark.parametrize("times", [[20240131, 20231224], [20240131120000, 20231224235959]])
def test_dates_without_separators_are_no_milliseconds(tmp_path: Path, where: str, times: list[int]) -> None:
    source = frame(tmp_path, times) if where == "frame" else SOURCES[where](tmp_path, times)
    with pytest.raises(DataFileError, match=rf"(?i)timestamp {times[0]}: the times look like (dates|times) \(YYYYMMDD"):
        read_interactions(source)
    found = read_interactions(InteractionsDataset(source, columns=Columns(timestamp_unit="ms"))).timestamps
    assert found is not None and found.tolist() == times


def test_rows_that_are_newest_first_and_share_times_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for times, warned in (([3, 2, 2, 1], True), ([3, 2, 1], False), ([1, 2, 2, 3], False), ([2, 2], False)):
        for read in (lambda path: list(read_events(path)), read_interactions):
            caplog.clear()
            read(csv(tmp_path, times))
            assert ("newest first" in caplog.text) is warned


def test_datetimes_that_were_numbers_in_another_unit_are_refused(tmp_path: Path) -> None:
    ids = {"user_id": ["u"], "item_id": ["i"]}
    for unit, value in (("ns", NOW_MS), ("ns", NOW_MS * 1000), ("ms", NOW_MS // 1000)):
        path = write_parquet(tmp_path, ids | {"timestamp": pa.array([value], pa.timestamp(unit))})
        for read in (lambda path: list(read_events(path)), read_interactions):
            with pytest.raises(
                DataFileError, match=r"row 0: timestamp '1970-01-.*': the times are all in January 1970; "
            ):
                read(path)


@sources
def test_fractions_of_seconds_are_named_as_such(tmp_path: Path, source: Callable[..., Path]) -> None:
    path = source(tmp_path, [f"{NOW_MS // 1000}.5"])
    unit = "looks like seconds" if source is parquet else "looks like seconds: give --timestamp-unit s"
    with pytest.raises(DataFileError, match=unit):
        list(read_events(path))
    assert next(read_events(path, Columns(timestamp_unit="s"))).timestamp_ms == NOW_MS + 500


RFC_3339 = [
    "2023-11-14t22:13:20z",
    "2023-11-14T22:13:20Z",
    "2023-11-14 22:13:20+00:00",
    "2023-11-15T00:13:20.000+02:00",
    "2023-11-14T22:13:20",
]


@pytest.mark.parametrize("text", RFC_3339)
@sources
def test_streams_and_tables_read_the_same_times(tmp_path: Path, source: Callable[..., Path], text: str) -> None:
    quoted = f'"{text}"' if source is json_lines else text
    for texts in ([quoted] * 2, [quoted, quoted.replace("22:13:20", "22:13:20.000").replace("00:13", "00:13")]):
        path = source(tmp_path, texts)
        assert [event.timestamp_ms for event in read_events(path)] == [NOW_MS] * 2
        found = read_interactions(path).timestamps
        assert found is not None and found.tolist() == [NOW_MS] * 2
