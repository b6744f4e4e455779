"""Open a file, unpack it, and say what it holds. The first bytes tell, the name does not.

A file that is neither text nor Parquet is refused by the name of what it is, and so is one whose name says something
else than its bytes.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast

import pyarrow as pa

from sasrec.data.formats import DataFileError

HEAD_BYTES = 512
PARQUET = b"PAR1"
BOM = b"\xef\xbb\xbf"
TO_CSV = "write its rows as CSV or Parquet"
# what else a file may be: where its first bytes are, these bytes, its name, and the way out
OTHERS = (
    (0, b"PARE", "Parquet with an encrypted footer", "write it without encryption"),
    (0, b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (0, b"ARROW1", "an Arrow (Feather) file", TO_CSV),
    (0, b"ORC", "an ORC file", TO_CSV),
    (0, b"Obj\x01", "an Avro file", TO_CSV),
    (0, b"\x89HDF", "an HDF5 file", TO_CSV),
    (0, b"\x93NUMPY", "a NumPy array", TO_CSV),
    (0, b"SQLite format 3", "an SQLite database", TO_CSV),
    (0, b"SEQ\x06", "a Hadoop sequence file", TO_CSV),
    (0, b"\xd0\xcf\x11\xe0", "an Excel workbook", TO_CSV),
    (0, b"%PDF", "a PDF file", TO_CSV),
    (0, b"\x80\x04", "a Python pickle", TO_CSV),
    (0, b"\x80\x05", "a Python pickle", TO_CSV),
    (0, b"<!DOCTYPE", "an HTML page", "check its download"),
    (0, b"<!doctype", "an HTML page", "check its download"),
    (0, b"<html", "an HTML page", "check its download"),
    (0, b"<?xml", "an XML file", TO_CSV),
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the file with `git lfs pull`"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, b"Rar!", "a RAR archive", "unpack it"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", "unpack it"),
    (0, b"\xff\x06\x00\x00sNaPpY", "a Snappy file", "unpack it"),
)


class Content(NamedTuple):
    """An open file.

    Args:
        raw: its bytes as they are on disk.
        stream: its unpacked bytes; ``text``: these as text.
        again: whether it can be opened again and gives the same bytes; a pipe cannot.
    """

    raw: io.BufferedReader
    stream: io.BufferedReader
    text: io.TextIOWrapper
    is_parquet: bool
    again: bool

    @property
    def position(self) -> int:
        """How much is read, as it is on disk; 0: a pipe does not tell."""
        return self.raw.tell() if self.again else 0


@dataclass(frozen=True)
class _Packing:
    """One way to pack a file: its name, suffix, first bytes, and how to unpack it."""

    name: str
    suffix: str
    magic: bytes
    unpack: Callable[[Path, io.BufferedReader], IO[bytes]]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every error of reading a file into a DataFileError that names the file."""
    try:
        yield
    except DataFileError:
        raise
    except EOFError as error:
        raise DataFileError(f"{path} is cut short: {error}; fetch it again") from error
    except (zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataFileError(f"{path} is damaged: {error}; fetch it again") from error
    except UnicodeError as error:
        raise DataFileError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except (OSError, pa.ArrowException) as error:
        if "Truncated compressed stream" in str(error):
            raise DataFileError(f"{path} is cut short: {one_line(error)}; fetch it again") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataFileError(f"cannot read {path}: {reason}") from error


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Content]:
    """Open a file of text or Parquet, packed or not.

    Raises:
        DataFileError: it cannot be read, is something else, or its name says something else.
    """
    with reading(path), contextlib.ExitStack() as files:
        raw = files.enter_context(path.open("rb"))
        head = raw.peek(HEAD_BYTES)[:HEAD_BYTES]
        packing = next((one for one in PACKINGS if head.startswith(one.magic)), None)
        _check_suffix(path, head, packing)
        stream = raw
        if packing is not None:
            unpacked = files.enter_context(packing.unpack(path, raw))
            stream = io.BufferedReader(cast(io.RawIOBase, unpacked), 1 << 18)
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        is_parquet = head.startswith(PARQUET)
        _check_head(path, head, packing)
        # only wanted columns need be UTF-8, and an error shall name the row
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield Content(raw, stream, files.enter_context(text), is_parquet, path.is_file())


def _check_suffix(path: Path, head: bytes, packing: _Packing | None) -> None:
    """Raise DataFileError where the name of a file says something else than its bytes."""
    suffix = path.suffix.lower()
    promised = next((one for one in PACKINGS if one.suffix == suffix), None)
    if not head and (promised or suffix == ".parquet"):
        raise DataFileError(f"{path} is empty; fetch it again")
    if promised and promised is not packing:
        kind = f"a {packing.name} file" if packing else _kind(head)
        raise DataFileError(f"{path} is named {suffix}, but is no {promised.name} file: it is {kind}; rename it")
    if suffix == ".parquet" and not head.startswith((PARQUET, b"PARE")):
        kind = f"a {packing.name} file" if packing else _kind(head)
        raise DataFileError(f"{path} is named .parquet, but is no Parquet file: it is {kind}; rename it")


def _check_head(path: Path, head: bytes, packing: _Packing | None) -> None:
    """Raise DataFileError where unpacked bytes are neither text nor Parquet that can be read from where it lies."""
    inside = f" in a {packing.name} file" if packing else ""
    if packing and head.startswith(PARQUET):
        raise DataFileError(f"{path} is Parquet{inside}; unpack it: Parquet is compressed already")
    for one in PACKINGS:
        if packing and head.startswith(one.magic):
            raise DataFileError(f"{path} is a {one.name} file{inside}; unpack it")
    for at, magic, name, remedy in OTHERS:
        if head[at : at + len(magic)] == magic:
            raise DataFileError(f"{path} is {name}{inside}, neither text nor Parquet; {remedy}")


def _kind(head: bytes) -> str:
    """Return what a file is by its first bytes, for messages."""
    for at, magic, name, _ in OTHERS:
        if head[at : at + len(magic)] == magic:
            return name
    if head.startswith(PARQUET):
        return "a Parquet file"
    text = head.removeprefix(BOM).decode(errors="replace")
    return "text" if text[:-1].replace("\n", "").replace("\r", "").replace("\t", "").isprintable() else "damaged"


def _zip_member(path: Path, raw: io.BufferedReader) -> IO[bytes]:
    """Return the one file in a zip archive."""
    archive = zipfile.ZipFile(raw)
    names = [one for one in archive.infolist() if not one.is_dir() and not _is_hidden(one.filename)]
    if any(one.filename == "[Content_Types].xml" for one in names):
        raise DataFileError(f"{path} is an Excel workbook or another document, neither text nor Parquet; {TO_CSV}")
    if len(names) != 1:
        listed = ", ".join(one.filename for one in names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataFileError(f"{path} has {len(names)} files ({listed}); unpack it, and name the file or folder to read")
    if names[0].flag_bits & 1:
        raise DataFileError(f"{path} is encrypted; unpack it")
    try:
        return archive.open(names[0])
    except NotImplementedError as error:  # a method of compression that Python lacks
        raise DataFileError(f"{path} cannot be unpacked here: {error}; unpack it") from error


def _xz(raw: io.BufferedReader) -> IO[bytes]:
    return cast(IO[bytes], lzma.open(raw))


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


PACKINGS = (
    _Packing("gzip", ".gz", b"\x1f\x8b", lambda path, raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw))),
    _Packing("zstd", ".zst", b"\x28\xb5\x2f\xfd", lambda path, raw: pa.CompressedInputStream(raw, "zstd")),
    _Packing("zip", ".zip", b"PK\x03\x04", _zip_member),
    _Packing("bzip2", ".bz2", b"BZh", lambda path, raw: cast(IO[bytes], bz2.BZ2File(raw))),
    _Packing("xz", ".xz", b"\xfd7zXZ", lambda path, raw: _xz(raw)),
)
SUFFIXES = tuple(one.suffix for one in PACKINGS)
