"""Flush files and folders to disk, where the system can.

Some file systems (FUSE, SMB) cannot flush a folder or a file, and Windows opens no folder. The data are written, so
these errors are ignored. All others are raised: the disk is full, or damaged.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
NO_FOLDER_TO_OPEN = NOT_SUPPORTED | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}


def flush_file(path: Path) -> None:
    """Flush a file.

    Raises:
        OSError: it cannot be written to disk.
    """
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))  # Windows flushes no file opened to be read
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Flush the names in a folder, or a power failure may undo a rename.

    Raises:
        OSError: they cannot be written to disk.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in NO_FOLDER_TO_OPEN:
            return
        raise
    try:
        flush(descriptor, NO_FOLDER_TO_OPEN)
    finally:
        os.close(descriptor)


def flush(descriptor: int, not_supported: set[int] = NOT_SUPPORTED) -> None:
    """Flush an open file.

    Raises:
        OSError: it cannot be written to disk.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in not_supported:
            raise
