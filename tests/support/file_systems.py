"""File systems that cannot do what Linux's own can, simulated in this process; each is named for its fault."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def without_flush_of_folders(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """SMB, FUSE: fsync of a folder fails."""
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)


def without_flush(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A file system without fsync."""

    def refused(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refused)


def of_windows(monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    """Windows: no folder can be opened, no file flushed that was opened to be read, and rename replaces nothing."""
    opened, fsync, rename = os.open, os.fsync, os.rename

    def open_no_folder(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if "dir_fd" not in options and Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *more, **options)

    def flush_writable(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    def rename_nothing_over(source: Any, target: Any, **options: Any) -> None:
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(source), None, str(target))
        rename(source, target, **options)

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(os, "fsync", flush_writable)
    monkeypatch.setattr(os, "rename", rename_nothing_over)


def without_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """NFS without a lock daemon, FUSE: flock fails."""

    def refused(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a file system of this size; the test is skipped where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path, left_bytes: int) -> None:
    """Write a file that leaves this much room."""
    room = os.statvfs(folder)
    (folder / ".filler").write_bytes(b"\0" * (room.f_bavail * room.f_frsize - left_bytes))


FileSystem = Callable[[pytest.MonkeyPatch, int], None]
LIMITED: list[tuple[FileSystem, int]] = [
    (without_flush_of_folders, errno.EINVAL),
    (without_flush_of_folders, errno.ENOTSUP),
    (without_flush_of_folders, errno.EBADF),
    (without_flush, errno.EINVAL),
    (without_flush, errno.ENOSYS),
    (of_windows, 0),
]
LIMITED_IDS = [f"{make.__name__} {errno.errorcode.get(code, '')}".strip() for make, code in LIMITED]
