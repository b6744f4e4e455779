"""Rounds after the topic was created again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sasrec import Event
from streamrec.archive.segments import EventArchive
from streamrec.registry import Registry
from streamrec.retraining.round import retrain
from streamrec.schemas import ClickEvent
from streamrec.settings import Settings

from support.daemon_process import Retrain
from support.rounds import QUICK, circle
from support.waiting import eventually


def append(folder: Path, epoch: int, events: list[Event]) -> None:
    clicks = [
        ClickEvent(e.user_id, e.item_id, 1_700_000_000_000 + (e.timestamp_ms or 0), 0, n, 0)
        for n, e in enumerate(events)
    ]
    EventArchive(folder, epoch).append(0, 0, len(clicks), clicks)


async def test_new_clicks_count_from_the_beginning_of_the_new_topic(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folders = {"archive_dir": tmp_path / "archive", "registry_dir": tmp_path / "registry"}
    settings = make_settings(**QUICK | folders | {"train_epochs": 1})
    append(tmp_path / "archive", 0, circle(steps=20))
    retrain(settings)
    append(tmp_path / "archive", 1, circle(steps=10, start=20))  # 300 clicks, at lower offsets than the 600 before
    raised = settings.but(kafka_topic_epoch=1, retrain_min_new_events=300, retrain_http_port=0)
    worker = Retrain(raised, "--every", "1s", "--no-follow")
    registry = Registry(tmp_path / "registry")

    async def made_another() -> bool:
        assert worker.process.poll() is None, worker.output
        return len(registry.versions()) == 2

    try:
        await eventually(made_another, timeout_s=90)
    finally:
        worker.kill()
    assert registry.versions()[-1].metadata["topic_epoch"] == 1
