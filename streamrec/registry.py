"""Versions of the model on disk, and which of them is the champion, and which its shadow.

    REGISTRY/
      format               the version of all this (formats.py); models have one of their own
      versions/VERSION/    model directories (sasrec.checkpoint), renamed into place whole
      champion.json        the alias: version, since when, why, and the champions before it; replaced whole
      shadow.json          the other alias: the version that scores unseen beside the champion; only while there is one

Every change is one rename, so a reader sees the state before it or after it, whatever crashes in between.
Writers of the aliases take turns by a lock on the folder; readers need none.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from sasrec import (
    ItemVocab,
    ModelDirectoryError,
    ModelMetadata,
    SASRec,
    SavedModel,
    load_model,
    read_metadata,
    save_model,
)
from streamrec.durable import replacing
from streamrec.errors import RegistryError
from streamrec.formats import check_folder, claim_folder

CHAMPION, SHADOW, VERSIONS, LOCK = "champion.json", "shadow.json", "versions", "lock"
REMEMBERED_CHAMPIONS = 50
ABANDONED_AFTER_S = 3600.0


class Champion(msgspec.Struct, frozen=True):
    """What the alias says. ``before`` are the champions before it, the latest last."""

    version: str
    since_ts_ms: int
    reason: str
    before: tuple[str, ...] = ()


class ShadowAlias(msgspec.Struct, frozen=True):
    """Which version is the shadow."""

    version: str
    since_ts_ms: int


Alias = TypeVar("Alias", Champion, ShadowAlias)


@dataclass(frozen=True)
class Version:
    """A version as it lies there; ``problem`` says why it cannot be read."""

    version: str
    metadata: ModelMetadata
    problem: str | None = None

    @property
    def created_at(self) -> str:
        """When it was made, ISO-8601; empty where that cannot be read."""
        return str(self.metadata.get("created_at", ""))


class Registry:
    """A folder of versions with a champion among them. It is made when something is first published."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def champion(self) -> Champion | None:
        """The alias; None where no version has been promoted yet.

        Raises:
            RegistryError: it cannot be read.
        """
        return self._alias(CHAMPION, Champion, "promote a version again")

    def shadow(self) -> ShadowAlias | None:
        """The version that scores beside the champion without being published; None where there is none.

        Raises:
            RegistryError: it cannot be read.
        """
        return self._alias(SHADOW, ShadowAlias, "set a shadow again")

    def versions(self) -> list[Version]:
        """Every version, the oldest first."""
        found = []
        for path in self._folders():
            try:
                found.append(Version(path.name, read_metadata(path)))
            except ModelDirectoryError as error:
                found.append(Version(path.name, {}, str(error)))
        return sorted(found, key=lambda version: (version.created_at, version.version))

    def publish(self, model: SASRec, vocab: ItemVocab, metadata: ModelMetadata | None = None) -> str:
        """Put a version there, whole or not at all; returns its name. It is not promoted by that.

        Raises:
            RegistryError: it cannot be written.
        """
        self._check_format()
        incoming = self.folder / VERSIONS / f".{uuid.uuid4().hex}"
        try:
            claim_folder(self.folder)
            version = save_model(incoming, model, vocab, metadata)
            target = self.folder / VERSIONS / version
            if not _is_whole(target):  # the same weights may be there already, or what is left of them
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
            RegistryError: there is none of that name, or it is damaged.
        """
        try:
            return load_model(self._path(version))
        except ModelDirectoryError as error:
            raise RegistryError(str(error)) from None

    def promote(self, version: str, reason: str) -> Champion:
        """Make a version the champion, once it has been read and verified.

        Raises:
            RegistryError: there is none of that name, it is damaged, or the alias cannot be written.
        """
        self.load(version)
        with self._turn():
            now = self._champion_or_none()
            before = () if now is None else (*now.before, now.version)[-REMEMBERED_CHAMPIONS:]
            if now is not None and now.version == version:
                return now
            return self._point_at(Champion(version, int(time.time() * 1000), reason, before))

    def rollback(self, reason: str) -> Champion:
        """Make the champion before this one champion again; what was rolled back is not remembered as one.

        Raises:
            RegistryError: no earlier champion is left, or it is damaged.
        """
        with self._turn():
            now = self.champion()
            there = {path.name for path in self._folders()}
            left = [version for version in (now.before if now else ()) if version in there]
            if not left:
                raise RegistryError(f"{self.folder}: there is no earlier champion to go back to")
            self.load(left[-1])
            return self._point_at(Champion(left[-1], int(time.time() * 1000), reason, tuple(left[:-1])))

    def set_shadow(self, version: str) -> ShadowAlias:
        """Let a version score beside the champion, once it has been read and verified.

        Raises:
            RegistryError: there is none of that name, it is damaged or the champion, or the alias cannot be written.
        """
        self.load(version)
        with self._turn():
            now = self._champion_or_none()
            if now is not None and now.version == version:
                raise RegistryError(f"{version} is the champion: its shadow must be another version")
            return self._write(SHADOW, ShadowAlias(version, int(time.time() * 1000)))

    def end_shadow(self) -> None:
        """Have no shadow any longer.

        Raises:
            RegistryError: there is no registry, or the alias cannot be removed.
        """
        with self._turn():
            self._remove_shadow()

    def prune(self, keep: int) -> list[str]:
        """Remove all but the newest ``keep`` versions, the champion, the one before it and the shadow.

        Returns what went.

        What publishers that crashed have left goes too.

        Raises:
            RegistryError: there is no registry, or a version cannot be removed.
            ValueError: keep is smaller than 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        with self._turn():
            self._sweep()
            now = self._champion_or_none()
            needed = set() if now is None else {now.version, *now.before[-1:]}
            needed |= {shadow.version for shadow in [self._shadow_or_none()] if shadow}
            doomed = [v.version for v in self.versions()[:-keep] if v.version not in needed]
            try:
                for version in doomed:
                    shutil.rmtree(self._path(version))
            except OSError as error:
                raise RegistryError(f"cannot remove {error.filename}: {error.strerror}") from error
        return doomed

    def _sweep(self) -> None:
        for path in (self.folder / VERSIONS).glob(".*"):
            with contextlib.suppress(OSError):  # it is being renamed into place
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(path)

    def _check_format(self) -> None:
        check_folder(self.folder, f"{VERSIONS}/[!.]*", "name another STREAMREC_REGISTRY_DIR", RegistryError)

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

    def _champion_or_none(self) -> Champion | None:
        try:
            return self.champion()
        except RegistryError:
            return None  # about to be replaced

    def _shadow_or_none(self) -> ShadowAlias | None:
        try:
            return self.shadow()
        except RegistryError:
            return None

    def _alias(self, name: str, kind: type[Alias], cure: str) -> Alias | None:
        self._check_format()
        path = self.folder / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise RegistryError(f"{path} cannot be read: {error}; {cure} to replace it") from error

    def _point_at(self, champion: Champion) -> Champion:
        self._write(CHAMPION, champion)
        shadow = self._shadow_or_none()
        if shadow is not None and shadow.version == champion.version:
            self._remove_shadow()
        return champion

    def _write(self, name: str, alias: Alias) -> Alias:
        try:
            with replacing(self.folder / name) as file:
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
    def _turn(self) -> Iterator[None]:
        """One writer of the aliases at a time."""
        self._check_format()
        try:
            lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise RegistryError(
                f"there is no registry at {self.folder} that can be written ({error.strerror}); "
                "publish a model to begin one"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_whole(path: Path) -> bool:
    try:
        load_model(path)
    except ModelDirectoryError:
        return False
    return True
