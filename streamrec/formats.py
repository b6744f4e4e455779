"""The version of what is stored: in Redis under a key, in a folder in the file ``format``.

An unknown version is refused before anything is read or written, since whoever wrote it may mean something else by
the same names. A change that an older streamrec would misread raises FORMAT.
"""

from __future__ import annotations

from pathlib import Path

from streamrec.durable import replacing
from streamrec.errors import StreamrecError

FORMAT = "1"
FILE = "format"
LONGEST = 20  # of a version that is shown


def refusal(where: str, found: str, otherwise: str) -> str:
    """The line that says what was found where, what is known, and what to do."""
    return (
        f"{where} holds format {found[:LONGEST]!r}, and this streamrec knows format {FORMAT!r}: upgrade streamrec, or "
        f"{otherwise}"
    )


def check_folder(folder: Path, contents: str, otherwise: str, error: type[StreamrecError]) -> None:
    """Refuse a folder of another format.

    Args:
        contents: a pattern of what lies in a folder that is not new, and so must have a format.
        otherwise: what to do, other than to upgrade.

    Raises:
        StreamrecError: of the given type; its format is unknown, or cannot be read.
    """
    try:
        found = (folder / FILE).read_text(errors="replace").strip()
    except FileNotFoundError:
        if not any(folder.glob(contents)):
            return
        raise error(
            f"{folder / FILE} is missing, so nobody knows how to read what is beside it: restore that file; where all "
            f"was written by this version it holds {FORMAT!r}"
        ) from None
    except OSError as problem:
        raise error(f"cannot read {folder / FILE}: {problem.strerror}") from problem
    if found != FORMAT:
        raise error(refusal(str(folder / FILE), found, otherwise))


def claim_folder(folder: Path) -> None:
    """Write the format down, unless it is there; to be called before anything else is written.

    Raises:
        OSError: it cannot be written.
    """
    if not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE) as file:
            file.write(f"{FORMAT}\n".encode())
