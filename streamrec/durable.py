"""Files that are replaced whole or not at all, even in a crash."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sasrec.durable import flush, flush_folder

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that becomes ``path`` when the block ends without an error: flushed to disk, then renamed.

    Until then its name matches UNFINISHED. An error removes the file; a killed process leaves it behind.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            flush(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)  # or a power failure may undo the rename


def make_folder(path: Path) -> None:
    """Make a folder and the folders above it; flush their names to disk, as ``atomic_file`` does.

    Raises:
        OSError: a folder cannot be made.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)
