"""Print pip constraints: each dependency of pyproject.toml at the lowest release that its bound admits.

Usage: lowest.py [NAME ...]; the named dependencies are left out, so pip takes their newest release.
"""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
    bound = re.match(r"(?P<name>[\w.-]+)[^;]*>=\s*(?P<lowest>[\w.]+)", requirement)
    if bound and bound["name"] not in sys.argv[1:]:
        sys.stdout.write(f"{bound['name']}=={bound['lowest']}\n")
