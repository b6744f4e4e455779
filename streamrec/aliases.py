"""The aliases of a registry: small JSON files that name a version, replaced by compare-and-set."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from streamrec.errors import RegistryError
from streamrec.storage import Store

REMEMBERED = 50  # champions, and rejected versions
ATTEMPTS = 20  # while other processes change the same alias
DecodeError = msgspec.MsgspecError


class Hold(msgspec.Struct, frozen=True):
    """A person's word that no round of retraining may promote, until a person lifts it."""

    since_ts_ms: int
    reason: str


class Champion(msgspec.Struct, frozen=True):
    """The alias of the served version.

    ``before``: earlier champions, newest last. ``rejected``: versions that a person replaced by an older one, newest
    last. ``writes`` grows with every write of the alias: a round promotes only on the count that it has claimed.
    """

    version: str
    since_ts_ms: int
    reason: str
    before: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    hold: Hold | None = None
    writes: int = 0


class ShadowAlias(msgspec.Struct, frozen=True):
    """The alias of the shadow."""

    version: str
    since_ts_ms: int


Alias = TypeVar("Alias", Champion, ShadowAlias)


def read_alias(store: Store, name: str, kind: type[Alias]) -> Alias | None:
    """Return an alias; None if there is none.

    Raises:
        DecodeError: the file is damaged.
        StoreUnavailable: the file cannot be read.
    """
    content = store.seen(name).content
    return None if content is None else msgspec.json.decode(content, type=kind)


def change_alias(
    store: Store, name: str, kind: type[Alias], after: Callable[[Alias | None], Alias | None]
) -> Alias | None:
    """Replace an alias by the one that follows it; begin again if another process was faster. Return the new one.

    Args:
        after: gets the alias, None if there is none or it is damaged; returns the new one, None to remove it.

    Raises:
        RegistryError: others were faster each time.
        StoreUnavailable: the file cannot be read or written.
    """
    for _ in range(ATTEMPTS):
        seen = store.seen(name)
        now = None
        with contextlib.suppress(DecodeError):
            now = None if seen.content is None else msgspec.json.decode(seen.content, type=kind)
        new = after(now)
        content = None if new is None else msgspec.json.encode(new)
        if content == seen.content or store.exchange(name, content, seen):
            return new
    raise RegistryError(f"other processes change {store.at(name)} all the time; try again later")


def overtaken(claimed: Champion | None, now: Champion | None) -> str | None:
    """Return why a round that has claimed a champion must not promote; None if it may."""
    if now is not None and now.hold is not None:
        return f"the champion {now.version} is on hold ({now.hold.reason}); to lift it: streamrec models hold --off"
    if (now and now.version) != (claimed and claimed.version):
        return (
            f"it was judged against {claimed.version if claimed else 'no champion'}, and meanwhile "
            f"{now.version if now else 'none'} has become champion"
        )
    if now != claimed:
        return "meanwhile another worker began a round, or the champion was changed and changed back"
    return None


def forward_to(version: str, reason: str, now: Champion) -> Champion:
    """Return the alias of a new champion."""
    before = (*now.before, now.version)[-REMEMBERED:]
    rejected = tuple(each for each in now.rejected if each != version)
    return Champion(version, now_ms(), reason, before, rejected, now.hold)


def back_to(version: str, reason: str, now: Champion, before: tuple[str, ...]) -> Champion:
    """Return the alias of an older champion that comes back, with a hold, so that no round undoes it."""
    rejected = (*(each for each in now.rejected if each not in (version, now.version)), now.version)
    return Champion(version, now_ms(), reason, before, rejected[-REMEMBERED:], Hold(now_ms(), reason))


def now_ms() -> int:
    """Return the Unix time, for people who read an alias."""
    return int(time.time() * 1000)
