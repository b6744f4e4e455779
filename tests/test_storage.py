"""Folders and object stores: the same operations, and errors in one clear line."""

from __future__ import annotations

import errno
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from streamrec.archive.segments import EventArchive
from streamrec.bucket import Bucket
from streamrec.commands.main import main
from streamrec.errors import SettingsError, StoreUnavailable
from streamrec.local.process import free_port
from streamrec.registry import Registry
from streamrec.storage import Folder, Place, open_store
from streamrec.store_urls import check_place

from support.file_systems import (
    LIMITED,
    LIMITED_IDS,
    FileSystem,
    without_flush,
    without_flush_of_folders,
    without_locks,
)
from support.registry import publish
from support.s3_server import REFUSED_KEY, SECRET, S3Server

URLS = {
    "s3://models": (pyarrow.fs.S3FileSystem, "models"),
    "s3://models/a/b/?region=eu-west-1": (pyarrow.fs.S3FileSystem, "models/a/b"),
    "s3://models/a?endpoint_override=minio:9000&scheme=http&region=x": (pyarrow.fs.S3FileSystem, "models/a"),
    "gs://models/a": (pyarrow.fs.GcsFileSystem, "models/a"),
    "abfs://models@account.dfs.core.windows.net/a": (pyarrow.fs.AzureFileSystem, "models/a"),
}


def names(store: Folder | Bucket, folder: str = "") -> list[str]:
    return sorted(file.name for file in store.files(folder))


def test_files_are_written_listed_read_replaced_and_deleted(place: Place) -> None:
    store = open_store(place)
    assert (names(store), store.read("a")) == ([], None)
    store.delete("a")
    for name in ("a", "one/b", "one/c", "two/three/d"):
        store.write(name, name.encode())
    assert names(store) == ["a", "one/b", "one/c", "two/three/d"]
    assert (names(store, "one"), names(store, "none")) == (["one/b", "one/c"], [])
    assert {file.bytes for file in store.files("two")} == {11}
    store.write("a", b"x" * 20_000_000)  # more than one part
    assert store.read("a") == b"x" * 20_000_000
    with store.local("one", ("b", "missing")) as folder:
        assert (folder / "b").read_bytes() == b"one/b"
        assert not (folder / "missing").exists()
    store.delete("a")
    store.remove("one", first="c")
    store.remove("one", first="c")
    assert names(store) == ["two/three/d"]


def test_a_file_is_exchanged_only_if_it_is_as_it_was_seen(place: Place) -> None:
    store, other = open_store(place), open_store(place)
    store.write("format", b"1")
    nothing = store.seen("alias")
    assert nothing.content is None
    assert other.exchange("alias", b"one", other.seen("alias"))
    assert not store.exchange("alias", b"two", nothing), "it was made meanwhile"
    seen = store.seen("alias")
    assert seen.content == b"one"
    assert other.exchange("alias", b"two", seen)
    assert not store.exchange("alias", b"three", seen)
    assert not store.exchange("alias", None, seen)
    assert store.seen("alias").content == b"two"
    assert store.exchange("alias", None, store.seen("alias"))
    gone = store.seen("alias")
    assert gone.content is None
    assert other.exchange("alias", b"four", gone)
    assert not store.exchange("alias", b"five", gone)
    assert store.seen("alias").content == b"four"


def test_a_write_whose_answer_was_lost_has_succeeded(s3: S3Server) -> None:
    store = open_store(s3.new_bucket())
    seen = store.seen("alias")
    assert store.exchange("alias", b"one", seen)
    assert store.exchange("alias", b"one", seen), "the client sends it again, and its own write is there"


@pytest.mark.parametrize("url", URLS)
def test_a_url_leads_to_the_file_system_of_its_store(url: str, s3: S3Server) -> None:
    kind, root = URLS[url]
    assert check_place(url) == url
    store = open_store(url)
    assert isinstance(store, Bucket)
    assert isinstance(store._files, kind)
    assert store._path("x/y") == f"{root}/x/y"
    assert type(store._objects).__name__ == {"s3": "S3Store", "gs": "GCSStore", "ab": "AzureStore"}[url[:2]]
    assert store.at("x").endswith("/x")
    assert "?" not in store.at("x")


@pytest.mark.parametrize("folder", ["models", "/models", "C:/models", "a:b", "./s3"])
def test_another_text_is_a_folder(folder: str) -> None:
    assert check_place(folder) == Path(folder)
    assert isinstance(open_store(Path(folder)), Folder)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/models", "no object store has the scheme 'ftp'; write a folder, s3://BUCKET/PREFIX, gs://"),
        ("s3a://models", "no object store has the scheme 's3a'"),
        ("s3:/models", "write s3://BUCKET/PREFIX"),
        ("s3://", "write s3://BUCKET/PREFIX"),
        (f"s3://AKIA:{SECRET}@models/a", "credentials come from the environment or from a role, never from the URL"),
        (f"gs://{SECRET}@models/a", "credentials come from the environment"),
        ("abfs://models/a", "write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"),
        (f"abfs://models:{SECRET}@account.dfs.core.windows.net/a", "credentials come from the environment"),
        (f"s3://models/a?secret_key={SECRET}", "after '?' are: region, scheme, endpoint_override"),
        (f"abfs://c@account.dfs.core.windows.net/a?client_secret={SECRET}", "after '?' are: none"),
        (f"s3://[{SECRET}", "not a URL"),
    ],
)
def test_a_wrong_url_is_explained_and_not_repeated(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, variable in (("models", "registry_dir"), ("archive", "archive_dir")):
        monkeypatch.setenv(f"STREAMREC_{variable.upper()}", url)
        assert main([command, {"models": "list", "archive": "stats"}[command]]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"streamrec: {variable}: ")
        assert message in err
        assert (err.count("\n"), SECRET in err, "Traceback" in err) == (1, False, False)
        monkeypatch.delenv(f"STREAMREC_{variable.upper()}")


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str], model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run commands on a URL; each fails in one line without secrets, which is returned."""

    def run(url: str) -> set[str]:
        lines = set()
        monkeypatch.setenv("STREAMREC_LOG_LEVEL", "DEBUG")
        monkeypatch.setenv("STREAMREC_REDIS_URL", "redis://127.0.0.1:1/0")
        for command in (
            ("models", "show", "x", "--registry-dir", url),
            ("models", "publish", str(model_dir), "--promote", "--registry-dir", url),
            ("archive", "stats", "--archive-dir", url),
            ("check", "--registry-dir", url, "--kafka-bootstrap-servers", "127.0.0.1:1"),
        ):
            log = io.StringIO()
            handler = logging.StreamHandler(log)
            logging.getLogger().addHandler(handler)
            assert main([*command]) == 1, command
            out, err = capsys.readouterr()
            logging.getLogger().removeHandler(handler)
            assert SECRET not in out + err + log.getvalue()
            assert "Traceback" not in err
            lines.add(out.splitlines()[0] if command[0] == "check" else err.splitlines()[-1])
        return lines

    return run


def test_a_missing_bucket_is_named(failing: Callable[[str], set[str]], s3: S3Server) -> None:
    for line in failing("s3://no-such-bucket/a"):
        assert "s3://no-such-bucket/a" in line
        assert line.endswith("there is no such bucket; create it, or correct the URL")


def test_refused_credentials_are_reported(
    failing: Callable[[str], set[str]], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", REFUSED_KEY)
    for line in failing(s3.new_bucket()):
        assert "the store denies access; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role" in line


def test_missing_credentials_are_reported(
    failing: Callable[[str], set[str]], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for line in failing(s3.new_bucket()):
        assert "the store denies access; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role" in line


def test_an_alias_is_not_exchanged_without_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3.new_bucket())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for use in (lambda: store.seen("alias"), lambda: store.exchange("alias", b"", open_store("s3://a").seen("b"))):
        with pytest.raises(StoreUnavailable, match="denies access"):
            use()


def test_an_endpoint_that_cannot_be_reached_is_reported(
    failing: Callable[[str], set[str]], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for line in failing("s3://models/a"):
        assert "cannot read s3://models/a/format: the store cannot be reached; check its address" in line


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match=r"s3://models needs the package obstore: pip install 'streamrec\[stores\]'"
    ):
        open_store("s3://models")


def test_a_folder_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(tmp_path / "file" / "models")
    for use in (lambda: store.read("a"), lambda: store.write("a", b""), store.files):
        with pytest.raises(StoreUnavailable, match=r"cannot .*/file/models.*: (Not a directory|File exists)"):
            use()


# --- file systems that can do less


@pytest.mark.parametrize(("limited", "code"), LIMITED, ids=LIMITED_IDS)
def test_what_was_written_is_not_reported_as_failed_where_the_system_can_do_less_than_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: FileSystem, code: int
) -> None:
    limited(monkeypatch, code)
    store = open_store(tmp_path / "a" / "b")
    store.write("one/two", b"three")
    assert store.exchange("one/two", b"four", store.seen("one/two"))
    assert store.read("one/two") == b"four"
    assert publish(registry := Registry(tmp_path / "registry"), seed=1) == registry.versions()[0].version


def test_a_disk_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limited in (without_flush, without_flush_of_folders, without_locks):
        with monkeypatch.context() as patch:
            limited(patch, errno.EIO)
            store = open_store(tmp_path)
            with pytest.raises(StoreUnavailable, match="Input/output error"):
                store.exchange("alias", b"one", store.seen("alias"))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, None], ids=lambda code: str(code))
def test_without_locks_all_works_and_a_warning_says_what_to_see_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int | None
) -> None:
    if code is None:
        monkeypatch.setattr("streamrec.storage.fcntl", None)  # Windows
    else:
        without_locks(monkeypatch, code)
    store = open_store(tmp_path / "models")
    for content in (b"one", b"two"):
        store.write("other", content)
        assert store.exchange("alias", content, store.seen("alias"))
    assert store.read("alias") == b"two"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path}/models cannot be locked (" in warning
    assert "see that one process at a time changes the champion or writes the archive" in warning
    archive = EventArchive(tmp_path / "archive")
    with archive.following():
        archive.append(0, 0, 1, [])
    assert archive.next_offsets() == {0: 1}
