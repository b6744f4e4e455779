"""`streamrec models`: look at, publish, promote and roll back model versions.

Each action takes the registry and yields lines of output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamrec.commands.options import REDIS, Subparsers, add_command, add_group, place, positive
from streamrec.errors import RedisRejected, RedisUnavailable, RegistryError, StreamrecError
from streamrec.logs import one_line
from streamrec.settings import Settings

if TYPE_CHECKING:  # torch takes seconds to import; --help must not wait for it
    from streamrec.registry import Registry, Version
    from streamrec.serving.online import OnlineFigures


HEADER = (
    "",
    "version",
    "made, UTC",
    "offline on",
    "hr@10",
    "ndcg@10",
    "mrr@10",
    "online hr@10",
    "online mrr@10",
    "popular hr@10",
    "clicks",
)
VERSION_HELP = "name of a version, or its first characters"
SHADOW_HEADER = ("as shadow hr@10", "champion on the same clicks", "same clicks")


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
    _add(actions, "rollback", rollback, "make the previous champion the champion again", _change)
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
    except (RedisUnavailable, RedisRejected) as error:
        print(
            one_line(f"streamrec: the daemons will load it within {settings.registry.poll_s:g} s ({error})"),
            file=sys.stderr,
        )


def list_versions(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """List the versions, mark champion and shadow; ``options.figures`` has the online figures."""
    champion, shadow = registry.champion(), registry.shadow()
    marks = {alias.version: mark for mark, alias in (("shadow", shadow), ("champion", champion)) if alias}
    with_shadows = any(figures.champion_judged for figures in options.figures.values())
    rows: list[tuple[str, ...]] = [HEADER + SHADOW_HEADER if with_shadows else HEADER]
    for version in registry.versions():
        mark, figures = marks.get(version.version, ""), options.figures.get(version.version)
        if options.json:
            known = {
                "version": version.version,
                "champion": mark == "champion",
                "shadow": mark == "shadow",
                "problem": version.problem,
            }
            found = known | version.metadata | {"online": figures and figures.rates()}
            yield json.dumps(found, ensure_ascii=False)
        elif version.problem:
            rows.append((mark, version.version, f"damaged: {version.problem}"))
        else:
            made = version.created_at[:19].replace("T", " ")
            rows.append((mark, version.version, made, *_offline(version), *_online(figures, with_shadows)))
    yield from _aligned(rows) if len(rows) > 1 else ()


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
    yield f"champion: {registry.promote(_find(registry, options.version).version, options.reason).version}"


def rollback(registry: Registry, options: argparse.Namespace) -> Iterator[str]:
    """Make the previous champion the champion again."""
    yield f"champion: {registry.rollback('rolled back by hand').version}"


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


def _offline(version: Version) -> Iterator[str]:
    """Yield the data and the metrics of the gate's comparison, or of training if the gate did not compare it."""
    report = version.metadata.get("report")
    judged = report.get("challenger") if isinstance(report, dict) else None
    validation = version.metadata.get("validation")
    for judged_on, found in (("newest clicks", judged), ("validation", validation), ("-", {})):
        if isinstance(found, dict) and (found or judged_on == "-"):
            yield judged_on
            yield from (_rate(found, name) for name in ("hr@10", "ndcg@10", "mrr@10"))
            return


def _online(figures: OnlineFigures | None, with_shadows: bool) -> Iterator[str]:
    rates = figures.rates() if figures else {}
    yield from (_rate(rates, name) for name in ("hr@10", "mrr@10", "popularity_hr@10"))
    yield f"{rates.get('judged', 0):,}"
    if with_shadows:
        yield from (_rate(rates, name) for name in ("shadow_hr@10", "champion_hr@10"))
        yield f"{rates.get('champion_judged', 0):,}"


def _rate(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield the rows with aligned columns; the last cell of a short row may exceed its column."""
    width = len(rows[0])
    widths = [max(len(row[at]) for row in rows if len(row) == width) for at in range(width)]
    for row in rows:
        yield "  ".join(f"{cell:{size}}" for cell, size in zip(row, widths, strict=False)).rstrip()


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
