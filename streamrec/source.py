"""Ask git about the source code that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

TIMEOUT_S = 5


def git(*arguments: str) -> str | None:
    """Return git's answer for the folder of this code; None without git or a working copy."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
