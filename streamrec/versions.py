"""The versions of a registry (registry.py): publish, list, load.

A version is a model directory (sasrec.checkpoint) below ``versions/``; its manifest, written last, makes it one. It has
a number, greater than that of every version before it: clocks err, so its time is for people alone. Versions of before
have no number. They come first, by their time, which is all that is known of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

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
from streamrec.errors import RegistryError
from streamrec.formats import FILE, check_format, claim_format
from streamrec.storage import Place, open_store

VERSIONS = "versions"
NUMBER = "number"  # in the metadata of a version
PUBLISH_ATTEMPTS = 3  # while another process publishes a version of the same name


@dataclass(frozen=True)
class Version:
    """A version in the registry. ``problem``: why its metadata cannot be read."""

    version: str
    metadata: ModelMetadata
    problem: str | None = None

    @property
    def created_at(self) -> str:
        """When the version was made, ISO 8601, for people; empty if unknown."""
        return str(self.metadata.get("created_at", ""))

    @property
    def order(self) -> tuple[int, str, str]:
        """Its place among the versions. A version of before has no number: only its time is known."""
        number = self.metadata.get(NUMBER)
        return (number, "", self.version) if isinstance(number, int) else (0, self.created_at, self.version)


class Versions:
    """Model versions in a folder or below a URL. The first ``publish`` makes the registry.

    Every method raises StoreUnavailable if the folder or object store cannot be read or written.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.store = open_store(place)

    def versions(self) -> list[Version]:
        """Return all versions, oldest first."""
        found = []
        for name in self._names():
            try:
                with self._directory(name, (MANIFEST, METADATA)) as path:
                    found.append(Version(name, read_metadata(path)))
            except ModelDirectoryError as error:
                found.append(Version(name, {}, str(error)))
        return sorted(found, key=lambda version: version.order)

    def publish(self, model: SASRec, vocab: ItemVocab, metadata: ModelMetadata | None = None) -> str:
        """Add a version, whole or not at all, without promoting it; return its name.

        Raises:
            RegistryError: the version cannot be written.
        """
        self._check_format()
        claim_format(self.store)
        numbered = cast(ModelMetadata, {**(metadata or {}), NUMBER: self._next_number()})
        with tempfile.TemporaryDirectory(prefix="streamrec-") as made:
            try:
                version = save_model(Path(made) / "model", model, vocab, numbered)
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

    def _next_number(self) -> int:
        return max((version.order[0] for version in self.versions()), default=0) + 1

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
