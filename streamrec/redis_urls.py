"""Check Redis URLs, and mask their passwords."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit, urlunsplit

MASK = "********"
FORM = "redis[s]://[USER:PASSWORD@]HOST:PORT/DB or unix://PATH"


def check_url(url: str) -> None:
    """Check the form of a Redis URL.

    Raises:
        ValueError: it is malformed; the message does not repeat the URL, which may contain a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if the port is not a number
        usable = bool(parts.hostname) or (parts.scheme == "unix" and bool(parts.path))
    except ValueError:
        raise ValueError(f"not a URL; write {FORM}") from None
    if parts.scheme not in ("redis", "rediss", "unix") or not usable:
        raise ValueError(f"write {FORM}")
    if parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment:
        # otherwise part of the password would be taken for the host, and shown
        raise ValueError("write '/', '?', '#' and '@' in user and password as %2F, %3F, %23 and %40")
    if parts.scheme != "unix" and not re.fullmatch(r"/?|/\d+/?", parts.path):
        raise ValueError("the database after HOST:PORT/ is a number")


def fits_cluster(url: str) -> bool:
    """Return whether a URL can address a Redis Cluster: a host, and no database but 0."""
    parts = urlsplit(url)
    databases = {parts.path.strip("/"), *parse_qs(parts.query).get("db", [])}
    return parts.scheme != "unix" and databases <= {"", "0"}


def has_credentials(url: str) -> bool:
    """Return whether a URL names a user or a password."""
    parts = urlsplit(url)
    return "@" in parts.netloc or not {"username", "password"}.isdisjoint(parse_qs(parts.query))


def masked(url: str) -> str:
    """Return a URL with its password masked."""
    parts = urlsplit(url)
    netloc = parts.netloc
    if "@" in netloc:
        credentials, host = netloc.rsplit("@", 1)
        user, _, password = credentials.partition(":")
        # a user name without a password may be a misplaced password
        netloc = f"{user + ':' if password else ''}{MASK}@{host}"
    query = re.sub(r"(password=)[^&]*", rf"\1{MASK}", parts.query)
    shown = urlunsplit((parts.scheme, netloc, parts.path, query, ""))
    return shown.replace("unix:/", "unix:///", 1) if not netloc else shown
