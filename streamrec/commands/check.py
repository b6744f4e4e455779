"""`streamrec check`: report whether Kafka, Redis, the topics and the model can be used."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from itertools import groupby
from typing import NamedTuple

from streamrec.commands.options import KAFKA, REDIS, Subparsers, add_command
from streamrec.errors import StreamrecError
from streamrec.logs import json_line, one_line
from streamrec.settings import Settings


class Finding(NamedTuple):
    """One line of the report."""

    part: str
    ok: bool
    detail: str


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "check",
        run,
        (*KAFKA, *REDIS, "model_dir", "registry_dir"),
        "report whether Kafka, Redis, topics and model can be used",
        "Report whether Kafka, Redis, the topics and the model can be reached and used, one line each. The exit status "
        "is 0 if all can, else 1.",
    )
    command.add_argument(
        "--show", action="store_true", help="print the settings in force as a TOML file instead, secrets masked"
    )


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Print a line for each finding, or the settings."""
    if options.show:
        print("\n".join(_settings(settings)))
        return 0

    async def report() -> int:
        failed = 0
        async for finding in check(settings):
            failed += not finding.ok
            print(one_line(f"{'ok    ' if finding.ok else 'FAILED'}  {finding.part:6}  {finding.detail}"), flush=True)
        return int(failed > 0)

    return asyncio.run(report())


async def check(settings: Settings) -> AsyncIterator[Finding]:
    """Yield the findings, each as soon as it is made."""
    from streamrec.kafka.schema_registry import SchemaRegistry
    from streamrec.kafka.topics import topic_partitions
    from streamrec.redis.client import RedisClient

    try:
        yield Finding("model", True, _model(settings))
    except StreamrecError as error:
        yield Finding("model", False, str(error))
    try:
        async with RedisClient(settings.redis) as redis:
            await redis.ping()
            await redis.check_format(claim=False)
            await redis.probe()
        yield Finding("Redis", True, f"{settings.redis.address} answers")
    except StreamrecError as error:
        yield Finding("Redis", False, str(error))
    registry = settings.events.schema_registry
    if registry.url:
        try:
            await SchemaRegistry(registry).check()
            yield Finding("schema", True, f"{registry.url} answers")
        except StreamrecError as error:
            yield Finding("schema", False, str(error))
    wanted = (settings.kafka.topic, settings.kafka.dead_letters, settings.items.topic)
    try:
        topics = await topic_partitions(settings.kafka, tuple(filter(None, wanted)))
    except StreamrecError as error:
        yield Finding("Kafka", False, str(error))
        return
    yield Finding("Kafka", True, f"{settings.kafka.bootstrap_servers} answers")
    for topic, partitions in topics.items():
        detail = f"{topic}: {partitions} partitions" if partitions else f"{topic} does not exist yet; serve creates it"
        yield Finding("topic", True, detail)


def _model(settings: Settings) -> str:
    from streamrec.registry import Registry
    from streamrec.serving.model import read_model

    saved = read_model(settings)
    config = saved.model.config
    champion = Registry(settings.registry.dir).champion() if settings.registry.dir is not None else None
    held = f"; on hold ({champion.hold.reason}): no round promotes" if champion and champion.hold else ""
    return (
        f"{saved.version} in {settings.registry.dir or settings.model.dir}: {len(saved.vocab):,} items, "
        f"max_len {config.max_len}, {config.num_blocks} blocks of {config.hidden_units}, {config.position} positions"
        + held
    )


def _settings(settings: Settings) -> list[str]:
    """Return the settings in force as lines of a TOML file."""
    lines = []
    for group, values in groupby(settings.shown().items(), key=lambda item: item[0].group):
        lines.append(f"[{group}]")
        for setting, value in values:
            lines.append(f"# {setting.key} is not set" if value is None else f"{setting.key} = {_toml(value)}")
        lines.append("")
    return lines[:-1]


def _toml(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json_line(key)} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, tuple):
        return json_line(list(value))
    return json_line(str(value))
