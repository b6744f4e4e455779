"""Versions and champion of a registry after each step, after crashes, and with several writers."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sasrec import ItemVocab, SASRec, SASRecConfig, save_model
from streamrec.bucket import Seen
from streamrec.commands.main import main
from streamrec.errors import NoChampion, RegistryError, StreamrecError
from streamrec.registry import Registry
from streamrec.serving.model import read_model
from streamrec.settings import Settings
from streamrec.settings_sources import load_settings
from streamrec.storage import Place

from support.killed_at_step import killed_at_each_step
from support.places import below
from support.registry import damage

MakeSettings = Callable[..., Settings]
VOCAB = ItemVocab([f"i{n}" for n in range(10)])


def model(seed: int) -> SASRec:
    torch.manual_seed(seed)
    return SASRec(SASRecConfig(num_items=10, max_len=4, hidden_units=8, num_blocks=1))


def version_of(model: SASRec) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return save_model(Path(folder) / "model", model, VOCAB)


def filled(place: Place, count: int) -> tuple[Registry, list[str]]:
    """Return a registry with this number of versions, made a second apart, and their names."""
    registry = Registry(place)
    names = [
        registry.publish(
            model(n), VOCAB, {"created_at": f"2026-01-01T00:00:{n:02}+00:00", "validation": {"hr@10": n / 10}}
        )
        for n in range(count)
    ]
    return registry, names


def test_an_empty_registry_has_no_versions_and_no_champion(place: Place) -> None:
    registry = Registry(place)
    assert registry.versions() == []
    assert registry.champion() is None
    with pytest.raises(RegistryError, match=r"there is no registry at .*; publish a model to create one"):
        registry.rollback("why not")


def test_a_published_version_is_listed_and_loaded_and_not_promoted(place: Place) -> None:
    registry, names = filled(place, 3)
    assert [version.version for version in registry.versions()] == names
    assert [version.metadata["validation"]["hr@10"] for version in registry.versions()] == [0.0, 0.1, 0.2]
    assert registry.champion() is None
    loaded = registry.load(names[1])
    assert loaded.version == names[1]
    assert torch.equal(loaded.model.item_embedding.weight, model(1).item_embedding.weight)
    assert registry.publish(model(1), VOCAB) == names[1], "equal weights are one version"
    assert len(registry.versions()) == 3
    with pytest.raises(RegistryError, match="has no version 'nothing'"):
        registry.load("nothing")


def test_promoting_and_rolling_back_move_the_alias(place: Place) -> None:
    registry, (a, b, c) = filled(place, 3)
    for version in (a, b, c):
        assert registry.promote(version, f"{version} is better").version == version
    champion = registry.champion()
    assert champion is not None
    assert (champion.version, champion.before, champion.reason) == (c, (a, b), f"{c} is better")
    assert abs(champion.since_ts_ms - time.time() * 1000) < 60_000
    assert registry.promote(c, "again") == champion, "nothing changes"
    assert registry.rollback("c is worse").version == b
    assert registry.rollback("b is worse").version == a
    with pytest.raises(RegistryError, match="no earlier champion"):
        registry.rollback("a is worse")
    champion = registry.champion()
    assert champion is not None
    assert champion.version == a


def test_a_damaged_version_is_listed_with_its_problem_and_never_promoted(place: Place) -> None:
    registry, (a, b) = filled(place, 2)
    registry.promote(a, "first")
    damage(registry, b)
    with pytest.raises(RegistryError, match=r"model\.safetensors is damaged"):
        registry.promote(b, "looks good")
    registry.store.write(f"versions/{b}/metadata.json", b"{}")
    assert "metadata.json is damaged" in str({v.version: v.problem for v in registry.versions()}[b])
    champion = registry.champion()
    assert champion is not None
    assert champion.version == a


def test_publishing_equal_weights_repairs_a_damaged_version(place: Place) -> None:
    registry, (a,) = filled(place, 1)
    registry.store.write(f"versions/{a}/model.safetensors", b"rust")
    assert registry.publish(model(0), VOCAB) == a
    assert registry.load(a).version == a


def test_a_damaged_alias_is_reported_and_repaired_by_promoting(place: Place) -> None:
    registry, (a,) = filled(place, 1)
    registry.promote(a, "first")
    registry.store.write("champion.json", b"{")
    with pytest.raises(RegistryError, match=r"champion\.json cannot be read: .*; promote a version again"):
        registry.champion()
    registry.promote(a, "repaired")
    champion = registry.champion()
    assert champion is not None
    assert (champion.version, champion.before) == (a, ())


def test_pruning_keeps_the_newest_versions_the_champion_and_the_previous_one(place: Place) -> None:
    registry, names = filled(place, 8)
    for version in (names[0], names[1], names[2]):
        registry.promote(version, "in turn")
    assert registry.prune(keep=2) == [names[0], *names[3:6]]
    assert [version.version for version in registry.versions()] == [names[1], names[2], *names[6:]]
    assert registry.rollback("still there").version == names[1]
    assert registry.prune(keep=10) == []
    with pytest.raises(ValueError, match="keep=0"):
        registry.prune(keep=0)


def test_leftovers_of_a_crashed_publisher_are_not_listed_and_are_removed_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, (a,) = filled(place, 1)
    for name in ("model.safetensors", "config.json"):
        registry.store.write(f"versions/half/{name}", b"half")
    before = {file.name for file in registry.store.files()}
    assert [version.version for version in registry.versions()] == [a]
    with pytest.raises(RegistryError, match="has no version 'half'"):
        registry.load("half")
    registry.prune(keep=1)
    assert {file.name for file in registry.store.files()} == before, "a publisher may be writing it"
    monkeypatch.setattr("streamrec.registry.ABANDONED_AFTER_S", -5.0)
    assert registry.prune(keep=1) == []
    assert {file.name for file in registry.store.files() if "half" in file.name} == set()
    assert registry.load(a).version == a


def test_a_file_that_a_killed_process_left_unfinished_is_removed_later(tmp_path: Path) -> None:
    registry, (a,) = filled(tmp_path, 1)
    unfinished = [
        tmp_path / name / f".model.safetensors.{uuid.uuid4().hex}" for name in ("versions/fresh", "versions/old", "")
    ]
    for path in unfinished:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    mine = tmp_path / ".gitignore"
    mine.touch()
    for path in (*unfinished[1:], unfinished[1].parent, mine):
        os.utime(path, (0, 0))
    registry.prune(keep=1)
    assert [path.exists() for path in unfinished] == [True, False, False]
    assert not (tmp_path / "versions" / "old").exists()
    assert mine.exists()
    assert [version.version for version in registry.versions()] == [a]


def test_a_promotion_that_another_one_overtakes_begins_again(place: Place) -> None:
    registry, (a, b, c) = filled(place, 3)
    registry.promote(a, "first")
    see, overtaking = registry.store.seen, [lambda: Registry(place).promote(b, "by another one")]

    def seen_then_changed(name: str) -> Seen:
        found = see(name)
        if name == "champion.json" and overtaking:
            overtaking.pop()()
        return found

    registry.store.seen = seen_then_changed  # type: ignore[method-assign]
    registry.promote(c, "better")
    champion = registry.champion()
    assert champion is not None
    assert not overtaking
    assert (champion.version, champion.before) == (c, (a, b))


def _promote_in_turn(place: Place, names: list[str], times: int) -> None:
    for n in range(times):
        Registry(place).promote(names[n % len(names)], "racing")


def test_writers_in_several_processes_lose_no_promotion_of_each_other(place: Place) -> None:
    registry, names = filled(place, 4)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_promote_in_turn, args=(registry.place, names[2 * n : 2 * n + 2], 10)) for n in range(2)
    ]
    for worker in workers:
        worker.start()
    seen = set()
    while any(worker.is_alive() for worker in workers):
        champion = registry.champion()  # never half written
        seen.add(champion and champion.version)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    champion = registry.champion()
    assert champion is not None
    # each of a process's ten promotions counts: it never promotes the current champion again
    assert len(champion.before) == 19
    assert seen - {None} <= set(names)


def test_a_shadow_is_verified_stored_and_removed(place: Place) -> None:
    registry, names = filled(place, 5)
    assert registry.shadow() is None
    registry.promote(names[4], "first")
    with pytest.raises(RegistryError, match=f"{names[4]} is the champion: the shadow must be another version"):
        registry.set_shadow(names[4])
    with pytest.raises(RegistryError, match="has no version 'nothing'"):
        registry.set_shadow("nothing")
    damage(registry, names[1])
    with pytest.raises(RegistryError, match=r"model\.safetensors is damaged"):
        registry.set_shadow(names[1])
    assert registry.shadow() is None
    for version in (names[2], names[0]):
        assert registry.set_shadow(version).version == version
    shadow = registry.shadow()
    assert shadow is not None
    assert shadow.version == names[0]
    assert abs(shadow.since_ts_ms - time.time() * 1000) < 60_000
    assert registry.prune(keep=1) == names[1:4]
    registry.end_shadow()
    registry.end_shadow()
    assert registry.shadow() is None
    assert registry.prune(keep=1) == [names[0]]


def test_a_shadow_that_becomes_champion_is_no_longer_the_shadow(place: Place) -> None:
    registry, (a, b, c) = filled(place, 3)
    for version in (a, b):
        registry.promote(version, "in turn")
    registry.set_shadow(a)
    registry.promote(c, "better")
    assert registry.shadow() is not None, "another version has become champion"
    registry.set_shadow(b)
    registry.rollback("c is worse")
    assert registry.shadow() is None


def test_a_damaged_shadow_alias_is_reported_and_blocks_no_other_change(place: Place) -> None:
    registry, (a, b) = filled(place, 2)
    registry.promote(a, "first")
    registry.store.write("shadow.json", b"{")
    with pytest.raises(RegistryError, match=r"shadow\.json cannot be read: .*; set a shadow again to replace it"):
        registry.shadow()
    registry.promote(b, "better")
    assert registry.prune(keep=5) == []
    assert registry.set_shadow(a) == registry.shadow()


@pytest.mark.parametrize("damaged", [False, True], ids=["new", "repaired"])
def test_a_publisher_that_is_killed_at_any_step_leaves_whole_versions_and_one_champion(
    place: Place, request: pytest.FixtureRequest, tmp_path: Path, damaged: bool
) -> None:
    numbers, old, new = itertools.count(), version_of(model(0)), save_model(tmp_path / "model", model(1), VOCAB)

    def new_place() -> Place:
        registry, names = filled(below(place, str(next(numbers))), 1 + damaged)
        registry.promote(names[0], "first")
        if damaged:
            damage(registry, names[1])
        return registry.place

    def arguments(place: Place) -> list[str]:
        where = ["--registry-dir", str(place), "--redis-url", "redis://127.0.0.1:1/0"]
        return ["models", "publish", str(tmp_path / "model"), "--promote", *where]

    server = request.getfixturevalue("s3") if isinstance(place, str) else None
    outcomes = set()
    for at, killed in killed_at_each_step(new_place, server, "streamrec.__main__", arguments, os.environ):
        registry = Registry(at)
        champion = registry.champion()
        assert champion is not None
        promoted = len(champion.before)
        assert champion.version == (new if promoted else old)
        assert registry.load(champion.version).version == champion.version
        known = {version.version: version.problem for version in registry.versions()}
        assert set(known.values()) == {None}, "damaged weights do not show in the metadata"
        if promoted:
            assert known.keys() == {old, new}
        assert registry.promote(registry.publish(model(1), VOCAB), "by another one").version == new
        outcomes.add((killed, promoted, new in known))
    assert outcomes >= {(True, 0, damaged), (True, 0, True), (True, 1, True), (False, 1, True)}


# --- serving and commands


def test_the_champion_is_served(place: Place, tmp_path: Path, make_settings: MakeSettings) -> None:
    registry, (a, b) = filled(place, 2)
    settings = make_settings(registry_dir=registry.place)
    with pytest.raises(NoChampion, match="has no champion; make one with: streamrec models publish DIR --promote"):
        read_model(settings)
    registry.promote(b, "better")
    assert read_model(settings).version == b
    registry.promote(a, "better still")
    assert read_model(settings).version == a
    with pytest.raises(StreamrecError, match="model_dir and registry_dir are both set"):
        load_settings(flags={"model_dir": tmp_path, "registry_dir": tmp_path})


@pytest.fixture
def run(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `streamrec models ...`; return status, lines of stdout, and stderr."""
    monkeypatch.setenv("STREAMREC_REGISTRY_DIR", str(place))

    def run_command(*arguments: str) -> tuple[int, list[str], str]:
        status = main(["models", *arguments])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run_command


def test_a_model_directory_is_published_promoted_listed_shown_and_rolled_back(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    names = []
    for seed in (1, 2):
        save_model(tmp_path / "m", model(seed), VOCAB, {"validation": {"hr@10": seed / 10, "ndcg@10": 0.05}})
        status, lines, _ = run("publish", str(tmp_path / "m"), "--promote")
        assert status == 0
        names.append(lines[1].removeprefix("champion: "))
    status, lines, _ = run("list")
    assert [line.split()[0] for line in lines] == ["version", names[0], "champion"]
    assert "validation  0.2000  0.0500" in lines[2]
    assert [json.loads(line)["champion"] for line in run("list", "--json")[1]] == [False, True]
    shown = json.loads("\n".join(run("show", names[0][:6])[1]))
    assert (shown["version"], shown["validation"]["hr@10"]) == (names[0], 0.1)
    assert "validation.hr@10: 0.1 -> 0.2" in run("diff", *names)[1]
    assert run("rollback")[1] == [f"champion: {names[0]}"]
    assert run("promote", names[1], "--reason", "after all")[1] == [f"champion: {names[1]}"]
    assert run("shadow", names[0][:6])[1] == [f"shadow: {names[0]}"]
    assert [line.split()[0] for line in run("list")[1]] == ["version", "shadow", "champion"]
    assert [json.loads(line)["shadow"] for line in run("list", "--json")[1]] == [True, False]
    assert run("shadow", "--off")[1] == ["no shadow"]
    assert run("prune", "--keep", "1")[1] == ["2 versions are left"], "the previous champion is not removed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "zzz"], "'zzz' is no version of"),
        (["promote", "zzz"], "'zzz' is no version of"),
        (["publish", "/no/such/model"], "there is no model directory at /no/such/model"),
        (["shadow"], "name a version, or give --off"),
        (["shadow", "zzz", "--off"], "name a version, or give --off"),
        (["shadow", "zzz"], "'zzz' is no version of"),
        (["shadow", "--off"], "publish a model to create one"),
        (["rollback"], "publish a model to create one"),
        (["prune"], "publish a model to create one"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else None,
)
def test_a_mistake_is_reported_in_one_clear_line(run: Callable[..., Any], arguments: list[str], message: str) -> None:
    status, lines, err = run(*arguments)
    assert (status, lines) == (1, [])
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_registry_setting_is_named(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMREC_REGISTRY_DIR")
    assert run("list") == (1, [], "streamrec: no registry: set STREAMREC_REGISTRY_DIR or --registry-dir\n")


# --- order


def of_before(registry: Registry, seed: int, created_at: str) -> str:
    """Add a version as a streamrec did that gave versions no number."""
    with tempfile.TemporaryDirectory() as folder:
        version = save_model(Path(folder) / "model", model(seed), VOCAB, {"created_at": created_at})
        for file in (Path(folder) / "model").iterdir():
            registry.store.write(f"versions/{version}/{file.name}", file.read_bytes())
    return version


def test_versions_are_ordered_by_their_number_and_not_by_a_clock(place: Place) -> None:
    registry = Registry(place)
    names = [
        registry.publish(model(seed), VOCAB, {"created_at": f"{year}-01-01T00:00:00+00:00"})
        for seed, year in enumerate((2031, 1970, 2026))
    ]
    assert [version.version for version in registry.versions()] == names
    again = registry.load(names[0])
    with tempfile.TemporaryDirectory() as folder:  # a copy by hand has the number of its first publication
        save_model(Path(folder) / "model", model(3), VOCAB, again.metadata)
        assert main(["models", "publish", str(Path(folder) / "model"), "--registry-dir", str(place)]) == 0
    assert [version.metadata["number"] for version in registry.versions()] == [1, 2, 3, 4]
    assert registry.prune(keep=1) == names


def test_versions_without_a_number_come_first_by_their_time(place: Place) -> None:
    registry = Registry(place)
    first = registry.publish(model(0), VOCAB)
    old = [of_before(registry, seed, f"20{year}-01-01T00:00:00+00:00") for seed, year in ((1, 31), (2, 25))]
    last = registry.publish(model(3), VOCAB)
    assert [version.version for version in registry.versions()] == [*reversed(old), first, last]
    assert registry.prune(keep=2) == list(reversed(old))


def test_what_a_publisher_writes_now_is_not_swept_when_the_clock_is_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, (a,) = filled(tmp_path, 1)
    registry.store.write("versions/half/config.json", b"half")
    unfinished = tmp_path / "versions" / a / f".model.safetensors.{uuid.uuid4().hex}"
    unfinished.write_bytes(b"half")
    monkeypatch.setattr(time, "time", lambda: 1_925_000_000.0)  # 2031
    registry.prune(keep=1)
    assert unfinished.exists()
    assert registry.store.read("versions/half/config.json") == b"half"


def test_a_file_beside_the_versions_prevents_no_pruning(tmp_path: Path) -> None:
    registry, names = filled(tmp_path, 3)
    stray = tmp_path / "versions" / "README"
    stray.write_text("mine")
    os.utime(stray, (0, 0))
    assert registry.prune(keep=1) == names[:2]
    assert stray.exists()
