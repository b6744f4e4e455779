"""A round of retraining: what a model learns, on which clicks models are compared, and which one is promoted."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sasrec import Engine, Event, Interactions, ItemVocab, SASRec, SASRecConfig, SavedModel
from streamrec.archive.segments import EventArchive
from streamrec.commands.main import main
from streamrec.errors import RetrainError
from streamrec.local.daemon import environment
from streamrec.registry import Registry
from streamrec.retraining.gate import Figures, Report, compare, refusal
from streamrec.retraining.round import retrain
from streamrec.retraining.timeline import sessions, timeline
from streamrec.schemas import CLICK, ClickEvent, Role
from streamrec.settings import Settings

from support.redis_access import BASE_MS
from support.rounds import ITEMS, QUICK, circle
from support.sessions import is_begin

MakeSettings = Callable[..., Settings]


@pytest.fixture
def bench(tmp_path: Path, make_settings: MakeSettings) -> tuple[Settings, EventArchive, Registry]:
    settings = make_settings(archive_dir=tmp_path / "archive", registry_dir=tmp_path / "registry", **QUICK)
    return settings, EventArchive(tmp_path / "archive"), Registry(tmp_path / "registry")


Bench = tuple[Settings, EventArchive, Registry]


def test_the_first_model_that_beats_popularity_becomes_champion(bench: Bench) -> None:
    settings, archive, registry = bench
    archive.import_events(circle(steps=10))
    verdict = retrain(settings)
    assert verdict.promoted
    champion = registry.champion()
    assert champion is not None
    assert champion.version == verdict.version
    report = verdict.report
    assert report["cases"] == 30, "the newest tenth"
    assert report["challenger"]["ndcg@10"] > 0.7
    assert report["challenger"]["coverage@10"] == 1.0
    assert report["markov"]["ndcg@10"] == 1.0, "the next item always follows"
    assert report["popularity"]["ndcg@10"] < 0.6
    metadata = registry.versions()[0].metadata
    assert (metadata["parent"], metadata["refused"]) == (None, None)
    assert metadata["trained_until_ms"] < 1_000 * 270, "held-out clicks are not trained on"


@pytest.mark.parametrize("wrong_ms", [1_700_000_000_000_000, 1_700_000_000_000_000_000, 4_000_000_000_000])
def test_clicks_of_a_year_to_come_end_no_round(bench: Bench, caplog: pytest.LogCaptureFixture, wrong_ms: int) -> None:
    """They were imported before imports were checked, and a champion was trained on them."""
    settings, archive, registry = bench
    archive.import_events(circle(steps=10))
    archive.import_events([Event("ann", "i0", wrong_ms), Event("bob", "i1", wrong_ms + 1)])
    first = retrain(settings)
    (warning,) = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert warning.startswith(f"2 clicks in {archive.store} are skipped: timestamp_ms {wrong_ms}")
    assert "import it again with --timestamp-unit" in warning
    champion = registry.load(first.version)
    assert champion.metadata["trained_until_ms"] < 1_000 * 270
    with torch.no_grad():
        champion.model.final_norm.weight.mul_(1.01)  # equal weights would be the same version
    poisoned = registry.publish(champion.model, champion.vocab, {**champion.metadata, "trained_until_ms": wrong_ms})
    registry.promote(poisoned, "trained before the check")
    archive.import_events(circle(steps=2, start=10))
    assert retrain(settings).mode == "full"
    assert f"the champion {poisoned} is taken as trained on unknown clicks: trained_until_ms {wrong_ms}" in caplog.text


@pytest.mark.parametrize(("outcome", "first"), [(1.0, "viewed"), (0.05, "bought")])
def test_a_click_weighs_as_much_as_its_outcome_says(bench: Bench, outcome: float, first: str) -> None:
    """After "start" two of three clicks are views of one item; the others are purchases of another."""
    settings, archive, registry = bench
    events, rng = [], random.Random(0)
    for offset in range(1_200):
        user, step = offset % 40, offset // 40
        item = "start" if step % 2 == 0 else rng.choice(("viewed", "viewed", "bought"))
        role = Role(outcome=outcome) if item == "viewed" else CLICK
        events.append(ClickEvent(f"u{user}", item, BASE_MS + offset * 1000, 0, offset, BASE_MS, role=role))
    archive.append(0, 0, len(events), events)
    saved = registry.load(retrain(settings).version)
    (ranking,) = Engine(saved.model, saved.vocab).recommend([["viewed", "start"]], 3, filter_seen=False)
    assert ranking is not None
    assert next(item for item in ranking.items if item != "start") == first


def test_a_worse_model_remains_in_the_registry_with_its_report_and_the_reason(bench: Bench) -> None:
    settings, archive, registry = bench
    archive.import_events(circle(steps=10))
    first = retrain(settings)
    hopeless = settings.but(train_epochs=1, train_learning_rate=1e-5, retrain_mode="full")
    second = retrain(hopeless)
    assert not second.promoted
    assert "is no better than popularity's" in second.reason or "is below the champion's" in second.reason
    champion = registry.champion()
    assert champion is not None
    assert champion.version == first.version
    refused = {version.version: version.metadata for version in registry.versions()}[second.version]
    assert (refused["parent"], refused["refused"]) == (first.version, second.reason)
    assert refused["report"]["champion"]["ndcg@10"] == pytest.approx(first.report["challenger"]["ndcg@10"])
    assert 0 <= refused["report"]["overlap@10"] <= 1


def test_a_new_pattern_is_learned_and_the_new_model_is_promoted(bench: Bench) -> None:
    settings, archive, registry = bench
    archive.import_events(circle(steps=10))
    first = retrain(settings)
    backwards = [
        Event(f"v{user}", f"n{(user - step) % ITEMS}", 1_000_000 + 1_000 * (step * 40 + user))
        for step in range(12)
        for user in range(40)
    ]
    archive.import_events(backwards)
    second = retrain(settings)
    assert second.promoted
    assert second.report["champion"]["hr@10"] == 0.0, "the champion does not know the new items"
    assert second.report["challenger"]["ndcg@10"] > 0.7
    assert [version.version for version in registry.versions()] == [first.version, second.version]
    assert registry.rollback("for the test").version == first.version


def test_a_damaged_champion_does_not_prevent_a_good_model(bench: Bench) -> None:
    settings, archive, registry = bench
    archive.import_events(circle(steps=10))
    first = retrain(settings)
    (registry.place / "versions" / first.version / "model.safetensors").write_bytes(b"rust")
    second = retrain(settings)
    assert second.promoted
    assert "champion" not in second.report


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "the archive is empty"),
        ([Event("ann", "a", 1)], "1 events are too few"),
        ([Event(f"u{n}", f"i{n}", n) for n in range(40)], "nothing to learn a next item from"),
    ],
)
def test_too_few_clicks_to_train_on_are_an_error(bench: Bench, events: list[Event], message: str) -> None:
    settings, archive, registry = bench
    archive.import_events(events)
    with pytest.raises(RetrainError, match=message):
        retrain(settings)
    assert registry.versions() == []


def figures(ndcg: float) -> Figures:
    return {"hr@10": 0.5, "ndcg@10": ndcg, "mrr@10": 0.5}


def report_of(challenger: float, popularity: float = 0.1, champion: float | None = None) -> Report:
    report: Report = {
        "cases": 9,
        "challenger": figures(challenger),
        "popularity": figures(popularity),
        "markov": figures(0.5),
    }
    if champion is not None:
        report["champion"] = figures(champion)
    return report


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (report_of(0.2), None),
        (report_of(0.1), "is no better than popularity's 0.1000"),
        (report_of(math.nan), "its scores are NaN or infinite"),
        (report_of(0.2, champion=0.2), None),
        (report_of(0.197, champion=0.2), None),
        (report_of(0.195, champion=0.2), "NDCG@10 0.1950 is below the champion's 0.2000 by more than 2%"),
    ],
)
def test_the_gate_refuses_a_model_with_a_reason(report: Report, reason: str | None) -> None:
    found = refusal(report, tolerance=0.02)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_model_with_nan_weights_is_measured_and_refused() -> None:
    events = Interactions.from_events(circle(steps=6))
    vocab = ItemVocab.from_items(events.item_ids)
    model = SASRec(SASRecConfig(len(vocab), 8, 16, 1))
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    report = compare(SavedModel(model, vocab, {}, "broken"), None, events, 30, filter_seen=False)
    assert refusal(report, 0.02) == "its scores are NaN or infinite"


@given(
    st.lists(
        st.tuples(st.sampled_from(["ann", "bob", "cid"]), st.sampled_from([0, 1, 2, 3, 9, 20, 10**15])), min_size=1
    ),
    st.sampled_from([0, 1, 5, 10]),
)
def test_sessions_begin_where_the_daemon_begins_them(clicks: list[tuple[str, int]], gap_ms: int) -> None:
    users, times = zip(*clicks, strict=True)
    arrived = Interactions([*users], [str(n) for n in range(len(users))], np.array(times, np.int64))
    found = sessions(arrived, gap_ms)
    assert found.item_ids == arrived.item_ids
    for user in set(users):
        places = [at for at, name in enumerate(users) if name == user]
        own = [times[at] for at in places]
        for at in range(1, len(places)):
            same = found.user_ids[places[at]] == found.user_ids[places[at - 1]]
            assert same != is_begin(own, at, gap_ms)
    if gap_ms:
        names = dict(zip(found.user_ids, users, strict=True))
        assert len({*zip(found.user_ids, users, strict=True)}) == len(names), "users do not share sessions"


def test_a_late_click_comes_after_the_click_that_the_daemon_applied_before_it() -> None:
    arrived = Interactions(
        ["ann", "bob", "ann", "ann", "bob"], ["a", "b", "late", "c", "d"], np.array([10, 20, 5, 15, 12], np.int64)
    )
    found = timeline(arrived)
    assert found.timestamps_ms.tolist() == [10, 5, 15, 20, 12]
    assert [item for user, item in zip(found.user_ids, found.item_ids, strict=True) if user == "ann"] == [
        "a",
        "late",
        "c",
    ]
    assert [item for user, item in zip(found.user_ids, found.item_ids, strict=True) if user == "bob"] == ["b", "d"]


def test_the_command_trains_promotes_and_reports(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, archive, registry = bench
    archive.import_events(circle(steps=10))
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    assert main(["retrain", "--once", "--no-follow"]) == 0
    out = capsys.readouterr().out.splitlines()
    champion = registry.champion()
    assert champion is not None
    assert out[0] == f"version {champion.version} promoted: it passed the gate"
    assert [line.split()[0] for line in out[1:]] == ["challenger", "popularity", "markov"]
    assert "ndcg@10 1.0000" in out[3], "the next item always follows"
    assert main(["retrain", "--once", "--no-follow", "--retrain-mode", "full", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["champion"]["ndcg@10"] == report["challenger"]["ndcg@10"] > 0.7
    monkeypatch.delenv("STREAMREC_ARCHIVE_DIR")
    assert main(["retrain", "--once"]) == 1
    assert capsys.readouterr().err == "streamrec: no archive: set STREAMREC_ARCHIVE_DIR or --archive-dir\n"
