"""A daemon whose history fails at every tick while a file exists, as a mistake in the code would let it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from streamrec.web.history import History


def main() -> object:
    """Run ``main()`` of the module in the second argument; the first one is the file."""
    broken, module, sys.argv = Path(sys.argv[1]), sys.argv[2], sys.argv[2:]
    program, tick = importlib.import_module(module), History.tick

    def tick_or_fail(history: History) -> None:
        if broken.exists():
            raise ZeroDivisionError("division by zero")
        tick(history)

    History.tick = tick_or_fail  # type: ignore[method-assign]
    return program.main()
