"""The kernels' cache on disk is a help: whatever is wrong with it, kernels are compiled, after one warning."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core import caching, config
from numba.core.caching import CompileResultCacheImpl

from sasrec.inference import kernel_cache, kernels

SCORES = torch.tensor([[1.0, 3.0, 2.0]])

# numba 0.61 has it under another name
USER_LOCATOR = vars(caching).get("UserProvidedCacheLocator") or vars(caching)["_UserProvidedCacheLocator"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, as NUMBA_CACHE_DIR sets it."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    # else numba would take the next folder
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [USER_LOCATOR])
    yield tmp_path
    kernels._top_k_kernel.cache_clear()


def start() -> tuple[int, int]:
    """Use a kernel as a new process does; return how often it was loaded and compiled."""
    kernels._top_k_kernel.cache_clear()
    kernel_cache._faults.cache_clear()
    values, indices = kernels.top_k(SCORES, 2)
    assert (values.tolist(), indices.tolist()) == ([[3.0, 2.0]], [[1, 2]])
    stats = kernels._top_k_kernel(np.dtype(np.float32)).stats  # type: ignore[attr-defined]
    return sum(stats.cache_hits.values()), sum(stats.cache_misses.values())


def files(folder: Path, suffix: str) -> list[Path]:
    return [path for path in folder.rglob(f"*{suffix}") if path.is_file()]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_by_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def text(path: Path) -> None:
    path.write_text("no pickle at all\n" * 100)


def a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def missing(path: Path) -> None:
    path.unlink()


DAMAGES = [empty, cut, cut_by_a_byte, zeros, text, a_bit, a_folder]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_file_is_one_warning_and_the_kernel_is_compiled(
    folder: Path, caplog: pytest.LogCaptureFixture, suffix: str, damage: Callable[[Path], None]
) -> None:
    assert start() == (0, 1)
    assert start() == (1, 0)
    assert not caplog.records
    for path in files(folder, suffix):
        damage(path)
    assert start() == (0, 1)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert str(files(folder, ".nbi")[0].parent if files(folder, ".nbi") else folder) in warning.getMessage()
    if damage is not a_folder:
        caplog.clear()
        assert start() == (1, 0), "the damaged file was replaced"
        assert not caplog.records


def test_a_file_that_is_missing_is_written_again_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix in (".nbi", ".nbc"):
        start()
        for path in files(folder, suffix):
            missing(path)
        assert start() == (0, 1)
        assert start() == (1, 0)
    assert not caplog.records


def test_a_cache_folder_that_is_a_file_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").write_text("")
    monkeypatch.setattr(config, "CACHE_DIR", str(folder / "file"))
    assert start() == (0, 1)
    (warning,) = caplog.records
    assert str(folder / "file") in warning.getMessage()


def test_a_full_disk_below_the_cache_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "x", folder]).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        assert start()[1] == 1
        assert start()[1] == 1
    finally:
        subprocess.run(["umount", folder], check=True)
    assert len({record.getMessage() for record in caplog.records}) == 1
    assert "No space left on device" in caplog.text
    assert str(folder) in caplog.text


@pytest.mark.parametrize("damage", [empty, a_bit])
def test_another_process_starts_with_damaged_files(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Machine code with another bit would end the process, which no handler can prevent."""
    script = "import torch; from sasrec.inference.kernels import top_k; print(top_k(torch.tensor([[1., 3.]]), 1)[1])"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "tensor([[1]])\n"), done.stderr
        for path in files(tmp_path, ".nbc"):
            damage(path)
    assert done.stderr.count("compiled kernels are not cached in") == 1
