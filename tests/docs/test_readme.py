"""The README is true: its tables, commands, code and file tree are held against the project."""

import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pydantic import SecretStr

from sasrec.__main__ import _parser as sasrec_parser
from streamrec.commands.main import _parser as streamrec_parser
from streamrec.metrics import Metrics, RetrainMetrics
from streamrec.redis.keys import Keys
from streamrec.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def rows_of_table(first_header: str) -> list[list[str]]:
    table = README.split(f"\n| {first_header} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[2:]]


def test_the_settings_table_lists_every_setting_with_its_default() -> None:
    expected = {}
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        default = default.get_secret_value() if isinstance(default, SecretStr) else default
        shown = "" if default in (None, "", ()) else str(default).lower() if isinstance(default, bool) else str(default)
        expected[f"`{name}`"] = [f"`{shown}`" if shown else "", field.description]
    listed = {row[0].strip(): [row[1].strip(), row[2].strip()] for row in rows_of_table("setting")}
    assert listed == expected


@pytest.mark.parametrize(
    ("header", "metrics"), [("metric", Metrics()), ("metric of `streamrec retrain`", RetrainMetrics())]
)
def test_the_metrics_table_lists_every_metric(header: str, metrics: Metrics | RetrainMetrics) -> None:
    families = metrics.registry.collect()
    expected = {f"`{f.name}{'_total' if f.type == 'counter' else ''}`": f.documentation for f in families}
    assert {row[0]: row[1] for row in rows_of_table(header)} == expected


def test_the_redis_contract_names_the_keys_that_are_used() -> None:
    keys = Keys()
    used = [keys.recommendation("USER"), keys.popular, keys.sequence("USER"), keys.popularity]
    used += [keys.blocklist, keys.online("VERSION"), keys.format, keys.training, keys.models_channel]
    assert [row[0] for row in rows_of_table("key")] == [f"`{key}`" for key in used]


@pytest.mark.parametrize("package", ["sasrec", "streamrec"])
def test_the_file_tree_names_every_file(package: str) -> None:
    tree = README.split("## Files", 1)[1]
    files = {path.name for path in (ROOT / package).iterdir() if path.suffix in (".py", ".lua")}
    assert [name for name in sorted(files - {"__init__.py"}) if not re.search(rf"\b{re.escape(name)}\b", tree)] in (
        [],
        ["__main__.py"],  # of streamrec: one line that calls cli.py
    )
    named = set(re.findall(r"\b\w+\.(?:py|lua)\b", tree)) - {"harness.py"}
    everywhere = {path.name for folder in ("sasrec", "streamrec") for path in (ROOT / folder).iterdir()}
    assert named <= everywhere


def commands() -> list[str]:
    lines = [line.strip().removeprefix(".venv/bin/") for line in README.splitlines() if line.startswith("    ")]
    parts = [part.strip() for line in lines for part in line.split("#")[0].split(";")]
    return [part for part in parts if re.match(r"(streamrec|sasrec) [a-z]", part)]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_understood(command: str) -> None:
    program, *arguments = shlex.split(command)
    parser = sasrec_parser() if program == "sasrec" else streamrec_parser()
    assert callable(parser.parse_args(arguments).run)


CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code: str, **shortened: str) -> dict[str, Any]:
    for long, short in shortened.items():
        assert long in code
        code = code.replace(long, short)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_code_of_the_recommender_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, start in (("clicks", 0), ("later-clicks", 80), ("new-clicks", 90), ("newer-clicks", 100)):
        rows = range(start, start + (80 if name == "clicks" else 10))
        columns = {"USER_ID": [f"u{n % 4}" for n in rows], "ITEM_ID": [f"item {n // 4 % 6 + 1}" for n in rows]}
        parquet.write_table(pa.table(columns | {"TIMESTAMP": list(rows)}), tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    names = run(CODE[0], **{"verbose=1": "epochs=2"})
    assert (tmp_path / "model" / "manifest.json").is_file()
    assert (tmp_path / "history.png").is_file()
    assert names["recommender"].max_len == 50


def test_the_code_of_the_model_library_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clicks = "\n".join(f"u{n % 4},item {n // 4 % 6 + 1},{n}000" for n in range(80))
    (tmp_path / "clicks.csv").write_text(f"user_id,item_id,timestamp\n{clicks}\n")
    monkeypatch.chdir(tmp_path)
    names = run(CODE[1], **{"TrainConfig()": "TrainConfig(epochs=2)", "progress=True": "progress=False"})
    assert (tmp_path / "model" / "manifest.json").is_file()
    assert names["engine"].take_stats().hits == 1
