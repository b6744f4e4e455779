"""`streamrec models`: look at, publish, promote and roll back model versions.

Each action takes the registry and yields lines of output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamrec.commands.model_table import HEADER, SHADOW_HEADER, aligned, offline, online
from streamrec.commands.options import REDIS, Subparsers, add_command, add_group, place, positive
from streamrec.errors import RegistryError, StreamrecError
from streamrec.logs import one_line
from streamrec.settings import Settings

if TYPE_CHECKING:  # torch takes seconds to import; --help must not wait for it
    from streamrec.aliases import Champion, Hold
    from streamrec.registry import Registry
    from streamrec.serving.online import OnlineFigures
    from streamrec.versions import Version


VERSION_HELP = "name of a version, or its first characters"


Lines = Callable[["Registry", argparse.Namespace], Iterator[str]]


def add_to(commands: Subparsers) -> None:
    """Declare the command and its actions."""
    actions = add_group(
        commands,
        "models",
        "look at, publish, promote and roll back model versions",
        "Look at and change the model versions in a registry. The daemons serve the champion.",
    )
    command = _add(actions, "list", list_versions, "list the versions and their figures, oldest first", _list)
    command.add_argument("--json", action="store_true", help="one JSON object per line")
    command = _add(actions, "show", show, "print the metadata of a version as JSON")
    _add_version(command)
    command = _add(actions, "publish", publish, "add a model directory to the registry as a version", _change)
    command.add_argument(
        "directory", metavar="DIR", type=Path, help="model directory, made by: sasrec train FILE --out DIR"
    )
    command.add_argument("--promote", action="store_true", help="also make it the champion")
    command = _add(actions, "promote", promote, "verify a version and make it the champion", _change)
    _add_version(command)
    command.add_argument("--reason", default="by hand", help="reason to record [by hand]")
    _add(actions, "rollback", rollback, "make the previous champion the champion again, and hold it", _change)
    command = _add(
        actions, "hold", hold, "let no round of retraining promote, until: streamrec models hold --off", _change
    )
    command.add_argument("--reason", default="by hand", help="reason to record [by hand]")
    command.add_argument("--off", action="store_true", help="lift the hold")
    command = _add(actions, "shadow", shadow, "let a version score some users without publishing its lists", _change)
    command.add_argument("version", metavar="VERSION", nargs="?", help=VERSION_HELP)
    command.add_argument("--off", action="store_true", help="end the shadow")
    command = _add(actions, "diff", diff, "print the differences between the metadata of two versions")
    _add_version(command)
    _add_version(command, "other")
    command = _add(
        actions, "prune", prune, "remove all but the newest versions, the champion, its predecessor and the shadow"
    )
    command.add_argument("--keep", type=positive, default=5, help="newest versions to keep [5]")


def _add(
    actions: Subparsers, name: str, lines: Lines, help: str, run: Callable[..., int] | None = None
) -> argparse.ArgumentParser:
    """Declare an action; those with a ``run`` of their own need Redis."""
    command = add_command(actions, name, run or _print, ("registry_dir", *(REDIS if run else ())), help)
    command.set_defaults(lines=lines)
    return command


def _add_version(command: argparse.ArgumentParser, name: str = "version") -> None:
    command.add_argument(name, metavar="VERSION", help=VERSION_HELP)


def _registry(settings: Settings) -> Registry:
    where = place(settings.registry.dir, "registry_dir")
    from streamrec.registry import Registry

    return Registry(where)


def _print(settings: Settings, options: argparse.Namespace) -> int:
    """Print the lines of an action."""
    for line in options.lines(_registry(settings), options):
        print(one_line(line))
    return 0


def _change(settings: Settings, options: argparse.Namespace) -> int:
    """Run an action that may change the champion, and notify the daemons."""
    _print(settings, options)
    champion = _registry(settings).champion()
    if champion is not None:
        asyncio.run(_notify(settings, champion.version))
    return 0


def _list(settings: Settings, options: argparse.Namespace) -> int:
    """Print the versions with their online figures."""
    versions = [version.version for version in _registry(settings).versions()]
    options.figures = asyncio.run(_online_figures(settings, versions))
    return _print(settings, options)


async def _online_figures(settings: Settings, versions: list[str]) -> dict[str, OnlineFigures]:
    from streamrec.redis.client import RedisClient
    from streamrec.serving.online import read_figures

    try:
        async with RedisClient(settings.redis) as redis:
            return await read_figures(redis, versions)
    except StreamrecError as error:
        print(one_line(f"streamrec: without the online figures ({error})"), file=sys.stderr)
        return {}


async def _notify(settings: Settings, version: str) -> None:
    """Notify the daemons that the champion may have changed."""
    from streamrec.redis.client import RedisClient

    try:
        async with RedisClient(settings.redis) as redis:
            await redis.notify(redis.keys.models_channel, version)
    except StreamrecError as error:
        print(
            one_line(f"streamrec: the daemons will load it within {settings.registry.poll_s:g} s ({error})"),
            file=sys.stderr,
        )


def list_versions(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """List the versions, mark champion and shadow; ``options.figures`` has the online figures."""
    champion, shadow = registry.champion(), registry.shadow()
    marks = {alias.version: mark for mark, alias in (("shadow", shadow), ("champion", champion)) if alias}
    hold = champion.hold if champion else None
    with_shadows = any(figures.champion_judged for figures in options.figures.values())
    rows: list[tuple[str, ...]] = [HEADER + SHADOW_HEADER if with_shadows else HEADER]
    for version in registry.versions():
        mark, figures = marks.get(version.version, ""), options.figures.get(version.version)
        if options.json:
            known = {
                "version": version.version,
                "champion": mark == "champion",
                "hold": hold.reason if hold and mark == "champion" else None,
                "shadow": mark == "shadow",
                "problem": version.problem,
            }
            found = known | version.metadata | {"online": figures and figures.rates()}
            yield json.dumps(found, ensure_ascii=False)
        elif version.problem:
            rows.append((mark, version.version, f"damaged: {version.problem}"))
        else:
            made = version.created_at[:19].replace("T", " ")
            mark += " (on hold)" if hold and mark == "champion" else ""
            rows.append((mark, version.version, made, *offline(version), *online(figures, with_shadows)))
    yield from aligned(rows) if len(rows) > 1 else ()
    if hold is not None:
        print(f"streamrec: {_held(hold)}", file=sys.stderr)


def show(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Print the metadata of a version as JSON."""
    yield from json.dumps(_known(_find(registry, options.version)), indent=1, ensure_ascii=False).splitlines()


def publish(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Add a model directory to the registry as a version."""
    from sasrec import ModelDirectoryError, load_model

    try:
        saved = load_model(options.directory)
    except ModelDirectoryError as error:
        raise RegistryError(str(error)) from None
    version = registry.publish(saved.model, saved.vocab, saved.metadata)
    yield f"version {version} is in {registry.store}"
    if options.promote:
        registry.promote(version, "published by hand")
        yield f"champion: {version}"


def promote(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Make a version the champion."""
    yield from _champion(registry.promote(_find(registry, options.version).version, options.reason))


def rollback(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Make the previous champion the champion again."""
    yield from _champion(registry.rollback("rolled back by hand"))


def hold(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Hold the champion, or lift the hold."""
    yield from _champion(registry.release() if options.off else registry.hold(options.reason))


def shadow(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Set the shadow, or end it."""
    if options.off == bool(options.version):
        raise RegistryError("name a version, or give --off")
    if options.off:
        registry.end_shadow()
        yield "no shadow"
    else:
        yield f"shadow: {registry.set_shadow(_find(registry, options.version).version).version}"


def diff(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Print the fields in which two versions differ."""
    one, other = (_flat(_known(_find(registry, name))) for name in (options.version, options.other))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield f"{name}: {one.get(name, '-')} -> {other.get(name, '-')}"


def prune(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Remove old versions."""
    removed = registry.prune(options.keep)
    yield from (f"removed {version}" for version in removed)
    yield f"{len(registry.versions())} versions are left"


def _champion(champion: Champion) -> Iterator[str]:
    """Yield the champion; print to stderr whether it is on hold."""
    yield f"champion: {champion.version}"
    if champion.hold is not None:
        print(f"streamrec: {_held(champion.hold)}", file=sys.stderr)


def _held(hold: Hold) -> str:
    since = datetime.fromtimestamp(hold.since_ts_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"the champion is on hold since {since} ({hold.reason}): no round of retraining promotes; to lift it: "
        "streamrec models hold --off"
    )


def _find(registry: Registry, name: str) -> Version:
    """Return the version with this name, or the only one whose name starts with it."""
    found = [version for version in registry.versions() if version.version.startswith(name)]
    exact = [version for version in found if version.version == name]
    if len(exact or found) != 1:
        names = ", ".join(version.version for version in found)
        problem = f"matches several versions ({names})" if found else "is no version"
        raise RegistryError(f"{name!r} {problem} of {registry.store}; see: streamrec models list")
    return (exact or found)[0]


def _known(version: Version) -> dict[str, Any]:
    return {"version": version.version} | ({"problem": version.problem} if version.problem else version.metadata)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat
