"""Compile a kernel, or load it from numba's cache on disk. The cache is only a help: no fault of it is an error.

A file that is damaged, cannot be read or cannot be written causes one warning with its folder; the kernel is compiled
and, where possible, written anew. Each file ends with its SHA-256, since damaged machine code would end the process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile

log = logging.getLogger(__name__)

DIGEST_BYTES = 32


def compiled(function: Callable[..., None], signature: Any, **options: Any) -> Callable[..., None]:
    """Return a function compiled by numba for one signature."""
    kernel = numba.njit(**options)(function)
    try:
        kernel._cache = _Cache(function)
    except Exception as error:  # numba may write to no folder
        _warn(config.CACHE_DIR or str(Path(function.__code__.co_filename).parent / "__pycache__"), error)
    kernel.compile(signature)
    kernel.disable_compile()
    found: Callable[..., None] = kernel
    return found


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache of a function, without its errors."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _CheckedFiles(self._cache_path, f"{self._impl.filename_base}.checked", stamp)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return the compiled code; None if there is none that can be used."""
        try:
            return super().load_overload(signature, context)
        except Exception as error:
            _warn(self._cache_path, error)
            with contextlib.suppress(Exception):
                self.flush()  # else saving would read the damaged index again
            return None

    def save_overload(self, signature: Any, code: Any) -> None:
        """Write the compiled code if possible."""
        try:
            super().save_overload(signature, code)
        except Exception as error:
            _warn(self._cache_path, error)


class _CheckedFiles(IndexDataCacheFile):  # type: ignore[misc]
    """The files of numba's cache, each with its digest at the end. They are not read by numba's own class."""

    def _load_index(self) -> Any:
        try:
            content = _read(Path(self._index_path))
        except FileNotFoundError:
            return {}
        version, _, pickled = content.partition(b"\n")
        if version != self._version.encode():  # another version's pickles may not be readable
            return {}
        stamp, names = pickle.loads(pickled)
        return names if stamp == self._source_stamp else {}

    def _save_index(self, names: Any) -> None:
        self._write(self._index_path, self._version.encode() + b"\n" + self._dump((self._source_stamp, names)))

    def _load_data(self, name: str) -> Any:
        return pickle.loads(_read(Path(self._data_path(name))))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), self._dump(data))

    def _write(self, path: str, content: bytes) -> None:
        with self._open_for_write(path) as file:
            file.write(content + hashlib.sha256(content).digest())


def _read(path: Path) -> bytes:
    """Read a file.

    Raises:
        ValueError: the file is damaged.
    """
    found = path.read_bytes()
    content, digest = found[:-DIGEST_BYTES], found[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"{path.name} is damaged")
    return content


def _warn(folder: str, error: Exception) -> None:
    """Warn of the first fault in a folder."""
    if next(_faults(folder)) == 0:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning(
            "compiled kernels are not cached in %s: %s; each start may compile them anew, which takes seconds: mend or "
            "empty this folder, or set NUMBA_CACHE_DIR to one that can be written",
            folder,
            reason,
        )


@functools.cache
def _faults(folder: str) -> Iterator[int]:
    """Return the numbers of the faults that a folder is yet to have."""
    return itertools.count()
