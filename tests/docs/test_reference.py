"""The settings and metrics references are what the code says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
assert SPEC is not None and SPEC.loader is not None
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)


@pytest.mark.parametrize(("name", "page"), reference.PAGES.items())
def test_the_reference_is_what_the_code_says(name: str, page: Callable[[], str]) -> None:
    assert (reference.DEPLOY / name).read_text("utf-8") == page(), "run: make reference"


def test_every_setting_and_metric_is_explained() -> None:
    for text in (reference.settings_page(), reference.metrics_page()):
        rows = [line for line in text.splitlines() if line.startswith("| ") and "meaning" not in line]
        assert len(rows) > 3
        for row in rows:
            assert len(row.rsplit("|", 2)[1].strip()) > 5, row
