"""A prefix of a bucket in an object store: Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure.

pyarrow's file systems list and delete objects, and find a bucket's region. obstore does what they cannot:

write on a condition    If-Match and If-None-Match, for compare-and-set
read in one request     pyarrow asks for the size first, and the object may be replaced meanwhile; its client for Azure
                        ends the process if a read has no valid credentials
write in one request    pyarrow needs three, unless an option is set that old releases lack

An object appears when its upload is complete, and then is durable: it needs no rename. Stores cannot delete on a
condition: an empty object stands for one that was deleted by ``exchange``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from streamrec.errors import SettingsError, StoreUnavailable, StoreUnreachable

if TYPE_CHECKING:  # both take time to import, and folders need neither
    from obstore.store import ObjectStore

OPTIONS = {"gs": "retry_limit_seconds=10"}  # Google's client would retry for minutes
RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
# http only for an endpoint that says so; a large model may take minutes, a silent server may not
CLIENT: Any = {"allow_http": True, "connect_timeout": "3s", "read_timeout": "10s", "timeout": "10 minutes"}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the service account",
    "abfs": "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or the managed identity",
}
NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|ContainerNotFound|bucket does not exist")
DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|\b40[13]\b|PERMISSION_DENIED|Unauthenticated",
    re.IGNORECASE,
)
# where clients look for the credentials of a machine's role when the environment has none
NO_CREDENTIALS = re.compile(r"169\.254\.\d|metadata\.google|credential|oauth2", re.IGNORECASE)
UNREACHABLE = re.compile(r"NETWORK_CONNECTION|curlCode|HTTP error|timed? ?out|UNAVAILABLE", re.IGNORECASE)
SHOWN_CHARACTERS = 200  # of an error that is none of these


@dataclass(frozen=True)
class StoredFile:
    """A file of a place. ``name``: below the place, with slashes."""

    name: str
    bytes: int
    modified_s: float


@dataclass(frozen=True)
class Seen:
    """The content of a file at a moment, None if there was no file; ``exchange`` compares with it."""

    content: bytes | None
    state: Any = None  # by which an object store recognises it


class Bucket:
    """Files below the URL of an object store. A wrong or unreachable store raises StoreUnavailable.

    Raises:
        SettingsError: obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        if importlib.util.find_spec("obstore") is None:
            raise SettingsError(f"{url} needs the package obstore: pip install 'streamrec[stores]'")
        self._url = url
        self._parts = urlsplit(url)

    def __str__(self) -> str:
        return self._url

    def at(self, name: str) -> str:
        """Return where a file lies, for messages."""
        return f"{self._parts.scheme}://{self._parts.netloc}{self._parts.path.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        return self.seen(name).content

    def files(self, folder: str = "") -> list[StoredFile]:
        """List the files below a folder, in no order."""
        from pyarrow.fs import FileSelector, FileType

        with self._explained("list", folder):
            try:
                found = self._files.get_file_info(FileSelector(self._path(folder), recursive=True))
            except FileNotFoundError:
                return []
        root = len(self._path("")) + 1
        return [
            StoredFile(info.path[root:], info.size, info.mtime.timestamp())
            for info in found
            if info.type == FileType.File
        ]

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        with self._explained("write", name):
            self._objects.put(name, content)

    def delete(self, name: str, durable: bool = True) -> None:
        """Delete a file, if there is one; an object store does it durably."""
        with self._explained("delete", name), contextlib.suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def remove(self, folder: str, first: str) -> None:
        """Delete a folder; this file of it first."""
        self.delete(f"{folder}/{first}")
        with self._explained("delete", folder), contextlib.suppress(FileNotFoundError):
            self._files.delete_dir(self._path(folder))

    def sweep(self, older_than_s: float) -> None:
        """Do nothing: an upload that was interrupted leaves nothing that could be listed."""

    def seen(self, name: str) -> Seen:
        """Read a file that others may replace."""
        with self._explained("read", name):
            try:
                found = self._objects.get(name)
                content = bytes(found.bytes())
            except FileNotFoundError:
                return Seen(None)
        state = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
        return Seen(content or None, {name: value for name, value in state.items() if value})

    def exchange(self, name: str, content: bytes | None, seen: Seen) -> bool:
        """Replace a file, or delete it with None, unless it was changed since it was seen; return whether it was."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._explained("write", name):
            try:
                self._objects.put(name, content or b"", mode=seen.state or "create")
            except (AlreadyExistsError, PreconditionError):
                # a lost answer: the client repeated a write that had succeeded
                return self.seen(name).content == content
        return True

    @contextlib.contextmanager
    def local(self, folder: str, files: Iterable[str]) -> Iterator[Path]:
        """Yield a folder of this machine with a copy of the files that are there; it is deleted at the end."""
        with tempfile.TemporaryDirectory(prefix="streamrec-") as copy:
            for name in files:
                content = self.read(f"{folder}/{name}")
                try:
                    (Path(copy) / name).write_bytes(content) if content is not None else None
                except OSError as error:
                    raise StoreUnavailable(f"cannot copy {self.at(folder)} to {copy}: {error.strerror}") from error
            yield Path(copy)

    @contextlib.contextmanager
    def locked(self, wait: bool = True) -> Iterator[None]:
        """Do nothing: stores have no locks, and writers must be safe without."""
        yield

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self._root, name) if part)

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the path of this place in it."""
        from pyarrow.fs import FileSystem

        option = OPTIONS.get(self._parts.scheme, "")
        query = "&".join(part for part in (self._parts.query, option) if part)
        files, root = FileSystem.from_uri(self._parts._replace(query=query).geturl())
        return files, root.rstrip("/")

    @cached_property
    def _objects(self) -> ObjectStore:
        from obstore.store import from_url

        options = {name: values[0] for name, values in parse_qs(self._parts.query).items()}
        config: Any = {"region": self._files.region} if self._parts.scheme == "s3" else {}
        if endpoint := options.get("endpoint_override"):
            config["endpoint"] = f"{options.get('scheme', 'https')}://{endpoint}"
        url = self._parts._replace(query="").geturl()
        return from_url(url, config=config, client_options=CLIENT, retry_config=RETRIES)

    @contextlib.contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        """Turn the errors of both clients into one line."""
        import pyarrow as pa
        from obstore.exceptions import BaseError

        try:
            yield
        except (OSError, pa.ArrowException, BaseError) as error:
            kind, reason = self._explain(error)
            raise kind(f"cannot {verb} {self.at(name)}: {reason}") from error

    def _explain(self, error: Exception) -> tuple[type[StoreUnavailable], str]:
        text = str(error).split("Debug source")[0]  # obstore adds its settings
        if NO_BUCKET.search(text):
            return StoreUnavailable, "there is no such bucket; create it, or correct the URL"
        denied = f"the store denies access; check {CREDENTIALS[self._parts.scheme]}, and its rights"
        if NO_CREDENTIALS.search(text):
            return StoreUnavailable, denied
        if UNREACHABLE.search(text):
            return StoreUnreachable, "the store cannot be reached; check its address and the network"
        if DENIED.search(text):
            return StoreUnavailable, denied
        return StoreUnavailable, " ".join(text.split())[:SHOWN_CHARACTERS]
