"""The aliases of a registry: small JSON files that name a version, replaced by compare-and-set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import msgspec

from streamrec.errors import RegistryError
from streamrec.storage import Store

ATTEMPTS = 20  # while other processes change the same alias
DecodeError = msgspec.MsgspecError


class Champion(msgspec.Struct, frozen=True):
    """The alias of the served version. ``before``: earlier champions, newest last."""

    version: str
    since_ts_ms: int
    reason: str
    before: tuple[str, ...] = ()


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
