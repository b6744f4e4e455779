"""Run `python -m streamrec` as `streamrec`."""

import sys

from streamrec.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
