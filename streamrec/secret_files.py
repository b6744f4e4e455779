"""Read secrets from files, as orchestrators mount them: variable STREAMREC_NAME_FILE contains the path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from streamrec.errors import SettingsError


def secrets_in_files(variables: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the secrets of the variables whose ``_FILE`` variable is set, without a final line break.

    Raises:
        SettingsError: a file cannot be read or is empty, or the secret is in the environment too.
    """
    found = {}
    for variable in variables:
        path = environ.get(f"{variable}_FILE")
        if path and environ.get(variable):
            raise SettingsError(f"{variable} and {variable}_FILE are both set: set one of them")
        if path:
            found[variable] = _read(f"{variable}_FILE", Path(path))
    return found


def _read(variable: str, path: Path) -> str:
    where = str(path) if path.is_absolute() else "the file that it names"  # it may be the secret itself, by mistake
    try:
        secret = path.read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        raise SettingsError(f"{variable}: cannot read {where}: {error.strerror}") from None
    except ValueError:
        raise SettingsError(f"{variable}: {where} is no UTF-8 text") from None
    if not secret:
        raise SettingsError(f"{variable}: {where} is empty")
    return secret
