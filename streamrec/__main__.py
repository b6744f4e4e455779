"""`python -m streamrec` is `streamrec`."""

import sys

from streamrec.cli import main

sys.exit(main())
