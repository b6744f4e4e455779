"""Model versions on disk. One version is the champion, another one may be its shadow.

    REGISTRY/
      format               the format version of the folder (formats.py); models have their own
      versions/VERSION/    model directories (sasrec.checkpoint), renamed into place
      champion.json        alias of the served version: since when, why, and the champions before it
      shadow.json          alias of the version that scores beside the champion without being published; optional

Each change is one rename, so a reader sees the state before or after it, even in a crash. Writers of the aliases hold
a lock on the folder; readers need none.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from sasrec import ItemVocab, SASRec
from sasrec.checkpoint import ModelDirectoryError, ModelMetadata, SavedModel, load_model, read_metadata, save_model
from streamrec.durable import atomic_file
from streamrec.errors import RegistryError
from streamrec.formats import check_folder, claim_folder

CHAMPION, SHADOW, VERSIONS, LOCK = "champion.json", "shadow.json", "versions", "lock"
REMEMBERED_CHAMPIONS = 50
ABANDONED_AFTER_S = 3600.0


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
    """A folder of model versions. The first ``publish`` makes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        for path in self._folders():
            try:
                found.append(Version(path.name, read_metadata(path)))
            except ModelDirectoryError as error:
                found.append(Version(path.name, {}, str(error)))
        return sorted(found, key=lambda version: (version.created_at, version.version))

    def publish(self, model: SASRec, vocab: ItemVocab, metadata: ModelMetadata | None = None) -> str:
        """Add a version, whole or not at all, without promoting it; return its name.

        Raises:
            RegistryError: the version cannot be written.
        """
        self._check_format()
        incoming = self.folder / VERSIONS / f".{uuid.uuid4().hex}"
        try:
            claim_folder(self.folder)
            version = save_model(incoming, model, vocab, metadata)
            target = self.folder / VERSIONS / version
            if not _is_whole(target):  # a whole version of this name has equal weights
                shutil.rmtree(target, ignore_errors=True)
                incoming.rename(target)
        except (ModelDirectoryError, OSError) as error:
            raise RegistryError(f"cannot publish to {self.folder}: {error}") from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return version

    def load(self, version: str) -> SavedModel:
        """Read and verify a version.

        Raises:
            RegistryError: there is no version of this name, or it is damaged.
        """
        try:
            return load_model(self._path(version))
        except ModelDirectoryError as error:
            raise RegistryError(str(error)) from None

    def promote(self, version: str, reason: str) -> Champion:
        """Verify a version, and make it the champion.

        Raises:
            RegistryError: there is no version of this name, it is damaged, or the alias cannot be written.
        """
        self.load(version)
        with self._locked():
            now = _readable(self.champion)
            before = () if now is None else (*now.before, now.version)[-REMEMBERED_CHAMPIONS:]
            if now is not None and now.version == version:
                return now
            return self._set_champion(Champion(version, int(time.time() * 1000), reason, before))

    def rollback(self, reason: str) -> Champion:
        """Make the previous champion champion again; forget the current one as a champion.

        Raises:
            RegistryError: there is no earlier champion, or it is damaged.
        """
        with self._locked():
            now = self.champion()
            existing = {path.name for path in self._folders()}
            earlier = [version for version in (now.before if now else ()) if version in existing]
            if not earlier:
                raise RegistryError(f"{self.folder}: there is no earlier champion to return to")
            self.load(earlier[-1])
            return self._set_champion(Champion(earlier[-1], int(time.time() * 1000), reason, tuple(earlier[:-1])))

    def set_shadow(self, version: str) -> ShadowAlias:
        """Verify a version, and make it the shadow.

        Raises:
            RegistryError: there is no version of this name, it is damaged or the champion, or the alias cannot be
                written.
        """
        self.load(version)
        with self._locked():
            now = _readable(self.champion)
            if now is not None and now.version == version:
                raise RegistryError(f"{version} is the champion: the shadow must be another version")
            return self._write_alias(SHADOW, ShadowAlias(version, int(time.time() * 1000)))

    def end_shadow(self) -> None:
        """Remove the shadow, if there is one.

        Raises:
            RegistryError: there is no registry, or the alias cannot be removed.
        """
        with self._locked():
            self._remove_shadow()

    def prune(self, keep: int) -> list[str]:
        """Remove old versions, and what crashed processes left behind; return the names of the removed versions.

        The newest ``keep`` versions, the champion, the previous champion and the shadow are not removed.

        Raises:
            RegistryError: there is no registry, or a version cannot be removed.
            ValueError: keep is smaller than 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        with self._locked():
            self._remove_abandoned()
            now = _readable(self.champion)
            protected = set() if now is None else {now.version, *now.before[-1:]}
            protected |= {shadow.version for shadow in [_readable(self.shadow)] if shadow}
            doomed = [v.version for v in self.versions()[:-keep] if v.version not in protected]
            try:
                for version in doomed:
                    shutil.rmtree(self._path(version))
            except OSError as error:
                raise RegistryError(f"cannot remove {error.filename}: {error.strerror}") from error
        return doomed

    def _remove_abandoned(self) -> None:
        """Remove unfinished versions of processes that crashed."""
        for path in (self.folder / VERSIONS).glob(".*"):
            with contextlib.suppress(OSError):  # its publisher may rename it now
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(path)

    def _check_format(self) -> None:
        check_folder(self.folder, f"{VERSIONS}/[!.]*", "set another STREAMREC_REGISTRY_DIR", RegistryError)

    def _folders(self) -> list[Path]:
        self._check_format()
        try:
            return [path for path in (self.folder / VERSIONS).iterdir() if path.is_dir() and path.name[0] != "."]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RegistryError(f"cannot read {self.folder}: {error.strerror}") from error

    def _path(self, version: str) -> Path:
        if version not in {path.name for path in self._folders()}:
            raise RegistryError(f"{self.folder} has no version {version!r}; see: streamrec models list")
        return self.folder / VERSIONS / version

    def _read_alias(self, name: str, kind: type[Alias], remedy: str) -> Alias | None:
        self._check_format()
        path = self.folder / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise RegistryError(f"{path} cannot be read: {error}; {remedy} to replace it") from error

    def _set_champion(self, champion: Champion) -> Champion:
        self._write_alias(CHAMPION, champion)
        shadow = _readable(self.shadow)
        if shadow is not None and shadow.version == champion.version:
            self._remove_shadow()
        return champion

    def _write_alias(self, name: str, alias: Alias) -> Alias:
        try:
            with atomic_file(self.folder / name) as file:
                file.write(msgspec.json.encode(alias))
        except OSError as error:
            raise RegistryError(f"cannot write {self.folder / name}: {error.strerror}") from error
        return alias

    def _remove_shadow(self) -> None:
        try:
            (self.folder / SHADOW).unlink(missing_ok=True)
        except OSError as error:
            raise RegistryError(f"cannot remove {self.folder / SHADOW}: {error.strerror}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the aliases for one writer."""
        self._check_format()
        try:
            lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise RegistryError(
                f"there is no registry at {self.folder} that can be written ({error.strerror}); publish a model to "
                "create one"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _readable(read: Callable[[], Alias | None]) -> Alias | None:
    """Return the alias; None if it is unreadable, since the caller replaces it."""
    try:
        return read()
    except RegistryError:
        return None


def _is_whole(path: Path) -> bool:
    try:
        load_model(path)
    except ModelDirectoryError:
        return False
    return True
