"""Every reader of times has the same bounds, and names field, value and likely unit of a time outside them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sasrec import Columns, DataFileError, read_events
from sasrec.data.datasets import read_interactions
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
    assert [event.timestamp_ms for event in read_events(source(tmp_path, [3, 1, 2]))] == [3, 1, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("times", "warned"),
    [
        ([1, 2, 3], []),
        ([0, NOW_MS], []),
        ([NOW_MS, NOW_MS + 5], []),
        ([-(2**63), 2**63 - 1], ["nanoseconds"]),
        ([NOW_MS // 1000, NOW_MS // 1000 + 1], ["seconds", "seconds"]),
        ([NOW_MS, NOW_MS * 1000], ["microseconds"]),
        ([NOW_MS // 1000, NOW_MS], ["seconds"]),
    ],
)
def test_a_frame_whose_times_only_order_it_is_read_with_a_warning(
    times: list[int], warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    frame = {"USER_ID": ["u"] * len(times), "ITEM_ID": ["i"] * len(times), "TIMESTAMP": times}
    with caplog.at_level(logging.WARNING):
        rows = read_interactions(frame)
    assert rows.timestamps is not None and rows.timestamps.tolist() == times
    for record, unit in zip(caplog.records, warned, strict=True):
        assert f" looks like {unit}: as Unix time in ms" in record.getMessage()
