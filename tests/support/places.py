"""Folders and object stores for tests: the same tests run on both."""

from __future__ import annotations

import pytest

from streamrec.storage import Place

from support.s3_server import S3Server


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process and its children to the server."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def below(place: Place, name: str) -> Place:
    """Return a place below another one."""
    return f"{place}/{name}" if isinstance(place, str) else place / name
