"""The examples of sasrec/FILES.md run as they are pasted, and its tables are those of the code."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from sasrec.data.presets import PRESETS
from streamrec.commands.main import main

PAGE = (Path(__file__).parents[2] / "sasrec/FILES.md").read_text("utf-8")
EXAMPLES = re.findall(r"### (\w+)\n\n```console\n\$ .*\n((?:.*\n)*?)\$ (.*)\n(.*)\n```", PAGE)


def test_there_is_one_example_and_one_row_a_preset() -> None:
    assert [name for name, *_ in EXAMPLES] == list(PRESETS)
    table = PAGE.split("\n| name | files | notes |\n", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(PRESETS)


@pytest.mark.parametrize(("name", "content", "command", "output"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_an_example_runs_as_pasted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    command: str,
    output: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMREC_ARCHIVE_DIR", "archive")
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    file = Path(words[words.index("import") + 1])
    if file.suffix == ".parquet":
        pd.read_csv(io.StringIO(content)).to_parquet(file)
    else:
        file.write_text(content, "utf-8")
    assert words.pop(0) == "streamrec" and words[-2:] == ["--format", name]
    assert main(words) == 0
    assert capsys.readouterr() == (f"{output}\n", "")
