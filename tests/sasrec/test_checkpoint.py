"""Model directories: save = load, every damage is detected and named, a replacement is all or nothing."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sasrec
from sasrec.checkpoint import FILES, MANIFEST, ModelDirectoryError, load_model, save_model
from sasrec.data.vocab import ItemVocab
from sasrec.inference.engine import Engine
from sasrec.model import SASRec, SASRecConfig

from support.file_systems import LIMITED, LIMITED_IDS, FileSystem, without_flush, without_flush_of_folders

ALL_FILES = (*FILES, MANIFEST)
IDS = ["plain", "with,comma", 'quo"te', "new\nline\r", "é日\u2028", ""]
COUNTS = [3, 1, 4, 1, 5, 9]


def make_model(seed: int = 0, **shape: Any) -> SASRec:
    shape = {"num_items": 6, "max_len": 4, "hidden_units": 4, "num_blocks": 1} | shape
    model = SASRec(SASRecConfig(**shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.5, generator=generator)
    return model


def make_vocab() -> ItemVocab:
    return ItemVocab(IDS, COUNTS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_model(path, make_model(), make_vocab(), {"epochs": 3})
    return path


def sign_again(path: Path) -> None:
    """Make the hashes fit changed files, as a careless or hostile person would."""
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}
    version = hashlib.sha256("".join(hashes[name] for name in FILES[:3]).encode()).hexdigest()[:12]
    manifest = {"format": 1, "version": version, "sha256": hashes}
    (path / MANIFEST).write_text(json.dumps(manifest))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(path: Path, *words: str) -> None:
    with pytest.raises(ModelDirectoryError) as raised:
        load_model(path)
    message = str(raised.value)
    for word in (str(path), *words):
        assert word in message
    assert "\n" not in message, "one line"


# --- save = load


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(1, 1), (3, 2)])
def test_a_loaded_model_equals_the_saved_one_bit_for_bit(
    tmp_path: Path, position: str, num_blocks: int, num_heads: int
) -> None:
    model = make_model(position=position, num_blocks=num_blocks, num_heads=num_heads, dropout_rate=0.4)
    version = save_model(tmp_path / "model", model, make_vocab(), {"note": "ü", "ndcg": 0.25})
    loaded = load_model(tmp_path / "model")
    items = torch.tensor([[1, 2, 3, 4], [6, 5, 0, 0]])
    assert torch.equal(loaded.model(items), model(items))
    assert loaded.model.config == model.config
    assert not loaded.model.training
    assert (loaded.vocab.ids, loaded.vocab.counts.tolist()) == (tuple(IDS), COUNTS)
    assert loaded.version == version
    assert loaded.metadata.items() >= {"note": "ü", "ndcg": 0.25}.items()
    sequences = [["plain", ""], ["new\nline\r"]]
    assert Engine(loaded.model, loaded.vocab).recommend(sequences) == Engine(model, make_vocab()).recommend(sequences)


def test_a_path_may_be_text_and_its_folders_are_created(tmp_path: Path) -> None:
    path = f"{tmp_path}/one/two/model"
    version = save_model(path, make_model(), make_vocab())
    assert load_model(path).version == load_model(Path(path)).version == version


def test_the_version_depends_on_the_content_only(tmp_path: Path) -> None:
    def version(name: str, model: SASRec, vocab: ItemVocab, metadata: dict[str, Any] | None = None) -> str:
        return save_model(tmp_path / name, model, vocab, metadata)

    one = version("one", make_model(), make_vocab())
    assert re.fullmatch("[0-9a-f]{12}", one)
    assert version("elsewhere", make_model(), make_vocab(), {"made": "later"}) == one
    others = [
        version("weights", make_model(seed=1), make_vocab()),
        version("shape", make_model(dropout_rate=0.5), make_vocab()),
        version("order", make_model(), ItemVocab(IDS[::-1], COUNTS)),
        version("counts", make_model(), ItemVocab(IDS, COUNTS[::-1])),
    ]
    assert len({one, *others}) == 5


def test_no_temporary_files_remain_and_all_files_are_signed(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in saved.iterdir()) == sorted(ALL_FILES)
    assert sorted(json.loads((saved / MANIFEST).read_text())["sha256"]) == sorted(FILES)


# --- damage


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(ALL_FILES), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_one_changed_byte_anywhere_is_detected(saved: Path, name: str, where: float, flip: int) -> None:
    good = (saved / name).read_bytes()
    at = int(where * len(good))
    bad = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
    (saved / name).write_bytes(bad)
    try:
        if name == MANIFEST and _same_json(good, bad):
            load_model(saved)  # only white space changed
        else:
            refuses(saved, name)
    finally:
        (saved / name).write_bytes(good)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_every_single_bit_of_the_manifest_matters(saved: Path) -> None:
    good = (saved / MANIFEST).read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            bad = good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :]
            if not _same_json(good, bad):
                (saved / MANIFEST).write_bytes(bad)
                with pytest.raises(ModelDirectoryError):
                    load_model(saved)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_file_cut_short_lengthened_or_missing_is_detected(saved: Path, name: str) -> None:
    good = (saved / name).read_bytes()
    for bad in (good[: len(good) // 2], good[:1], b"", good + b"x"):
        (saved / name).write_bytes(bad)
        refuses(saved, name)
    (saved / name).unlink()
    refuses(saved, name)
    (saved / name).mkdir()
    refuses(saved, name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not JSON", ["is damaged", MANIFEST]),
        ("[]", ["a JSON object is expected", MANIFEST]),
        ("{}", ["model format None, but this version reads 1; upgrade, or train it again"]),
        ('{"format": 2}', ["model format 2, but this version reads 1; upgrade, or train it again"]),
        ('{"format": 1}', ["must name a version and the hashes", MANIFEST]),
        ('{"format": 1, "version": "x", "sha256": {}}', ["must name a version and the hashes", MANIFEST]),
        ('{"format": 1, "version": "x", "sha256": []}', ["must name a version and the hashes", MANIFEST]),
        ("[" * 100_000, ["is damaged", MANIFEST]),
    ],
)
def test_an_invalid_manifest_is_refused(saved: Path, content: str, words: list[str]) -> None:
    (saved / MANIFEST).write_text(content)
    refuses(saved, *words)


def test_a_missing_directory_a_file_and_another_directory_are_named(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "there is no model directory at", "sasrec train FILE --out")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "there is no model directory at")
    (tmp_path / "foreign").mkdir()
    refuses(tmp_path / "foreign", "is not a model directory: it has no manifest.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": IDS[1:], "counts": COUNTS[1:]}, ["the vocabulary has 5 items but config.json 6"]),
        ({"ids": [*IDS, "more"], "counts": [*COUNTS, 1]}, ["the vocabulary has 7 items but config.json 6"]),
        ({"ids": ["same"] * 6}, ["'same' occurs more than once"]),
        ({"counts": COUNTS[1:]}, ["6 item ids but counts of shape (5,)"]),
        ({"counts": ["many"] * 6}, ["does not hold a model"]),
        ({"counts": [1e999] * 6}, ["does not hold a model"]),
        ({"ids": 6}, ["does not hold a model"]),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_even_when_signed(
    saved: Path, changes: dict[str, Any], words: list[str]
) -> None:
    change_json(saved / "vocab.json", **changes)
    sign_again(saved)
    refuses(saved, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_units": 8}, ["weights and config.json do not fit together", "size mismatch"]),
        ({"num_blocks": 2}, ["weights and config.json do not fit together", "Missing key"]),
        ({"position": "learned"}, ["weights and config.json do not fit together", "position_embedding"]),
        ({"max_len": 0}, ["max_len=0: must be a whole number"]),
        ({"num_heads": "two"}, ["num_heads='two'"]),
        ({"dropout_rate": "half"}, ["does not hold a model"]),
        ({"colour": "blue"}, ["colour"]),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_even_when_signed(
    saved: Path, changes: dict[str, Any], words: list[str]
) -> None:
    change_json(saved / "config.json", **changes)
    sign_again(saved)
    refuses(saved, *words)


def _wrong_shape(weights: dict[str, torch.Tensor]) -> None:
    weights["blocks.0.attention.out.weight"] = torch.zeros(4, 5)


def _missing(weights: dict[str, torch.Tensor]) -> None:
    del weights["final_norm.bias"]


def _surplus(weights: dict[str, torch.Tensor]) -> None:
    weights["blocks.9.out.bias"] = torch.zeros(4)


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["final_norm.bias"][2] = torch.nan


def _infinite(weights: dict[str, torch.Tensor]) -> None:
    weights["item_embedding.weight"][3, 1] = -torch.inf


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_wrong_shape, ["do not fit together", "blocks.0.attention.out.weight"]),
        (_missing, ["do not fit together", "final_norm.bias"]),
        (_surplus, ["do not fit together", "blocks.9.out.bias"]),
        (_nan, ["final_norm.bias", "hold NaN or infinite values"]),
        (_infinite, ["item_embedding.weight", "hold NaN or infinite values"]),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_weights_that_cannot_be_used_are_refused_even_when_signed(
    saved: Path, damage: Callable[[dict[str, torch.Tensor]], None], words: list[str]
) -> None:
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    damage(weights)
    safetensors.torch.save_file(weights, saved / "model.safetensors")
    sign_again(saved)
    refuses(saved, *words)


def test_a_pickle_in_the_place_of_the_weights_is_never_opened(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return shutil.rmtree, (saved,)

    torch.save({"final_norm.bias": Bomb()}, saved / "model.safetensors")
    sign_again(saved)
    refuses(saved, "does not hold a model this version can read")
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    sign_again(saved)
    refuses(saved, "does not hold a model this version can read")


def test_no_module_of_the_package_uses_pickle() -> None:
    modules = sorted(Path(sasrec.__file__).parent.rglob("*.py"))
    assert len(modules) > 25
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            # numba pickles the code that it compiled on this machine; that is no model
            banned = {"pickle", "shelve", "joblib", "dill", "cloudpickle"} & set(names)
            assert not banned or module.name == "kernel_cache.py", module
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("np", "load")}, module


def test_a_file_that_cannot_be_read_is_a_model_directory_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    refuses(saved, "Permission denied", MANIFEST)


def test_files_exchanged_between_two_good_models_are_detected(saved: Path) -> None:
    other = saved.with_name("other")
    save_model(other, make_model(seed=1), make_vocab())
    for name in ("model.safetensors", MANIFEST):
        mixed = saved.with_name(f"mixed-{name}")
        shutil.copytree(saved, mixed)
        shutil.copy(other / name, mixed / name)
        refuses(mixed, "model.safetensors")


class ReplacedMeanwhile:
    """A Path.read_bytes after whose n-th call another process replaces the model."""

    def __init__(self, path: Path, nth: int) -> None:
        self._path, self._left, self._inner = path, nth, Path.read_bytes

    def __call__(self, path: Path) -> bytes:
        content = self._inner(path)
        self._left -= 1
        if self._left == 0:
            save_model(self._path, make_model(seed=1), ItemVocab(IDS[::-1], COUNTS))
        return content


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_model_replaced_during_a_read_is_never_a_mixture(
    saved: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    old = load_model(saved)
    replacing = ReplacedMeanwhile(saved, nth)
    monkeypatch.setattr(Path, "read_bytes", lambda path: replacing(path))
    if nth < 5:
        refuses(saved, "is damaged")
    else:  # all files had been read
        loaded = load_model(saved)
        assert (loaded.version, loaded.vocab.ids) == (old.version, old.vocab.ids)
        assert all(map(torch.equal, loaded.model.state_dict().values(), old.model.state_dict().values()))
    monkeypatch.undo()
    assert load_model(saved).vocab.ids == tuple(IDS[::-1])


# --- writing


def test_a_model_directory_is_replaced_as_a_whole(saved: Path) -> None:
    old = load_model(saved)
    new = save_model(saved, make_model(seed=1), make_vocab())
    loaded = load_model(saved)
    assert loaded.version == new != old.version
    assert "epochs" not in loaded.metadata
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


class DiskFull:
    """A Path.rename or os.fsync that fails at its n-th call, as on a full disk."""

    def __init__(self, inner: Callable[..., Any], nth: int) -> None:
        self._inner, self._left = inner, nth

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise OSError(28, "No space left on device")
        return self._inner(*arguments, **options)


@pytest.mark.parametrize("nth", range(1, 7))
def test_a_write_that_fails_leaves_the_old_model_and_no_temporary_files(
    saved: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    old = load_model(saved).version
    with monkeypatch.context() as patch:
        patch.setattr("sasrec.checkpoint.os.fsync", DiskFull(lambda descriptor: None, nth))
        with pytest.raises(ModelDirectoryError, match=r"cannot write .*model: No space left on device"):
            save_model(saved, make_model(seed=1), make_vocab())
    assert load_model(saved).version == old
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("nth", [1, 2], ids=["old away", "new into place"])
def test_a_replacement_that_fails_half_way_leaves_the_old_model(
    saved: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    old = load_model(saved).version
    failing = DiskFull(Path.rename, nth)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, target: failing(path, target))
        with pytest.raises(ModelDirectoryError, match="No space left on device"):
            save_model(saved, make_model(seed=1), make_vocab())
    assert load_model(saved).version == old
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_only_model_directories_are_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("words")
    file = tmp_path / "file"
    file.write_text("words")
    for path in (precious, file):
        with pytest.raises(ModelDirectoryError, match=f"{path} exists and is not a model directory"):
            save_model(path, make_model(), make_vocab())
    assert (precious / "chapter1.txt").read_text() == file.read_text() == "words"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelDirectoryError, match=f"cannot write the model directory {tmp_path}/file/model"):
        save_model(tmp_path / "file" / "model", make_model(), make_vocab())


def test_a_vocabulary_of_another_size_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="the vocabulary has 5 items but the model 6"):
        save_model(tmp_path / "model", make_model(), ItemVocab(IDS[1:]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limited", "code"), LIMITED, ids=LIMITED_IDS)
def test_a_model_is_saved_and_replaced_where_the_system_can_do_less_than_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: FileSystem, code: int
) -> None:
    with monkeypatch.context() as patch:
        limited(patch, code)
        for seed in (0, 1):
            version = save_model(tmp_path / "model", make_model(seed), make_vocab())
            assert load_model(tmp_path / "model").version == version
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fails_to_flush_is_no_such_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limited in (without_flush, without_flush_of_folders):
        with monkeypatch.context() as patch:
            limited(patch, errno.EIO)
            with pytest.raises(ModelDirectoryError, match="Input/output error"):
                save_model(tmp_path / "model", make_model(), make_vocab())


def test_sasrec_imports_nothing_that_windows_lacks(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'pwd', 'grp', 'termios', 'syslog']))\n"
        "import sasrec.checkpoint, sasrec.__main__, sasrec.estimator, sasrec.inference.engine, streamrec.storage\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
