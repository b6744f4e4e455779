"""deploy/FAULTS.md names tests that exist, and every file whose tests kill, freeze or refuse something."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from docs.faults import PAGE, ROOT, Cell, Result, cells, results, variants, verdict

TESTS = ROOT / "tests"
TABLE = list(cells(PAGE.read_text("utf-8")))
NAMED = sorted({test for cell in TABLE for test in cell.tests})
FAULT = re.compile(r"\.(kill|pause)\(\)|SIGKILL|SIGSTOP|killed_at_step|own_servers\(|kafka_cluster\(")
# nothing fails in them for which streamrec would have to answer: they test the helpers that start and kill servers
HELPERS = {"local/test_servers.py", "local/test_apache_kafka.py", "web/test_page_in_browser.py"}


def test_there_are_cells() -> None:
    assert len(TABLE) > 150
    assert len(NAMED) > 100


@pytest.mark.parametrize("test", NAMED)
def test_every_test_that_the_table_names_exists(test: str) -> None:
    path, _, name = test.partition("[")[0].partition("::")
    tree = ast.parse((TESTS / path).read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_file_of_fault_tests_is_named() -> None:
    page = PAGE.read_text("utf-8")
    faulty = [path for path in TESTS.glob("**/test_*.py") if FAULT.search(path.read_text("utf-8"))]
    files = {str(path.relative_to(TESTS)) for path in faulty if path != Path(__file__)} - HELPERS
    assert sorted(file for file in files if file not in page) == []


def test_a_cell_without_a_test_says_why() -> None:
    with pytest.raises(ValueError, match="the broker is on fire, one server: 'yes' names no test"):
        list(cells("| fault | one server |\n|---|---|\n| the broker is on fire | yes |\n"))


def test_a_cell_is_as_good_as_its_worst_test() -> None:
    collected = ["a/test_b.py::test_c[folder-1]", "a/test_b.py::test_c[s3-1]", "a/test_b.py::test_d"]
    assert variants("a/test_b.py::test_c[s3]", collected) == collected[1:2]
    report = """<testsuites><testsuite>
    <testcase classname="tests.a.test_b" name="test_c[s3-1]"><failure message="lost&#10;5 clicks"/></testcase>
    <testcase classname="tests.a.test_b" name="test_c[folder-1]"/>
    <testcase classname="tests.a.test_b" name="test_d"><skipped message="needs a disk"/></testcase>
    </testsuite></testsuites>"""
    found = results(report)
    outcomes = {
        ("a/test_b.py::test_c[folder]",): Result("green"),
        ("a/test_b.py::test_c",): Result("red", "a/test_b.py::test_c[s3-1]: lost"),
        ("a/test_b.py::test_d", "a/test_b.py::test_c[folder]"): Result("skipped", "a/test_b.py::test_d: needs a disk"),
    }
    assert {tests: verdict(Cell("f", "c", tests), collected, found) for tests in outcomes} == outcomes
    assert verdict(Cell("f", "c", ("a/test_b.py::test_d",)), collected, {}).outcome == "not run"
