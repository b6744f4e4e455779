"""Run `python -m streamrec` as `streamrec`."""

import sys

from streamrec.commands.main import main

sys.exit(main())
