"""Files that are replaced whole or not at all, even in a crash."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that becomes ``path`` when the block ends without an error: flushed to disk, then renamed.

    Until then its name begins with a dot. An error removes the file; a killed process leaves it behind.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power failure may undo the rename
    finally:
        os.close(folder)
