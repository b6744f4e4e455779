"""The house style, as far as a program can see it: sizes, layout and names (streamrec/README.md, Contributing)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = sorted(path for package in ("streamrec", "sasrec") for path in (ROOT / package).rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 300, 40
# a longer file or function says why, in a comment or docstring near its top or the top of its file
LONG_FILE, LONG_FUNCTION = f"Over {FILE_LINES} lines", f"Over {FUNCTION_LINES} lines"
NEAR_TOP = 20

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    tree = ast.parse(path.read_text("utf-8"))
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def code_lines(function: Function) -> int:
    """Lines without the docstring."""
    docstring = 0
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        docstring = (first.end_lineno or first.lineno) - first.lineno + 1
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CODE, ids=named)
def test_a_long_file_says_why(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= FILE_LINES or LONG_FILE in "\n".join(lines[:NEAR_TOP]), f"{len(lines)} lines"


@pytest.mark.parametrize("path", CODE, ids=named)
def test_a_long_function_says_why(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    for function in functions(path):
        top = "\n".join([*lines[:NEAR_TOP], *lines[max(0, function.lineno - 3) : function.lineno + NEAR_TOP]])
        assert code_lines(function) <= FUNCTION_LINES or LONG_FUNCTION in top, (
            f"{function.name} has {code_lines(function)} lines"
        )


@pytest.mark.parametrize("path", CODE, ids=named)
def test_attributes_are_named_in_the_code(path: Path) -> None:
    """No getattr or setattr whose name is put together: a reader could not search for it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            assert not isinstance(node.args[1], ast.JoinedStr | ast.BinOp), f"line {node.lineno}"


def test_the_formatter_is_never_overridden() -> None:
    files = [*CODE, *(ROOT / "tests").rglob("*.py")]
    skip = re.compile(r"#\s*fmt:\s*(skip|off)")
    assert [named(path) for path in files if skip.search(path.read_text("utf-8")) and path != Path(__file__)] == []
