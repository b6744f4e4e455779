"""Load settings: flags win over the environment (STREAMREC_*), this over a TOML file, this over defaults.

A secret may also come from a file; variable STREAMREC_NAME_FILE contains its path.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamrec.errors import SettingsError
from streamrec.secret_files import secrets_in_files
from streamrec.settings import ENV_PREFIX, Settings, all_settings, find_setting, own_settings


def load_settings(config: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Load settings from flags, environment and a TOML file.

    Args:
        flags: values by name; None means not set.

    Raises:
        SettingsError: a file cannot be read, a name is unknown, or a value is wrong.
    """
    names = secret_variables()
    secrets = {names[variable]: value for variable, value in secrets_in_files(names).items()}
    from_file = {} if config is None else _read_toml(config)
    from_flags = {name: value for name, value in (flags or {}).items() if value is not None}
    return Settings.of(**(from_file | secrets | _from_environment(os.environ) | from_flags))


def secret_variables() -> dict[str, str]:
    """Return the variables of secrets, with the names of their settings."""
    return {setting.variable: name for name, setting in own_settings().items() if setting.secret}


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a warning for each STREAMREC_* variable that looks like a misspelt setting.

    Only near misses count: orchestrators set other variables with the name of a service in front.
    """
    suspects = sorted(name for name in environ if name.startswith(ENV_PREFIX) and not _is_known(name))
    if not suspects:
        return []
    known = [setting.variable for setting in all_settings().values()]
    known += [f"{variable}_FILE" for variable in secret_variables()]
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in suspects}
    return [f"{name} is not a setting; did you mean {found[0]}?" for name, found in near.items() if found]


def _is_known(variable: str) -> bool:
    secret = variable.removesuffix("_FILE") in secret_variables()
    return secret or find_setting(variable.removeprefix(ENV_PREFIX).lower()) is not None


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that are set in the environment, by name; an empty variable is not set."""
    names = (name for name, value in environ.items() if name.startswith(ENV_PREFIX) and value)
    found = {variable: find_setting(variable.removeprefix(ENV_PREFIX).lower()) for variable in names}
    return {setting.name: environ[variable] for variable, setting in found.items() if setting is not None}


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"there is no settings file at {path}")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None
    values = dict(_flat(content))
    unknown = [name for name in values if find_setting(name) is None]
    if unknown:
        raise SettingsError("; ".join(f"{path}: {_did_you_mean(name)}" for name in unknown))
    return values


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables by name: ``topic`` in ``[kafka]`` is ``kafka_topic``.

    A setting whose value is a table, such as ``[events.roles]``, is one value.
    """
    for key, value in table.items():
        setting = own_settings().get(f"{prefix}{key}")
        if isinstance(value, dict) and not (setting and setting.is_table):
            yield from _flat(value, f"{prefix}{key}_")
        else:
            yield f"{prefix}{key}", value


def _did_you_mean(name: str) -> str:
    known = all_settings()
    near = difflib.get_close_matches(name.lower().removeprefix(ENV_PREFIX.lower()), known, n=1)
    hint = f"; did you mean {known[near[0]].key} in [{known[near[0]].group}]?" if near else ""
    return f"{name} is not a setting{hint}"
