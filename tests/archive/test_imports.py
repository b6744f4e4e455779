"""Imported files are listed and removed, whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sasrec import Event
from streamrec.archive.imports import list_imports, remove_import
from streamrec.archive.segments import EventArchive
from streamrec.commands.main import main
from streamrec.errors import ArchiveError
from streamrec.storage import Place

from support.archives import click
from support.import_changer import NEW, OLD
from support.killed_at_step import killed_at_each_step
from support.places import below


def rows(archive: EventArchive) -> list[tuple[str, str, int]]:
    found = archive.read()
    return sorted(zip(found.user_ids, found.item_ids, found.timestamps_ms.tolist(), strict=True))


def events(*imported: list[Event]) -> list[tuple[str, str, int]]:
    return sorted((e.user_id, e.item_id, e.timestamp_ms or 0) for one in imported for e in one)


def test_imports_are_listed_and_removed_by_id(place: Place) -> None:
    archive = EventArchive(place)
    assert list_imports(archive.store) == []
    archive.append(0, 0, 1, [click(0, 0)])
    archive.import_events(OLD, "old.csv")
    archive.import_events(NEW)
    old, new = sorted(list_imports(archive.store), key=lambda one: one.events, reverse=True)
    assert (old.source, old.events, old.first_ts_ms, old.last_ts_ms) == ("old.csv", 2, 3, 5)
    assert (new.source, new.events, new.first_ts_ms, new.last_ts_ms) == ("", 1, 9, 9)
    assert old.bytes > 0 and old.imported_s > 0
    for wrong in ("", "none", "-"):
        with pytest.raises(
            ArchiveError, match=rf"no import has the id '{wrong}' in .*; `streamrec archive imports` li"
        ):
            remove_import(archive.store, wrong)
    assert remove_import(archive.store, old.id.upper()) == old
    assert list_imports(archive.store) == [new]
    kept = click(0, 0)
    assert rows(archive) == sorted([*events(NEW), (kept.user_id, kept.item_id, kept.timestamp_ms)])
    assert archive.import_events(OLD) == 2, "it may be imported again"


def test_an_id_of_several_imports_removes_none(place: Place) -> None:
    archive = EventArchive(place)
    for n in range(17):  # two of them begin with the same digit
        archive.import_events([Event("u", str(n), 1)])
    first = next(c for c in "0123456789abcdef" if sum(one.id[0] == c for one in list_imports(archive.store)) > 1)
    with pytest.raises(ArchiveError, match=f"several imports have the id '{first}'"):
        remove_import(archive.store, first)
    assert len(list_imports(archive.store)) == 17


def test_a_file_that_was_imported_by_an_earlier_version_is_known(place: Place) -> None:
    """The name of an import is a hash of a text that must not change."""
    archive = EventArchive(place)
    archive.import_events([Event("ann", "a'b", 5, None, "view"), Event("bob", "b", 3)])
    assert [file.name for file in archive.store.files("imported")] == [
        "imported/33a53728de639e0beab3b838bdbda83e908d3e4e0084e3894b5a59469dcf8a29.parquet"
    ]


def test_an_import_and_a_removal_that_are_killed_at_any_step_are_whole_or_undone(
    place: Place, request: pytest.FixtureRequest
) -> None:
    numbers = itertools.count()
    server = request.getfixturevalue("s3") if isinstance(place, str) else None

    def new_place() -> Place:
        at = below(place, str(next(numbers)))
        EventArchive(at).import_events(OLD, "old.csv")
        return at

    states = set()
    for at, killed in killed_at_each_step(
        new_place, server, "support.import_changer", lambda place: [str(place)], os.environ
    ):
        archive = EventArchive(at)
        found = {one.source for one in list_imports(archive.store)}
        states.add(frozenset(found))
        assert rows(archive) == events(*([OLD] if "old.csv" in found else []), *([NEW] if "new.csv" in found else []))
        assert killed or found == {"new.csv"}
    assert states == {frozenset({"old.csv"}), frozenset({"old.csv", "new.csv"}), frozenset({"new.csv"})}


# --- the command


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `streamrec archive ...`; return status, stdout and stderr."""
    monkeypatch.setenv("STREAMREC_ARCHIVE_DIR", str(tmp_path / "archive"))

    def run_command(*arguments: str) -> tuple[int, str, str]:
        status = main(["archive", *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


CLICKS = "user_id,item_id,timestamp,event_type\nann,a,1700000000000,view\nbob,b,1700000001000,buy\n"


def test_the_command_lists_and_removes_an_import(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text(CLICKS)
    run("import", str(path))
    status, out, err = run("imports")
    times = "2023-11-14 22:13:20 UTC to 2023-11-14 22:13:21 UTC"
    line = re.fullmatch(rf"([0-9a-f]{{12}})  [\d-]+ [\d:]+ UTC  2 events from {times}  {re.escape(str(path))}\n", out)
    assert line and (status, err) == (0, "")
    assert json.loads(run("imports", "--json")[1])["events"] == 2
    assert run("remove", "x") == (
        1,
        "",
        f"streamrec: no import has the id 'x' in {tmp_path}/archive; `streamrec archive imports` lists them\n",
    )
    assert run("remove", line[1][:6]) == (0, f"{line[1]} removed: 2 events of {path}\n", "")
    assert run("imports") == (0, "", "")
    assert run("stats")[1].startswith("0 events")


def test_events_that_the_daemon_ignores_are_not_imported(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text(CLICKS)
    monkeypatch.setenv("STREAMREC_EVENTS_ROLES", "buy=click,like=click")
    assert run("import", str(path))[1] == f"1 events of {path} imported\n"
    path.write_text(CLICKS.replace("event_type", "kind"))
    assert run("import", str(path), "--event-type-column", "kind")[1] == f"{path} was imported before\n"


def test_imported_events_have_the_roles_and_outcomes_of_their_types(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text(f"{CLICKS}cid,c,1700000002000,scroll\ndan,d,1700000003000,hate\n")
    monkeypatch.setenv("STREAMREC_EVENTS_ROLES", "buy=click+exclude,hate=exclude,scroll=ignore,*=click")
    monkeypatch.setenv("STREAMREC_EVENTS_OUTCOMES", "view=0.25")
    assert run("import", str(path))[1] == f"3 events of {path} imported\n"
    ((_, table),) = EventArchive(tmp_path / "archive").tables()
    assert table.select(["user_id", "click", "exclude", "outcome"]).to_pylist() == [
        {"user_id": "ann", "click": True, "exclude": False, "outcome": 0.25},
        {"user_id": "bob", "click": True, "exclude": True, "outcome": 1.0},
        {"user_id": "dan", "click": False, "exclude": True, "outcome": 1.0},
    ]


BAD = {
    "seconds": ("1700000000", "timestamp 1700000000 looks like seconds"),
    "a date": ("never", "timestamp 'never' is neither"),
    "the future": ("2999-01-01T00:00:00Z", "is after 20"),
}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("time", "says"), BAD.values(), ids=BAD)
def test_a_file_with_one_bad_time_leaves_the_archive_as_it_was(
    run: Callable[..., Any], tmp_path: Path, suffix: str, time: str, says: str
) -> None:
    import pandas as pd

    frame = pd.DataFrame({"user_id": ["u"] * 40_000, "item_id": "i", "timestamp": "1700000000000"})
    frame.loc[39_999, "timestamp"] = time
    path = tmp_path / f"clicks{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    status, out, err = run("import", str(path))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert says in err and err.endswith("(nothing was imported)\n")
    assert not (tmp_path / "archive").exists() or not list((tmp_path / "archive").rglob("*.parquet"))
