"""Check Redis URLs, and mask their passwords."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit, urlunsplit

MASK = "********"
FORM = "redis[s]://[USER:PASSWORD@]HOST:PORT/DB or unix://PATH"
SENTINEL_FORM = "redis[s]+sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT,.../NAME/DB"
SENTINEL_URL = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?P<login>[^@/?#]*@)?(?P<sentinels>[^@/?#]+)/(?P<name>[\w.-]+)(?P<rest>[/?].*)?"
)


class SentinelUrl(NamedTuple):
    """The parts of a URL that names sentinels.

    Args:
        name: of the primary, as the sentinels know it.
        server_url: URL of a server with this login, database and options; its host is the first sentinel's.
    """

    sentinels: list[tuple[str, int]]
    name: str
    server_url: str


def sentinel_url(url: str) -> SentinelUrl | None:
    """Return the parts of a URL that names sentinels; None for another URL.

    Raises:
        ValueError: it is malformed; the message does not repeat the URL, which may contain a password.
    """
    if "+sentinel:" not in url.partition("//")[0]:
        return None
    found = SENTINEL_URL.fullmatch(url)
    addresses = found["sentinels"].split(",") if found else []
    ports = [re.fullmatch(r"[^:\s\[\]]+:(\d{1,5})", address) for address in addresses]
    if found is None or not all(port and 1 <= int(port[1]) <= 65_535 for port in ports):
        raise ValueError(f"write {SENTINEL_FORM}: hosts and ports of the sentinels, and the name of their primary")
    sentinels = [(host, int(port)) for host, port in (address.split(":") for address in addresses)]
    login, rest = found["login"] or "", found["rest"] or ""
    return SentinelUrl(sentinels, found["name"], f"{found['scheme']}://{login}{addresses[0]}{rest}")


def check_url(url: str) -> None:
    """Check the form of a Redis URL.

    Raises:
        ValueError: it is malformed; the message does not repeat the URL, which may contain a password.
    """
    sentinels = sentinel_url(url)
    if sentinels is not None:
        url = sentinels.server_url
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if the port is not a number
        usable = bool(parts.hostname) or (parts.scheme == "unix" and bool(parts.path))
    except ValueError:
        raise ValueError(f"not a URL; write {FORM}, or {SENTINEL_FORM}") from None
    if parts.scheme not in ("redis", "rediss", "unix") or not usable:
        raise ValueError(f"write {FORM}, or {SENTINEL_FORM}")
    if parts.scheme != "unix" and "@" in parts.path + parts.query + parts.fragment:
        # otherwise part of the password would be taken for the host, and shown
        raise ValueError("write '/', '?', '#' and '@' in user and password as %2F, %3F, %23 and %40")
    if parts.scheme != "unix" and not re.fullmatch(r"/?|/\d+/?", parts.path):
        raise ValueError("the database after HOST:PORT/ is a number")


def fits_cluster(url: str) -> bool:
    """Return whether a URL can address a Redis Cluster: a host, no sentinels, and no database but 0."""
    parts = urlsplit(url)
    databases = {parts.path.strip("/"), *parse_qs(parts.query).get("db", [])}
    return parts.scheme in ("redis", "rediss") and databases <= {"", "0"}


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
