"""Model versions in a folder or object store. One version is the champion, another one may be its shadow.

    REGISTRY/
      format               the format version of the registry (formats.py); models have their own
      versions/VERSION/    model directories (sasrec.checkpoint); the manifest, written last, makes one a version
      champion.json        alias of the served version: since when, why, and the champions before it
      shadow.json          alias of the version that scores beside the champion without being published; optional

Each change ends with the write of one file, so a reader sees the state before or after it, even in a crash. An alias is
replaced by compare-and-set: a writer whom another one overtook begins again with the new state.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sasrec import ItemVocab, SASRec
from sasrec.checkpoint import (
    FILES,
    MANIFEST,
    METADATA,
    ModelDirectoryError,
    ModelMetadata,
    SavedModel,
    load_model,
    read_metadata,
    save_model,
)
from streamrec.aliases import Alias, Champion, DecodeError, ShadowAlias, change_alias, read_alias
from streamrec.errors import RegistryError
from streamrec.formats import FILE, check_format, claim_format
from streamrec.storage import ABANDONED_AFTER_S, Place, open_store

CHAMPION, SHADOW, VERSIONS = "champion.json", "shadow.json", "versions"
REMEMBERED_CHAMPIONS = 50
PUBLISH_ATTEMPTS = 3  # while another process publishes a version of the same name


@dataclass(frozen=True)
class Version:
    """A version in the registry. ``problem``: why its metadata cannot be read."""

    version: str
    metadata: ModelMetadata
    problem: str | None = None

    @property
    def created_at(self) -> str:
        """When the version was made, ISO 8601; empty if unknown."""
        return str(self.metadata.get("created_at", ""))


class Registry:
    """Model versions in a folder or below a URL. The first ``publish`` makes the registry.

    Every method raises StoreUnavailable if the folder or object store cannot be read or written.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.store = open_store(place)

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

    def versions(self) -> list[Version]:
        """Return all versions, oldest first."""
        found = []
        for name in self._names():
            try:
                with self._directory(name, (MANIFEST, METADATA)) as path:
                    found.append(Version(name, read_metadata(path)))
            except ModelDirectoryError as error:
                found.append(Version(name, {}, str(error)))
        return sorted(found, key=lambda version: (version.created_at, version.version))

    def publish(self, model: SASRec, vocab: ItemVocab, metadata: ModelMetadata | None = None) -> str:
        """Add a version, whole or not at all, without promoting it; return its name.

        Raises:
            RegistryError: the version cannot be written.
        """
        self._check_format()
        claim_format(self.store)
        with tempfile.TemporaryDirectory(prefix="streamrec-") as made:
            try:
                version = save_model(Path(made) / "model", model, vocab, metadata)
            except (ModelDirectoryError, OSError) as error:
                raise RegistryError(f"cannot publish to {self.store}: {error}") from error
            for _ in range(PUBLISH_ATTEMPTS):
                if self._is_whole(version):  # or a whole version of this name, which has equal weights
                    return version
                self._upload(Path(made) / "model", version)
        raise RegistryError(f"{self.store}: version {version} is damaged again and again; do others publish it too?")

    def load(self, version: str) -> SavedModel:
        """Read and verify a version.

        Raises:
            RegistryError: there is no version of this name, or it is damaged.
        """
        if version not in self._names():
            raise RegistryError(f"{self.store} has no version {version!r}; see: streamrec models list")
        try:
            with self._directory(version) as path:
                return load_model(path)
        except ModelDirectoryError as error:
            raise RegistryError(str(error)) from None

    def promote(self, version: str, reason: str) -> Champion:
        """Verify a version, and make it the champion.

        Raises:
            RegistryError: there is no version of this name, it is damaged, or others change the champion all the time.
        """
        self.load(version)

        def after(now: Champion | None) -> Champion:
            if now is not None and now.version == version:
                return now
            before = () if now is None else (*now.before, now.version)[-REMEMBERED_CHAMPIONS:]
            return Champion(version, _now_ms(), reason, before)

        return self._set_champion(after)

    def rollback(self, reason: str) -> Champion:
        """Make the previous champion champion again; forget the current one as a champion.

        Raises:
            RegistryError: there is no earlier champion, or it is damaged.
        """

        def after(now: Champion | None) -> Champion:
            existing = self._names()
            earlier = [version for version in (now.before if now else ()) if version in existing]
            if not earlier:
                raise RegistryError(f"{self.store}: there is no earlier champion to return to")
            self.load(earlier[-1])
            return Champion(earlier[-1], _now_ms(), reason, tuple(earlier[:-1]))

        self.champion()  # an alias that cannot be read is an error here: it names the earlier champions
        return self._set_champion(after)

    def set_shadow(self, version: str) -> ShadowAlias:
        """Verify a version, and make it the shadow.

        Raises:
            RegistryError: there is no version of this name, or it is damaged or the champion.
        """
        self.load(version)
        now = _readable(self.champion)
        if now is not None and now.version == version:
            raise RegistryError(f"{version} is the champion: the shadow must be another version")
        shadow = ShadowAlias(version, _now_ms())
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
            version = file.name.split("/")[1]
            newest[version] = max(file.modified_s, newest.get(version, 0.0))
        for version in newest.keys() - self._names():
            if time.time() - newest[version] > ABANDONED_AFTER_S:
                self.store.remove(f"{VERSIONS}/{version}", first=MANIFEST)

    def _check_format(self) -> None:
        check_format(
            self.store,
            lambda name: name.startswith(f"{VERSIONS}/"),
            "set another STREAMREC_REGISTRY_DIR",
            RegistryError,
        )

    def _check_exists(self) -> None:
        self._check_format()
        if self.store.read(FILE) is None:
            raise RegistryError(f"there is no registry at {self.store}; publish a model to create one")

    def _names(self) -> set[str]:
        """Return the names of the versions, damaged or not."""
        self._check_format()
        found = (file.name.split("/") for file in self.store.files(VERSIONS))
        return {name[1] for name in found if name[2:] == [MANIFEST]}

    @contextlib.contextmanager
    def _directory(self, version: str, files: tuple[str, ...] = (*FILES, MANIFEST)) -> Iterator[Path]:
        """Yield a folder of this machine with files of a version; errors name its place in the registry."""
        name = f"{VERSIONS}/{version}"
        with self.store.local(name, files) as path:
            try:
                yield path
            except ModelDirectoryError as error:
                raise ModelDirectoryError(str(error).replace(str(path), self.store.at(name))) from None

    def _is_whole(self, version: str) -> bool:
        try:
            self.load(version)
        except RegistryError:
            return False
        return True

    def _upload(self, directory: Path, version: str) -> None:
        """Write the files of a version, the manifest last; of a damaged one it goes first."""
        self.store.delete(f"{VERSIONS}/{version}/{MANIFEST}")
        for name in (*FILES, MANIFEST):
            self.store.write(f"{VERSIONS}/{version}/{name}", (directory / name).read_bytes())

    def _read_alias(self, name: str, kind: type[Alias], remedy: str) -> Alias | None:
        self._check_format()
        try:
            return read_alias(self.store, name, kind)
        except DecodeError as error:
            raise RegistryError(f"{self.store.at(name)} cannot be read: {error}; {remedy} to replace it") from error

    def _set_champion(self, after: Callable[[Champion | None], Champion]) -> Champion:
        champion = self._change(CHAMPION, Champion, after)
        assert champion is not None
        shadow = _readable(self.shadow)
        if shadow is not None and shadow.version == champion.version:
            self._change(SHADOW, ShadowAlias, lambda now: None if now == shadow else now)
        return champion

    def _change(self, name: str, kind: type[Alias], after: Callable[[Alias | None], Alias | None]) -> Alias | None:
        self._check_exists()
        return change_alias(self.store, name, kind, after)


def _readable(read: Callable[[], Alias | None]) -> Alias | None:
    """Return the alias; None if it is unreadable, since the caller replaces it."""
    try:
        return read()
    except RegistryError:
        return None


def _now_ms() -> int:
    return int(time.time() * 1000)
