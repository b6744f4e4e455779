"""A person has the last word over a round, and of two workers the later one: rollback, hold, promotion, a lost lock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamrec.retraining.round
from streamrec.archive.segments import EventArchive
from streamrec.bucket import Seen
from streamrec.commands.main import main
from streamrec.errors import Overtaken
from streamrec.local.daemon import environment
from streamrec.redis.client import RedisClient
from streamrec.redis.keys import Keys
from streamrec.registry import Registry
from streamrec.retraining.gate import Report
from streamrec.retraining.promotion import Verdict
from streamrec.retraining.round import retrain
from streamrec.retraining.worker import RetrainWorker
from streamrec.settings import Settings
from streamrec.storage import Place

from support.registry import publish
from support.rounds import QUICK, circle

MakeSettings = Callable[..., Settings]


class Bench:
    """An archive, and a registry whose champion was trained on it."""

    def __init__(self, settings: Settings) -> None:
        assert settings.archive.dir is not None and settings.registry.dir is not None
        self.settings = settings
        self.archive = EventArchive(settings.archive.dir)
        self.registry = Registry(settings.registry.dir)
        self._steps = 0

    def round(self, new_clicks: bool = True) -> Verdict:
        if new_clicks:
            self.archive.import_events(circle(steps=10, start=self._steps))
            self._steps += 10
        return retrain(self.settings)

    @property
    def champion(self) -> str | None:
        found = self.registry.champion()
        return found.version if found else None

    def command(self, *arguments: str) -> int:
        return main(["models", *arguments])


@pytest.fixture
def bench(place: Place, tmp_path: Path, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> Bench:
    settings = make_settings(archive_dir=tmp_path / "archive", registry_dir=place, **QUICK)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    return Bench(settings)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Do something while a round compares its model with the champion."""

    def during(action: Callable[[], object]) -> None:
        compare = streamrec.retraining.round.compare

        def acted(*arguments: Any) -> Report:
            monkeypatch.setattr(streamrec.retraining.round, "compare", compare)
            action()
            return compare(*arguments)

        monkeypatch.setattr(streamrec.retraining.round, "compare", acted)

    return during


def test_a_rollback_while_a_round_trains_is_not_undone_by_it_or_by_the_rounds_after_it(
    bench: Bench, meanwhile: Callable[..., None]
) -> None:
    first, second = bench.round().version, bench.round().version
    meanwhile(lambda: bench.command("rollback"))
    third = bench.round()
    assert (third.outcome, bench.champion) == ("overtaken", first)
    assert f"the champion {first} is on hold (rolled back by hand)" in third.reason
    stored = {version.version: version.metadata for version in bench.registry.versions()}
    assert stored[third.version]["refused"] == third.reason
    assert bench.round(new_clicks=False).outcome == bench.round().outcome == "overtaken"
    assert bench.champion == first != second


def test_the_clicks_of_a_rejected_model_alone_promote_nothing_once_the_hold_is_lifted(bench: Bench) -> None:
    first, second = bench.round().version, bench.round().version
    bench.command("rollback")
    bench.command("hold", "--off")
    again = bench.round(new_clicks=False)
    assert (again.outcome, bench.champion) == ("overtaken", first)
    assert f"it was trained on the clicks of {second}, which was rolled back" in again.reason
    assert bench.round().promoted, "new clicks may"


def test_a_rejected_version_that_is_trained_again_is_not_promoted_by_a_round(bench: Bench) -> None:
    """Equal weights are one version, whatever is known of its clicks."""
    first, second = bench.round().version, bench.round().version
    bench.command("rollback")
    bench.command("hold", "--off")
    bench.registry.store.remove(f"versions/{second}", first="manifest.json")
    assert bench.round(new_clicks=False).version == second
    assert bench.champion == first
    bench.command("promote", second)
    assert bench.champion == second, "a person may"


@pytest.mark.parametrize("action", ["another", "there and back", "older", "hold", "another worker"])
def test_a_champion_that_changed_while_a_round_trained_is_not_replaced(
    bench: Bench, meanwhile: Callable[..., None], action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = bench.round().version, bench.round().version
    other = publish(bench.registry, seed=1)
    actions: dict[str, Callable[[], object]] = {
        "another": lambda: bench.command("promote", other),
        "there and back": lambda: [bench.command(*c.split()) for c in (f"promote {other}", "rollback", "hold --off")],
        "older": lambda: bench.command("promote", first),
        "hold": lambda: bench.command("hold"),
        "another worker": bench.registry.claim,
    }
    expected = {"another": other, "older": first}.get(action, second)
    meanwhile(actions[action])
    bench.archive.import_events(circle(steps=10, start=30))
    assert main(["retrain", "--once", "--no-follow"]) == 0
    out = capsys.readouterr().out
    assert bench.champion == expected
    (line,) = [line for line in out.splitlines() if line.startswith("version ")]
    assert " not promoted: " in line
    assert "  challenger" in out and "ndcg@10" in out, "with its figures"
    assert bench.registry.claim() is not None


def test_a_promotion_is_compare_and_set_in_its_last_moment_too(place: Place) -> None:
    registry = Registry(place)
    a, b, c = (publish(registry, seed) for seed in (1, 2, 3))
    registry.promote(a, "first")
    claimed = registry.claim()
    see, overtaking = registry.store.seen, [lambda: Registry(place).promote(b, "by hand")]

    def seen_then_changed(name: str) -> Seen:
        found = see(name)
        if name == "champion.json" and overtaking:
            overtaking.pop()()
        return found

    registry.store.seen = seen_then_changed  # type: ignore[method-assign]
    with pytest.raises(Overtaken, match=f"judged against {a}, and meanwhile {b} has become champion"):
        registry.promote_challenger(c, "better", claimed)
    champion = registry.champion()
    assert champion is not None and champion.version == b


def test_of_two_first_rounds_one_promotes(place: Place) -> None:
    registry = Registry(place)
    a, b = (publish(registry, seed) for seed in (1, 2))
    claims = [registry.claim(), Registry(place).claim()]
    assert registry.promote_challenger(a, "first", claims[0]).version == a
    with pytest.raises(Overtaken, match=f"judged against no champion, and meanwhile {a} has become champion"):
        registry.promote_challenger(b, "first", claims[1])


async def test_a_worker_that_lost_the_lock_without_notice_promotes_nothing(
    bench: Bench, redis: RedisClient, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[..., None]
) -> None:
    """It was stopped for longer than the lock lives, and goes on before its next renewal. There is no champion yet."""
    monkeypatch.setattr("streamrec.retraining.lock.RENEW_EVERY_S", 3600)
    lock = Keys(bench.settings.redis.key_prefix).training
    bench.archive.import_events(circle(steps=10))
    worker = RetrainWorker(bench.settings, follow=False)

    async def another_takes_it() -> None:
        async with RedisClient(bench.settings.redis) as client:
            await client.set(lock, b"another", 60)

    meanwhile(lambda: asyncio.run(another_takes_it()))  # in the thread that trains
    verdict = await worker.once()
    assert (verdict.outcome, verdict.reason) == ("overtaken", "another worker has taken the lock over")
    assert bench.champion is None
    assert await redis.get_many([lock]) == [b"another"]


def test_a_hold_is_shown_and_lifted(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = publish(bench.registry, seed=1), publish(bench.registry, seed=2)
    assert bench.command("hold") == 1
    assert "has no champion to hold; promote a version first" in capsys.readouterr().err
    for version in (old, new):
        bench.command("promote", version)
    assert "on hold" not in (capsys.readouterr().err + listed(bench, capsys))
    assert bench.command("hold", "--reason", "Christmas sale") == 0
    assert "the champion is on hold since" in capsys.readouterr().err
    assert "(Christmas sale): no round of retraining promotes; to lift it: streamrec models hold --off" in listed(
        bench, capsys
    )
    bench.command("list", "--json")
    assert [json.loads(line)["hold"] for line in capsys.readouterr().out.splitlines()] == [None, "Christmas sale"]
    assert bench.command("hold", "--off") == 0
    assert "on hold" not in listed(bench, capsys)
    bench.command("promote", old)
    assert "(by hand): no round of retraining promotes" in listed(bench, capsys), "an older version comes back"
    main(["check"])
    assert "; on hold (by hand): no round promotes" in capsys.readouterr().out


def listed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `models list` prints; the table and the note both show a hold, or neither."""
    capsys.readouterr()
    bench.command("list")
    out, err = capsys.readouterr()
    assert ("\nchampion (on hold)  " in out) == ("the champion is on hold" in err)
    return out + err
