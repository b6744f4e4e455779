"""List the data files of a folder. A folder whose files do not all count is refused: its log says which do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from sasrec.data.content import SUFFIXES, reading
from sasrec.data.formats import DataFileError

log = logging.getLogger(__name__)

KINDS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
EXPORT = "write the rows of its newest version as Parquet or CSV elsewhere, and name that folder"
# tables whose log says which of their files count: what lies in such a folder, and the table's name
TABLES = (
    ("_delta_log", "a Delta Lake table"),
    (".hoodie", "a Hudi table"),
    ("metadata/*.metadata.json", "an Iceberg table"),
    ("metadata/version-hint.text", "an Iceberg table"),
    ("_spark_metadata", "the output of a Spark stream"),
    ("snapshot/snapshot-*", "a Paimon table"),
    ("_versions/*.manifest", "a Lance table"),
)


def data_files(path: Path) -> list[Path]:
    """Return the data files in a folder, sorted, without hidden ones; a path that is no folder stands for itself.

    Raises:
        DataFileError: the folder has no data files, files of two kinds, one file twice, or is a table with a log.
    """
    if not path.is_dir():
        return [path]
    with reading(path):
        _refuse_tables(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(path, file))
    found = [file for file in files if _kind(file)]
    if not found:
        raise DataFileError(
            f"{path} has no data files; expected {', '.join(KINDS)}, also with {', '.join(SUFFIXES)} behind it"
        )
    kinds = {_kind(file): file for file in found}
    if len(kinds) > 1:
        both = " and ".join(file.name for file in list(kinds.values())[:2])
        raise DataFileError(f"{path} has files of several kinds ({both}); keep one kind")
    unpacked = {_unpacked(file): file for file in found}
    if len(unpacked) < len(found):
        twice = next(file for file in found if unpacked[_unpacked(file)] != file)
        raise DataFileError(f"{twice} and {unpacked[_unpacked(twice)].name} are one file twice; remove one of them")
    ignored = [file.name for file in files if file not in set(found)]
    if ignored:
        more = ", ..." if len(ignored) > 3 else ""
        log.warning("%s: %d other files are not read: %s%s", path, len(ignored), ", ".join(ignored[:3]), more)
    return found


def _refuse_tables(path: Path) -> None:
    folder = path.resolve()
    for place in (folder, *folder.parents, *_folders_in(folder)):
        for mark, name in TABLES:
            if next(place.glob(mark), None) is not None:
                where = f"{path} is" if place == folder else f"{path} belongs to" if place in folder.parents else None
                where = where or f"{path} has in {place.relative_to(folder)}"
                raise DataFileError(
                    f"{where} {name}: some of its files may be removed or replaced, as its log says; {EXPORT}"
                )


def _folders_in(folder: Path) -> Iterator[Path]:
    return (place for place in folder.rglob("*") if place.is_dir())


def _is_hidden(path: Path, file: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(path).parts)


def _unpacked(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() in SUFFIXES else file


def _kind(file: Path) -> str:
    """Return the kind of a data file by its name; empty: it is none."""
    suffix = _unpacked(file).suffix.lower()
    if suffix not in KINDS:
        return ""
    return {".tsv": ".csv", ".ndjson": ".jsonl", ".json": ".jsonl"}.get(suffix, suffix)
