"""Lua scripts: each lies beside the module that runs it, and that module declares it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources


@dataclass(frozen=True)
class Script:
    """A Lua script, read from its file on first use.

    Args:
        package: the package that holds ``NAME.lua``; pass ``__package__``.
        name: also the label of the script in the metrics.
        replicated: wait for ``redis.wait_replicas`` replicas after each call.
        control: arguments of a test call, which succeeds wherever a call with good data succeeds.
    """

    package: str
    name: str
    replicated: bool = False
    control: tuple[str | int, ...] = ()

    @cached_property
    def text(self) -> str:
        """The source of the script."""
        return resources.files(self.package).joinpath(f"{self.name}.lua").read_text()

    @cached_property
    def sha(self) -> str:
        """The name under which Redis caches the script."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
