"""Where model versions and archived clicks lie: in a folder, or below a URL of an object store (bucket.py).

Both offer the same operations on files that are named with slashes ("versions/4f2a/config.json"):

    read, files, local    what is there
    write                 a file, whole or not at all, durable when it returns
    delete, remove        a file; a folder, one of its files first
    seen, exchange        compare-and-set: replace a file unless it has changed since it was seen

So data are written first, and last the one file that makes them count: the manifest of a model version, the alias. A
segment of the archive counts by its name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TypeAlias

from sasrec.durable import flush_folder
from streamrec.bucket import Bucket, Seen, StoredFile
from streamrec.durable import UNFINISHED, atomic_file, make_folder
from streamrec.errors import StoreUnavailable
from streamrec.store_urls import check_url, is_url

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

Place: TypeAlias = Path | str  # a folder, or a URL
LOCK = "lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
ABANDONED_AFTER_S = 3600.0  # unfinished files this old are of a process that crashed


class Folder:
    """Files in a folder, which the first write makes. A folder that cannot be used raises StoreUnavailable."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._warned = False  # that there are no locks

    def __str__(self) -> str:
        return str(self._path)

    def at(self, name: str) -> str:
        """Return where a file lies, for messages."""
        return str(self._path / name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        with self._explained("read", name):
            try:
                return (self._path / name).read_bytes()
            except FileNotFoundError:
                return None

    def files(self, folder: str = "") -> list[StoredFile]:
        """List the files below a folder, in no order; not those whose own name, or a folder's, begins with a dot."""
        found = []
        with self._explained("list", folder):
            for parent, folders, names in os.walk(self._path / folder, onerror=_raise_unless_missing):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for path in (Path(parent) / name for name in names if not name.startswith(".")):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        about = path.stat()
                        found.append(StoredFile(path.relative_to(self._path).as_posix(), about.st_size, about.st_mtime))
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        path = self._path / name
        with self._explained("write", name):
            make_folder(path.parent)
            with atomic_file(path) as file:
                file.write(content)

    def delete(self, name: str, durable: bool = False) -> None:
        """Delete a file, if there is one; ``durable``: a power failure must not bring it back."""
        with self._explained("delete", name):
            (self._path / name).unlink(missing_ok=True)
            if durable:
                flush_folder((self._path / name).parent)

    def remove(self, folder: str, first: str) -> None:
        """Delete a folder; this file of it first."""
        self.delete(f"{folder}/{first}")
        with self._explained("delete", folder), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._path / folder)

    def sweep(self, older_than_s: float = ABANDONED_AFTER_S) -> None:
        """Delete the files that processes which crashed left unfinished, and the folders that are empty then.

        The age counts from the newest file, or from now if that is earlier: one of the two clocks may be wrong.
        """
        changed: dict[Path, float] = {}
        for parent, _, names in os.walk(self._path, topdown=False):
            for path in (*(Path(parent) / name for name in names), Path(parent)):
                with contextlib.suppress(OSError):  # deleted or renamed meanwhile
                    changed[path] = path.stat().st_mtime
        until_s = min(time.time(), max(changed.values(), default=0.0)) - older_than_s
        for path, changed_s in changed.items():
            with contextlib.suppress(OSError):  # deleted meanwhile, or not empty
                if changed_s >= until_s or path == self._path:
                    continue
                if UNFINISHED.fullmatch(path.name):
                    path.unlink()
                elif path.is_dir():
                    path.rmdir()

    def seen(self, name: str) -> Seen:
        """Read a file that others may replace."""
        return Seen(self.read(name))

    def exchange(self, name: str, content: bytes | None, seen: Seen) -> bool:
        """Replace a file, or delete it with None, unless it was changed since it was seen; return whether it was."""
        with self.locked():
            if self.read(name) != seen.content:
                return False
            self.delete(name) if content is None else self.write(name, content)
        return True

    @contextlib.contextmanager
    def local(self, folder: str, files: Iterable[str]) -> Iterator[Path]:
        """Yield the folder."""
        yield self._path / folder

    @contextlib.contextmanager
    def locked(self, wait: bool = True) -> Iterator[None]:
        """Lock the folder while the block runs. A file system without locks is warned of, and not locked.

        Raises:
            BlockingIOError: another process has locked it, and ``wait`` is False.
        """
        with self._explained("write", LOCK):
            lock = (self._path / LOCK).open("w")
        with lock:
            self._lock(lock, wait)
            yield

    def _lock(self, file: IO[str], wait: bool) -> None:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise StoreUnavailable(f"cannot lock {self.at(LOCK)}: {error.strerror or error}") from error
            if not self._warned:
                log.warning(
                    "%s cannot be locked (%s): see that one process at a time changes the champion or writes the "
                    "archive",
                    self,
                    error.strerror,
                )
            self._warned = True

    @contextlib.contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(f"cannot {verb} {self.at(name)}: {error.strerror or error}") from error


Store: TypeAlias = Folder | Bucket


def open_store(place: Place) -> Store:
    """Return the files of a folder or URL; nothing is read yet.

    Raises:
        ValueError: the URL is wrong.
        SettingsError: a package for object stores is missing.
    """
    if isinstance(place, str) and is_url(place):
        check_url(place)
        return Bucket(place)
    return Folder(Path(place))


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
