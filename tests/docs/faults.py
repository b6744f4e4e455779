"""Run the tests that deploy/FAULTS.md names, with each broker, and print each cell of its tables green or red.

`make faults` runs this; arguments go to pytest. BROKERS lists `embedded` and folders of an unpacked Apache Kafka
[embedded, KAFKA_HOME, KAFKA_3_9].
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from streamrec.local.apache_kafka import release

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "deploy" / "FAULTS.md"
EMBEDDED = "embedded"
THE_SAME = "the same"
WITHOUT_TESTS = ("not applicable", "not proven")
COLORS = {"green": "green", "red": "red", "skipped": "yellow", "not run": "dim"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a fault under the conditions of a column, and the tests that show the outcome."""

    fault: str
    column: str
    tests: tuple[str, ...]  # FILE::FUNCTION or FILE::FUNCTION[VARIANT], under tests/

    def runs_with(self, broker: str) -> bool:
        """Return whether the column stands for a broker; columns of other things stand for every one."""
        if EMBEDDED in self.column:
            return broker == EMBEDDED
        return "Apache Kafka" not in self.column or broker != EMBEDDED


@dataclass(frozen=True)
class Result:
    """What became of a test."""

    outcome: str  # green, red or skipped
    reason: str = ""


def cells(page: str) -> Iterator[Cell]:
    """Yield the cells of the tables of faults.

    Raises:
        ValueError: a cell names no test and gives no reason.
    """
    columns: list[str] = []
    for line in page.splitlines():
        row = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("|") else []
        if row[:1] == ["fault"]:
            columns = row[1:]
        elif not row:
            columns = []
        elif columns and not row[0].startswith("---"):
            yield from _cells_of(row, columns)


def _cells_of(row: Sequence[str], columns: Sequence[str]) -> Iterator[Cell]:
    tests: tuple[str, ...] = ()
    for column, text in zip(columns, row[1:], strict=True):
        if text != THE_SAME:
            tests = tuple(re.findall(r"`([^`]+)`", text))
        if not tests and text not in WITHOUT_TESTS:
            raise ValueError(f"{row[0]}, {column}: {text!r} names no test; write {' or '.join(WITHOUT_TESTS)}")
        yield Cell(row[0], column, tests)


def variants(test: str, collected: Iterable[str]) -> list[str]:
    """Return the collected tests that a cell means: all variants, or those with all named parts."""
    function, _, variant = test.partition("[")
    named = [other for other in collected if other.partition("[")[0] == function]
    if not variant:
        return named
    return [other for other in named if _parts(variant) <= _parts(other.partition("[")[2])]


def _parts(variant: str) -> set[str]:
    return set(variant.removesuffix("]").split("-"))


def pytest(*arguments: str, home: str | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KAFKA_HOME"}
    if home:
        environment["KAFKA_HOME"] = home
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def collect(tests: Sequence[str]) -> list[str]:
    """Return all variants of the tests.

    Raises:
        SystemExit: pytest cannot collect them, or a variant is missing.
    """
    functions = sorted({f"tests/{test.partition('[')[0]}" for test in tests})
    found = pytest("--collect-only", *functions, capture_output=True)
    if found.returncode:
        sys.exit(f"pytest cannot collect the tests of the page:\n{found.stdout}{found.stderr}")
    collected = [line.removeprefix("tests/") for line in found.stdout.splitlines() if "::" in line]
    if unknown := [test for test in tests if not variants(test, collected)]:
        sys.exit(f"no such variant: {', '.join(unknown)}")
    return collected


def run(tests: Iterable[str], home: str | None, arguments: Sequence[str]) -> dict[str, Result]:
    """Run tests with a broker; return what became of each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest(*(f"tests/{test}" for test in tests), f"--junitxml={report}", *arguments, home=home)
        return results(report.read_text("utf-8")) if report.exists() else {}


def results(report: str) -> dict[str, Result]:
    """Read pytest's report in JUnit's format."""
    found = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        test = f"{case.attrib['classname'].removeprefix('tests.').replace('.', '/')}.py::{case.attrib['name']}"
        bad = next((part for kind in ("failure", "error") for part in case.iter(kind)), None)
        skipped = next(case.iter("skipped"), None)
        if bad is not None:
            found[test] = Result("red", bad.attrib.get("message", ""))
        elif skipped is not None:
            found[test] = Result("skipped", skipped.attrib.get("message", ""))
        else:
            found[test] = Result("green")
    return found


def verdict(cell: Cell, collected: Iterable[str], found: Mapping[str, Result]) -> Result:
    """Return red if one of the cell's tests failed, green if all passed, and otherwise the reason."""
    tests = [(test, found.get(test, Result("not run"))) for name in cell.tests for test in variants(name, collected)]
    for outcome in ("red", "not run", "skipped"):
        for test, result in tests:
            if result.outcome == outcome:
                return Result(outcome, f"{test}: {result.reason}".splitlines()[0].removesuffix(": "))
    return Result("green")


def brokers() -> dict[str, str | None]:
    """Return the brokers to test with: name, folder."""
    given = os.environ.get("BROKERS", "").split()
    given = given or [EMBEDDED, *filter(None, map(os.environ.get, ("KAFKA_HOME", "KAFKA_3_9")))]
    homes = {place: None if place == EMBEDDED else str(Path(place).resolve()) for place in given}
    return {f"Apache Kafka {release(Path(home))}" if home else EMBEDDED: home for home in homes.values()}


def main(arguments: Sequence[str]) -> int:
    """Run everything; return 1 if a cell is red."""
    console, table = Console(soft_wrap=True), list(cells(PAGE.read_text("utf-8")))
    collected = collect([test for cell in table for test in cell.tests])
    verdicts: list[tuple[str, Cell, Result]] = []
    for broker, home in brokers().items():
        mine = [cell for cell in table if cell.tests and cell.runs_with(broker)]
        tests = sorted({test for cell in mine for name in cell.tests for test in variants(name, collected)})
        if "--collect-only" in arguments:
            console.print(f"{broker}: {len(mine)} cells, {len(tests)} tests", *tests, sep="\n", markup=False)
            continue
        found = run(tests, home, arguments)
        verdicts += [(broker, cell, verdict(cell, collected, found)) for cell in mine]
    for broker, cell, result in verdicts:
        color, text = COLORS[result.outcome], escape(f"{cell.fault} | {cell.column} | {broker}")
        console.print(f"[{color}]{result.outcome:>7}[/]  {text}", *filter(None, [escape(result.reason)]))
    outcomes = [result.outcome for _, _, result in verdicts]
    console.print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in COLORS))
    return int("red" in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
