"""The pages are true: their tables, commands, code, links and lists of modules are compared with the project."""

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
from streamrec.settings import all_settings

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "deploy", ROOT / "sasrec", ROOT / "streamrec")
PAGES = {str(page.relative_to(ROOT)): page.read_text("utf-8") for folder in FOLDERS for page in folder.glob("*.md")}
LIBRARY, DAEMON = PAGES["sasrec/README.md"], PAGES["streamrec/README.md"]


def rows_of_table(page: str, first_header: str) -> list[list[str]]:
    table = page.split(f"\n| {first_header} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[2:]]


def test_the_settings_table_lists_every_setting_with_its_default() -> None:
    expected = {}
    for setting in all_settings().values():
        default = setting.default.get_secret_value() if isinstance(setting.default, SecretStr) else setting.default
        shown = (
            "" if default in (None, "", (), {}) else str(default).lower() if isinstance(default, bool) else str(default)
        )
        expected[setting.variable] = f"`{shown}`" if shown else ""
    page = PAGES["deploy/SETTINGS.md"]
    rows = re.findall(r"^\| \**(STREAMREC_\w+)\** \| (\S*) *\| .+ \|$", page, re.MULTILINE)
    assert dict(rows) == expected


@pytest.mark.parametrize(("process", "metrics"), [("serve", Metrics()), ("retrain", RetrainMetrics())])
def test_the_metrics_table_lists_every_metric(process: str, metrics: Metrics | RetrainMetrics) -> None:
    families = metrics.registry.collect()
    expected = {f"`{f.name}{'_total' if f.type == 'counter' else ''}`": f.documentation for f in families}
    section = PAGES["deploy/METRICS.md"].split(f"## streamrec {process}", 1)[1]
    assert {row[0]: row[3] for row in rows_of_table(section, "metric")} == expected


def test_the_redis_contract_names_the_keys_that_are_used() -> None:
    keys = Keys()
    used = [keys.recommendation("USER"), keys.popular, keys.sequence("USER"), keys.exclusions("USER"), keys.popularity]
    used += [keys.blocklist, keys.online("VERSION"), keys.format]
    used += [keys.topic_mark(0).replace("0", "PARTITION")]
    used += [keys.probe(0).replace("0", "N"), keys.training, keys.sweep_lock, keys.swept, keys.models_channel]
    assert [row[0] for row in rows_of_table(DAEMON, "key")] == [f"`{key}`" for key in used]


@pytest.mark.parametrize("package", ["sasrec", "streamrec"])
def test_the_file_tree_names_every_file(package: str) -> None:
    rows = rows_of_table(PAGES[f"{package}/README.md"], "package")
    listed = {row[0].strip("`"): sorted(re.findall(r"`(\w+)`", row[2])) for row in rows}
    folders = {"."} | {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    found = {
        folder: sorted(path.stem for path in (ROOT / package / folder).glob("*.py") if not path.stem.startswith("__"))
        for folder in folders
    }
    assert listed == found


@pytest.mark.parametrize("package", ["sasrec", "streamrec"])
def test_the_order_of_imports_is_the_one_that_the_linter_checks(package: str) -> None:
    contracts = (ROOT / "pyproject.toml").read_text("utf-8")
    layers = re.search(rf'containers = \["{package}"\].*?layers = \[\n(.*?)\n\]', contracts, re.DOTALL)
    assert layers
    checked = [layer for layer in re.findall(r'"(.*?)"', layers[1]) if package == "sasrec" or layer != "__main__"]
    section = PAGES[f"{package}/README.md"].split("## Packages", 1)[1]
    shown = section.split("    ", 1)[1].split("\n\n", 1)[0]
    assert [line.strip() for line in shown.splitlines()] == checked


# --- links

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {f"{name}-{n}" if n else name for name, last in found.items() for n in range(last + 1)}


def links(page: str) -> list[str]:
    return LINK.findall(re.sub(r"```.*?```", "", page, flags=re.DOTALL))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_heading(name: str) -> None:
    broken = []
    for link in links(PAGES[name]):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    assert not broken


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set[str](), {"README.md"}
    while new:
        reached |= new
        targets = {((ROOT / name).parent / link.split("#")[0]).resolve() for name in new for link in links(PAGES[name])}
        new = {str(path.relative_to(ROOT)) for path in targets if path.is_relative_to(ROOT)} & PAGES.keys() - reached
    assert reached == PAGES.keys()


def test_files_that_a_page_names_are_there() -> None:
    missing = []
    for name, page in PAGES.items():
        if name.endswith("LOG.md"):  # of files as they were
            continue
        missing += [(name, path) for path in re.findall(r"`((?:tests|streamrec|sasrec|deploy)/[\w/.]+)`", page)]
    assert not [(name, path) for name, path in missing if not (ROOT / path).exists()]


# --- commands and code


def commands() -> list[str]:
    """Return the commands in the code blocks of all pages, without comments."""
    lines = [line for page in PAGES.values() for line in page.splitlines() if line.startswith("    ")]
    lines = [line.strip().removeprefix(".venv/bin/") for line in lines]
    parts = [part.strip() for line in lines for part in line.split("#")[0].split(";")]
    return sorted({part for part in parts if re.match(r"(streamrec|sasrec) [a-z]", part)})


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 20


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_understood(command: str) -> None:
    program, *arguments = shlex.split(command)
    parser = sasrec_parser() if program == "sasrec" else streamrec_parser()
    assert callable(parser.parse_args(arguments).run)


CODE = re.findall(r"```python\n(.*?)```", LIBRARY, re.DOTALL)


def run(code: str, **shortened: str) -> dict[str, Any]:
    for long, short in shortened.items():
        assert long in code
        code = code.replace(long, short)
    names: dict[str, Any] = {}
    exec(compile(code, "sasrec/README.md", "exec"), names)
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
