"""The figures of the freshness study (tests/studies/study_freshness.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from support.due_clicks import ListReader, Schedule, Seen
from support.freshness import course, draw, figures, table

STRUCK_S = 100.0


def clicks(waited_s: Callable[[float], float]) -> list[Seen]:
    """Return ten clicks a second, 15 s before a fault and 40 s after it; ``waited_s`` gets the time from the fault."""
    return [Seen(STRUCK_S + tick / 10, STRUCK_S + tick / 10 + waited_s(tick / 10)) for tick in range(-150, 400)]


def outage(begin_s: float, end_s: float) -> Callable[[float], float]:
    """Clicks wait for the end of an outage, others not."""
    return lambda at_s: 0.01 + (end_s - at_s if begin_s <= at_s < end_s else 0.0)


@pytest.mark.parametrize(
    ("waited_s", "last_mark_s", "recovered_s"),
    [
        (lambda _: 0.4, 0.0, 0.0),
        (outage(0, 8), 0.0, 7.5),  # a click at 7.5 s waits half a second
        (outage(3, 8), 0.0, 7.5),  # the fault shows later, but within the calm
        (outage(12, 14), 10.0, 13.5),  # a daemon joins when it is ready
        (outage(20, 22), 0.0, 0.0),  # long after the fault: not its work
        (outage(-10, -5), 0.0, 0.0),
    ],
)
def test_good_again_is_when_nine_of_ten_clicks_are_fast_for_a_while(
    waited_s: Callable[[float], float], last_mark_s: float, recovered_s: float
) -> None:
    assert figures(clicks(waited_s), STRUCK_S, STRUCK_S + last_mark_s)["recovered_s"] == recovered_s


def test_a_click_that_waits_when_the_fault_strikes_counts_as_after_it() -> None:
    found = figures(clicks(outage(-0.05, 10)), STRUCK_S, STRUCK_S)
    assert found["before"]["clicks"] == 150
    assert found["before"]["max_ms"] == pytest.approx(10, abs=0.01)
    late = figures(clicks(outage(-2, 10)), STRUCK_S, STRUCK_S)
    assert late["before"]["clicks"] == 130
    assert late["after"]["max_ms"] == pytest.approx(12_010)


def test_table_and_picture_show_every_fault(tmp_path: Any) -> None:
    seen = clicks(outage(0, 8))
    found = figures(seen, STRUCK_S, STRUCK_S) | {
        "title": "the broker is killed",
        "redis": "valkey 9",
        "marks": [(0.0, "killed"), (1.0, "up"), (60.0, "late")],
    }
    report = {"commit": "c", "kafka": "Apache Kafka 4", "clicks_per_s": 1_500, "faults": {"broker": found}}
    assert table(report).splitlines()[-1] == "| the broker is killed | 10 | 10 | 10 | 7,611 | 8,010 | 7.5 |"
    assert course(seen, STRUCK_S)[30]["max_ms"] == pytest.approx(8_010)
    draw({"broker": found}, str(tmp_path / "picture.png"), after_s=40)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


class Lists:
    """A server whose lists have more clicks at each read."""

    def __init__(self) -> None:
        self.reads = 0

    async def mget(self, keys: list[str]) -> list[bytes | None]:
        self.reads += 1
        if self.reads == 1:
            raise ConnectionError("a failover")
        return [None if self.reads < 4 else json.dumps({"items": [], "n": 7 + self.reads // 6}).encode() for _ in keys]


async def test_the_reader_waits_for_the_list_that_contains_the_click() -> None:
    schedule = Schedule(start_s=0.0, per_s=1_000.0, clicks=4, users=2, sample=1)
    lists: Any = Lists()
    seen = await ListReader(schedule, lists, str, n_before=[6, 6]).run(patience_s=1e12)
    assert [click.due_s for click in seen] == [0.0, 0.001, 0.002, 0.003]
    assert lists.reads == 6
    assert seen[0].seen_s == seen[1].seen_s < seen[2].seen_s
