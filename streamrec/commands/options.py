"""The common part of all commands: how to declare one, flags of settings, types of options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from streamrec.errors import StreamrecError
from streamrec.settings import Setting, Settings, own_settings

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[Settings, argparse.Namespace], int]

EPILOG = (
    "Flags override the environment (STREAMREC_*), and both override the file of --config. "
    "`streamrec check --show` prints all settings."
)
KAFKA = ("kafka_bootstrap_servers", "kafka_topic")
REDIS = ("redis_url",)


def add_command(
    commands: Subparsers, name: str, run: Run, settings: Iterable[str], help: str, description: str = ""
) -> argparse.ArgumentParser:
    """Declare a command.

    Args:
        settings: names of the settings with a flag; the others come from environment or file.
        description: for `--help` of the command [``help`` as a sentence].
    """
    text = (description or f"{help[0].upper()}{help[1:]}.").replace("%", "%%")
    command = commands.add_parser(name, epilog=EPILOG, help=help, description=text)
    command.set_defaults(run=run)
    command.add_argument("--config", metavar="FILE", type=Path, help="settings file (TOML)")
    group = command.add_argument_group("settings")
    for setting in settings:
        _add_flag(group, own_settings()[setting])
    return command


def add_group(commands: Subparsers, name: str, help: str, description: str) -> Subparsers:
    """Declare a command with actions; return the object to declare them on."""
    parser = commands.add_parser(name, epilog=EPILOG, help=help, description=description)
    return parser.add_subparsers(required=True, metavar="ACTION")


def given_flags(options: argparse.Namespace) -> dict[str, object]:
    """Return the settings that were given as flags, by name."""
    return {name: value for name, value in vars(options).items() if name in own_settings()}


def place(value: Path | str | None, name: str) -> Path | str:
    """Return the folder or URL that a setting names.

    Raises:
        StreamrecError: it is not set.
    """
    if value is None:
        setting = own_settings()[name]
        raise StreamrecError(f"no {setting.group}: set {setting.variable} or {setting.flag}")
    return value


def rate(text: str) -> float:
    """Parse a rate per second; 0 is as fast as possible."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("must be a number per second, or 0 for as fast as possible")
    return number


def seconds(text: str) -> float:
    """Parse a time such as 90s, 30m, 6h or 1d."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(text[-1:])
    try:
        found = float(number) * unit if unit else math.nan
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError("write a time as 90s, 30m, 6h or 1d")
    return found


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    shown = f" [{setting.default}]" if setting.default not in (None, "", (), {}) and "[" not in setting.help else ""
    text = f"{setting.help}{shown}".replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    metavar = None if setting.choices else "URL" if setting.secret else _metavar(setting.kinds[0])
    # no type here: the settings check values from flags, environment and file alike
    group.add_argument(setting.flag, choices=setting.choices or None, metavar=metavar, help=text)


def _metavar(kind: object) -> str:
    return kind.__name__.upper() if isinstance(kind, type) else "TEXT"
