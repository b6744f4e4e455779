"""The version of stored data: a key in Redis, the file ``format`` in a folder or bucket.

Data of an unknown version are refused before anything is read or written, since their names may have another meaning.
A change that an older streamrec would misread increases FORMAT.
"""

from __future__ import annotations

from collections.abc import Callable

from streamrec.errors import StreamrecError
from streamrec.storage import Store

FORMAT = "1"
FILE = "format"
SHOWN_CHARACTERS = 20  # of an unknown version


def refusal(where: str, found: str, otherwise: str) -> str:
    """Return the error for an unknown version: where it was found, the known version, and what to do."""
    return (
        f"{where} holds format {found[:SHOWN_CHARACTERS]!r}, and this streamrec knows format {FORMAT!r}: upgrade "
        f"streamrec, or {otherwise}"
    )


def check_format(store: Store, contents: Callable[[str], bool], otherwise: str, error: type[StreamrecError]) -> None:
    """Refuse a folder or URL of another format.

    Args:
        contents: whether a file of this name is never stored without a format.
        otherwise: what to do instead of an upgrade.
        error: type of the error that is raised.

    Raises:
        StreamrecError: the format is unknown or missing.
        StoreUnavailable: it cannot be read.
    """
    content = store.read(FILE)
    if content is None:
        if not any(contents(file.name) for file in store.files()):
            return
        raise error(
            f"{store.at(FILE)} is missing, so the format of the files beside it is unknown: restore that file; if this "
            f"version wrote them all, its content is {FORMAT!r}"
        )
    found = content.decode(errors="replace").strip()
    if found != FORMAT:
        raise error(refusal(store.at(FILE), found, otherwise))


def claim_format(store: Store) -> None:
    """Write the format into a folder or URL that has none; call this before anything else is written.

    Raises:
        StoreUnavailable: the file cannot be written.
    """
    if store.read(FILE) is None:
        store.write(FILE, f"{FORMAT}\n".encode())
