"""Model versions in a folder or object store. One version is the champion, another one may be its shadow.

    REGISTRY/
      format               the format version of the registry (formats.py); models have their own
      versions/VERSION/    model directories (sasrec.checkpoint); the manifest, written last, makes one a version
      champion.json        alias of the served version: since when, why, the champions before it, and a hold
      shadow.json          alias of the version that scores beside the champion without being published; optional

Each change ends with the write of one file, so a reader sees the state before or after it, even in a crash. An alias is
replaced by compare-and-set: a writer whom another one overtook begins again with the new state. A round of retraining
does not begin again: it claims the alias when it begins, and promotes only if the alias has not changed since.

Versions are ordered by a number that ``publish`` gives them, never by a clock. Old ones without a number come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from sasrec.checkpoint import MANIFEST
from streamrec.aliases import (
    Alias,
    Champion,
    DecodeError,
    Hold,
    ShadowAlias,
    back_to,
    change_alias,
    forward_to,
    now_ms,
    overtaken,
    read_alias,
)
from streamrec.errors import Overtaken, RegistryError
from streamrec.storage import ABANDONED_AFTER_S
from streamrec.versions import VERSIONS, Versions

CHAMPION, SHADOW = "champion.json", "shadow.json"


class Registry(Versions):
    """Model versions, the champion and the shadow.

    Every method raises StoreUnavailable if the folder or object store cannot be read or written.
    """

    def champion(self) -> Champion | None:
        """Return the champion; None if no version was promoted yet.

        Raises:
            RegistryError: the alias cannot be read.
        """
        return self._read_alias(CHAMPION, Champion, "promote a version again")

    def shadow(self) -> ShadowAlias | None:
        """Return the shadow; None if there is none.

        Raises:
            RegistryError: the alias cannot be read.
        """
        return self._read_alias(SHADOW, ShadowAlias, "set a shadow again")

    def promote(self, version: str, reason: str) -> Champion:
        """Verify a version, and make it the champion by hand. One older than the champion gets a hold (``rollback``).

        Raises:
            RegistryError: there is no version of this name, it is damaged, or others change the champion all the time.
        """
        self.load(version)
        places = {known.version: known.order for known in self.versions()}

        def after(now: Champion | None) -> Champion:
            if now is None or now.version == version:
                return now or Champion(version, now_ms(), reason)
            if now.version in places and places[version] < places[now.version]:
                return back_to(version, reason, now, (*now.before, now.version))
            return forward_to(version, reason, now)

        return self._set_champion(after)

    def claim(self) -> Champion | None:
        """Begin a round: return the champion that it is judged against, None if there is none yet.

        A round that claimed before can no longer promote: its worker has lost the lock.

        Raises:
            RegistryError: the alias cannot be read.
        """
        if self.champion() is None:
            return None

        def after(now: Champion | None) -> Champion:
            if now is None:
                raise RegistryError(f"{self.store.at(CHAMPION)} was removed or damaged meanwhile")
            return msgspec.structs.replace(now, writes=now.writes + 1)

        return self._set_champion(after)

    def promote_challenger(self, version: str, reason: str, claimed: Champion | None) -> Champion:
        """Verify a version, and make it the champion if the alias is as ``claim`` returned it.

        Raises:
            Overtaken: the alias has changed.
            RegistryError: the version is damaged.
        """
        self.load(version)

        def after(now: Champion | None) -> Champion:
            if refused := overtaken(claimed, now):
                raise Overtaken(refused)
            if now is None or now.version == version:
                return now or Champion(version, now_ms(), reason)
            return forward_to(version, reason, now)

        return self._set_champion(after)

    def rollback(self, reason: str) -> Champion:
        """Make the previous champion champion again, and hold it; forget the current one as a champion.

        Raises:
            RegistryError: there is no earlier champion, or it is damaged.
        """

        def after(now: Champion | None) -> Champion:
            existing = self._names()
            earlier = [version for version in (now.before if now else ()) if version in existing]
            if now is None or not earlier:
                raise RegistryError(f"{self.store}: there is no earlier champion to return to")
            self.load(earlier[-1])
            return back_to(earlier[-1], reason, now, tuple(earlier[:-1]))

        self.champion()  # an alias that cannot be read is an error here: it names the earlier champions
        return self._set_champion(after)

    def hold(self, reason: str) -> Champion:
        """Let no round of retraining promote, until ``release``.

        Raises:
            RegistryError: there is no champion, or the alias cannot be read.
        """
        return self._set_hold(Hold(now_ms(), reason))

    def release(self) -> Champion:
        """Let rounds promote again.

        Raises:
            RegistryError: there is no champion, or the alias cannot be read.
        """
        return self._set_hold(None)

    def set_shadow(self, version: str) -> ShadowAlias:
        """Verify a version, and make it the shadow.

        Raises:
            RegistryError: there is no version of this name, or it is damaged or the champion.
        """
        self.load(version)
        now = _readable(self.champion)
        if now is not None and now.version == version:
            raise RegistryError(f"{version} is the champion: the shadow must be another version")
        shadow = ShadowAlias(version, now_ms())
        self._change(SHADOW, ShadowAlias, lambda _: shadow)
        return shadow

    def end_shadow(self) -> None:
        """Remove the shadow, if there is one.

        Raises:
            RegistryError: there is no registry.
        """
        self._change(SHADOW, ShadowAlias, lambda _: None)

    def prune(self, keep: int) -> list[str]:
        """Remove old versions, and what crashed processes left behind; return the names of the removed versions.

        The newest ``keep`` versions, the champion, the previous champion and the shadow are not removed.

        Raises:
            RegistryError: there is no registry.
            ValueError: keep is smaller than 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        self._check_exists()
        self._remove_abandoned()
        now = _readable(self.champion)
        protected = set() if now is None else {now.version, *now.before[-1:]}
        protected |= {shadow.version for shadow in [_readable(self.shadow)] if shadow}
        doomed = [v.version for v in self.versions()[:-keep] if v.version not in protected]
        for version in doomed:
            self.store.remove(f"{VERSIONS}/{version}", first=MANIFEST)
        return doomed

    def _remove_abandoned(self) -> None:
        """Remove unfinished versions of processes that crashed."""
        self.store.sweep(ABANDONED_AFTER_S)
        newest: dict[str, float] = {}
        for file in self.store.files(VERSIONS):
            if file.name.count("/") > 1:  # a file beside the versions is none of ours
                version = file.name.split("/")[1]
                newest[version] = max(file.modified_s, newest.get(version, 0.0))
        now_s = min(time.time(), max(newest.values(), default=0.0))  # by both clocks: one alone may be wrong
        for version in newest.keys() - self._names():
            if now_s - newest[version] > ABANDONED_AFTER_S:
                self.store.remove(f"{VERSIONS}/{version}", first=MANIFEST)

    def _read_alias(self, name: str, kind: type[Alias], remedy: str) -> Alias | None:
        self._check_format()
        try:
            return read_alias(self.store, name, kind)
        except DecodeError as error:
            raise RegistryError(f"{self.store.at(name)} cannot be read: {error}; {remedy} to replace it") from error

    def _set_champion(self, after: Callable[[Champion | None], Champion]) -> Champion:
        def counted(now: Champion | None) -> Champion:
            new = after(now)
            return new if new == now else msgspec.structs.replace(new, writes=now.writes + 1 if now else 1)

        champion = self._change(CHAMPION, Champion, counted)
        assert champion is not None
        shadow = _readable(self.shadow)
        if shadow is not None and shadow.version == champion.version:
            self._change(SHADOW, ShadowAlias, lambda now: None if now == shadow else now)
        return champion

    def _set_hold(self, hold: Hold | None) -> Champion:
        def after(now: Champion | None) -> Champion:
            if now is None:
                raise RegistryError(f"{self.store} has no champion to hold; promote a version first")
            return msgspec.structs.replace(now, hold=hold)

        self.champion()
        return self._set_champion(after)

    def _change(self, name: str, kind: type[Alias], after: Callable[[Alias | None], Alias | None]) -> Alias | None:
        self._check_exists()
        return change_alias(self.store, name, kind, after)


def _readable(read: Callable[[], Alias | None]) -> Alias | None:
    """Return the alias; None if it is unreadable, since the caller replaces it."""
    try:
        return read()
    except RegistryError:
        return None
