"""The version of stored data: a key in Redis, the file ``format`` in a folder.

Data of an unknown version are refused before anything is read or written, since their names may have another meaning.
A change that an older streamrec would misread increases FORMAT.
"""

from __future__ import annotations

from pathlib import Path

from streamrec.durable import atomic_file
from streamrec.errors import StreamrecError

FORMAT = "1"
FILE = "format"
SHOWN_CHARACTERS = 20  # of an unknown version


def refusal(where: str, found: str, otherwise: str) -> str:
    """Return the error for an unknown version: where it was found, the known version, and what to do."""
    return (
        f"{where} holds format {found[:SHOWN_CHARACTERS]!r}, and this streamrec knows format {FORMAT!r}: upgrade "
        f"streamrec, or {otherwise}"
    )


def check_folder(folder: Path, contents: str, otherwise: str, error: type[StreamrecError]) -> None:
    """Refuse a folder of another format.

    Args:
        contents: pattern of files that are never in a folder without a format.
        otherwise: what to do instead of an upgrade.
        error: type of the error that is raised.

    Raises:
        StreamrecError: the format is unknown, missing, or cannot be read.
    """
    try:
        found = (folder / FILE).read_text(errors="replace").strip()
    except FileNotFoundError:
        if not any(folder.glob(contents)):
            return
        raise error(
            f"{folder / FILE} is missing, so the format of the files beside it is unknown: restore that file; if this "
            f"version wrote them all, its content is {FORMAT!r}"
        ) from None
    except OSError as problem:
        raise error(f"cannot read {folder / FILE}: {problem.strerror}") from problem
    if found != FORMAT:
        raise error(refusal(str(folder / FILE), found, otherwise))


def claim_folder(folder: Path) -> None:
    """Write the format into a folder that has none; call this before anything else is written.

    Raises:
        OSError: the file cannot be written.
    """
    if not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / FILE) as file:
            file.write(f"{FORMAT}\n".encode())
