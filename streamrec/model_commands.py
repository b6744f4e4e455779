"""What `streamrec models ACTION` says and does: each action takes a registry and gives lines of output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from streamrec.errors import RegistryError

if TYPE_CHECKING:  # torch takes seconds to import, and the command line must answer --help without it
    from streamrec.registry import Registry, Version


def list_versions(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """A line a version, the champion marked."""
    champion = registry.champion()
    for version in registry.versions():
        is_champion = champion is not None and version.version == champion.version
        if options.json:
            yield json.dumps({"version": version.version, "champion": is_champion, "problem": version.problem}
                             | version.metadata, ensure_ascii=False)  # fmt: skip
            continue
        metrics = version.metadata.get("validation") or {}
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("hr@10", "ndcg@10", "mrr@10") if name in metrics)
        what = f"damaged: {version.problem}" if version.problem else f"{version.created_at}  {shown}"
        yield f"{'champion' if is_champion else '':8}  {version.version}  {what}".rstrip()


def show(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """All that is known of a version, a line a field."""
    yield from json.dumps(_known(_find(registry, options.version)), indent=1, ensure_ascii=False).splitlines()


def publish(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Copy a model directory into the registry."""
    from sasrec import ModelDirectoryError, load_model

    try:
        saved = load_model(options.directory)
    except ModelDirectoryError as error:
        raise RegistryError(str(error)) from None
    version = registry.publish(saved.model, saved.vocab, saved.metadata)
    yield f"version {version} is in {registry.folder}"
    if options.promote:
        registry.promote(version, "published by hand")
        yield f"champion: {version}"


def promote(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Make a version the champion."""
    yield f"champion: {registry.promote(_find(registry, options.version).version, options.reason).version}"


def rollback(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Make the champion before this one champion again."""
    yield f"champion: {registry.rollback('rolled back by hand').version}"


def diff(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Fields in which two versions differ."""
    one, other = (_flat(_known(_find(registry, name))) for name in (options.version, options.other))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield f"{name}: {one.get(name, '-')} -> {other.get(name, '-')}"


def prune(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Remove old versions."""
    removed = registry.prune(options.keep)
    yield from (f"removed {version}" for version in removed)
    yield f"{len(registry.versions())} versions are left"


def _find(registry: Registry, name: str) -> Version:
    """The version of that name, or the only one whose name begins so."""
    found = [version for version in registry.versions() if version.version.startswith(name)]
    exact = [version for version in found if version.version == name]
    if len(exact or found) != 1:
        which = ", ".join(version.version for version in found)
        problem = f"is not one version but several: {which}" if found else "is no version"
        raise RegistryError(f"{name!r} {problem} of {registry.folder}; see: streamrec models list")
    return (exact or found)[0]


def _known(version: Version) -> dict[str, Any]:
    return {"version": version.version} | ({"problem": version.problem} if version.problem else version.metadata)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat
