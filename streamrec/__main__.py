"""`python -m streamrec` is `streamrec`."""

import sys

from streamrec.commands.main import main

sys.exit(main())
