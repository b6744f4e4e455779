"""Tell folders from the URLs of object stores, and check these URLs.

A URL has no credentials: they would appear in logs. The clients of the stores take them from the environment.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

FORMS = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "abfs": "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX",
}
OPTIONS = {"s3": ("region", "scheme", "endpoint_override"), "gs": (), "abfs": ()}
URL = re.compile(r"[A-Za-z][\w+.-]+:/")  # more than one letter: C:/ is a folder


def is_url(place: object) -> bool:
    """Return whether a place is named by a URL, right or wrong."""
    return isinstance(place, str) and URL.match(place) is not None


def check_place(place: object) -> object:
    """Return a folder as a path, and a URL as it is.

    Raises:
        ValueError: it is neither, or the URL is wrong; the message does not repeat it, since it may contain a password.
    """
    if place is None or isinstance(place, Path):
        return place
    if not isinstance(place, str):
        raise ValueError("write a folder or a URL")
    if not is_url(place):
        return Path(place)
    check_url(place)
    return place


def check_url(url: str) -> None:
    """Check the URL of an object store.

    Raises:
        ValueError: as for ``check_place``.
    """
    forms = f"write a folder, {', '.join(FORMS.values())}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(f"not a URL; {forms}") from None
    if parts.scheme not in FORMS:
        raise ValueError(f"no object store has the scheme {parts.scheme!r}; {forms}")
    place = r"[\w.-]+@[\w.-]+" if parts.scheme == "abfs" else r"[\w.-]+"
    if not re.fullmatch(place, parts.netloc):
        raise ValueError(
            f"write {FORMS[parts.scheme]}; credentials come from the environment or from a role, never from the URL"
        )
    unknown = sorted(parse_qs(parts.query, keep_blank_values=True).keys() - set(OPTIONS[parts.scheme]))
    if unknown or parts.fragment:
        known = ", ".join(OPTIONS[parts.scheme]) or "none"
        raise ValueError(f"the options of {FORMS[parts.scheme]} after '?' are: {known}; credentials are no options")
