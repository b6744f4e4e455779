"""The front door is short, and its commands work as they are pasted."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sasrec import ItemVocab, SASRec, SASRecConfig, save_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def block_with(text: str) -> str:
    """Return the code block of the README that contains a text, without its indentation."""
    (found,) = [block for block in re.findall(r"(?:^    .*\n)+", README, re.MULTILINE) if text in block]
    return re.sub(r"^    ", "", found, flags=re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_readme_shows_the_two_commands_and_at_most_ten_measurements() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in ("demo", "test"):
        assert block_with(f"make {target}\n") and f"\n{target}:" in makefile
    measured = README.split("## Measured", 1)[1].split("\n## ", 1)[0]
    assert len(re.findall(r"^\| ", measured, re.MULTILINE)) - 1 <= 10


@pytest.fixture
def demo_model(tmp_path: Path) -> Path:
    """A model with the items that the README clicks on."""
    vocab = ItemVocab([str(n) for n in range(1, 61)], [1] * 60)
    save_model(tmp_path / "demo-model", SASRec(SASRecConfig(num_items=60, max_len=8, hidden_units=16)), vocab)
    return tmp_path / "demo-model"


def test_an_event_is_sent_and_a_list_is_read_by_the_commands_as_pasted(demo_model: Path) -> None:
    torch.manual_seed(0)
    serve = paste("streamrec serve --embedded", demo_model)
    daemon = subprocess.Popen(["bash", "-c", f"exec {serve}"], stdout=subprocess.PIPE, text=True)
    try:
        assert daemon.stdout
        exports = "".join(daemon.stdout.readline() for _ in range(2))
        assert re.fullmatch(r"(export STREAMREC_\w+=\S+\n){2}", exports)
        bash(exports + paste("AIOKafkaProducer", demo_model))
        deadline = time.monotonic() + 60
        while (read := bash(exports + paste("streamrec recs me", demo_model), check=False)).returncode:
            assert time.monotonic() < deadline and daemon.poll() is None, read.stderr
    finally:
        daemon.terminate()
        daemon.communicate(timeout=60)
    assert "user me: model" in read.stdout and '"items"' in read.stdout and '"50"' not in read.stdout


def paste(text: str, model: Path) -> str:
    """Return a block as a person pastes it, with this environment's programs and the model of the test."""
    block = block_with(text).replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    return block.replace("~/.cache/streamrec/demo-model", str(model))


def bash(script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-ec", script], check=check, capture_output=True, text=True, timeout=60)
