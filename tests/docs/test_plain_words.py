"""Count words that a reader has to decode, in pages, docstrings, comments, help texts, errors and log lines.

    python tests/docs/test_plain_words.py [PATH...]

prints each finding as FILE:LINE: WORDS: SENTENCE, and the rate of each PATH.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_PER_1000_LINES = 1.0
PAGES = [ROOT / "README.md", ROOT / "deploy", ROOT / "sasrec", ROOT / "streamrec"]
GROUPS = {
    "pages": [page for root in PAGES for page in ([root] if root.is_file() else sorted(root.glob("*.md")))],
    "deploy": [path for path in sorted((ROOT / "deploy").rglob("*")) if path.suffix in (".yaml", ".yml", ".env")],
    "sasrec": sorted((ROOT / "sasrec").rglob("*.py")),
    "streamrec": [path for path in sorted((ROOT / "streamrec").rglob("*")) if path.suffix in (".py", ".lua")],
    "page": [
        path
        for path in sorted((ROOT / "streamrec/web/static").iterdir())
        if path.suffix in (".js", ".html") and not path.name.startswith("uPlot")
    ],
}

PATTERNS = (
    r"so (?:many|long|often|few|much)",
    r"what (?:is|are|was|were)\b(?![^.!?]*\?)",
    r"who (?:has|is|comes|clicks)",
    r"(?:whoever|whatever|nobody|somebody|anybody)",
    r"of (?:which|whom)",
    r"(?:he|his|him|himself)",
    r"(?:told|kept|asked|said)",
    r"held\b(?![- ]out)",
    r"(?:given back|worked off|in hand|in doubt|all the same|goes on|grown)",
    r"(?:is|are|was|were|be) away",
    r"stays",
)
UNPLAIN = re.compile(rf"\b(?:{'|'.join(PATTERNS)})\b", re.IGNORECASE)


class Finding(NamedTuple):
    """Words that match a pattern, and the sentence that has them."""

    path: Path
    line: int
    words: str
    sentence: str

    def __str__(self) -> str:
        name = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{name}:{self.line}: {self.words}: {self.sentence}"


class Text(NamedTuple):
    """Prose of a file: lines that follow each other, the first at ``line``."""

    line: int
    lines: list[str]


def texts_of(path: Path) -> Iterator[Text]:
    """Return what people read in a file; code itself is left out."""
    source = path.read_text("utf-8")
    if path.suffix == ".py":
        yield from comments_of(source)
        yield from strings_of(source)
    elif path.suffix == ".md":
        yield from paragraphs_of(source)
    elif path.suffix == ".html":
        yield Text(1, re.sub(r"<[^>]*>", " ", source).split("\n"))
    elif path.suffix == ".js":
        lines = list(enumerate(source.splitlines(), 1))
        yield from joined((n, found[1]) for n, line in lines if (found := re.search(r"(?:^|\s)//(.*)", line)))
        yield from (
            Text(n, [text]) for n, line in lines for text in re.findall(r"[\"`]([^\"`]*\w \w[^\"`]*)[\"`]", line)
        )
    else:
        mark = "--" if path.suffix == ".lua" else "#"
        yield from joined((n, line.split(mark, 1)[1]) for n, line in enumerate(source.splitlines(), 1) if mark in line)


def joined(lines: Iterable[tuple[int, str]]) -> Iterator[Text]:
    """Join lines with consecutive numbers: a sentence of a comment runs over several."""
    block: Text | None = None
    for number, line in lines:
        if block and number == block.line + len(block.lines):
            block.lines.append(line)
            continue
        if block:
            yield block
        block = Text(number, [line])
    if block:
        yield block


def comments_of(source: str) -> Iterator[Text]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return joined((token.start[0], token.string.lstrip("# ")) for token in tokens if token.type == tokenize.COMMENT)


def strings_of(source: str) -> Iterator[Text]:
    """Return strings with at least two words: docstrings, help texts, errors, log lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"[a-z] [a-z]", node.value):
            yield Text(node.lineno, without_code(node.value).split("\n"))


def paragraphs_of(source: str) -> Iterator[Text]:
    """Return the prose of a page, and the comments of its code blocks."""
    fenced = False
    prose: list[tuple[int, str]] = []
    for number, line in enumerate(source.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            prose += [(number, "." + line.split(" #", 1)[1])] if " #" in line else []
        elif line.strip():
            prose.append((number, line))
    yield from joined((number, without_code(line)) for number, line in prose)


def without_code(text: str) -> str:
    return re.sub(r"``?[^`\n]*``?", "X", text)


def findings_in(path: Path) -> Iterator[Finding]:
    for text in texts_of(path):
        whole = "\n".join(text.lines)
        for match in UNPLAIN.finditer(re.sub(r"\s", " ", whole)):
            begin = max(whole.rfind(mark, 0, match.start()) for mark in (". ", ".\n", ": ", "| ", "\n\n")) + 1
            ends = [found for mark in (". ", ".\n", " |", "\n\n") if (found := whole.find(mark, match.end())) > 0]
            sentence = " ".join(whole[begin : min(ends, default=len(whole)) + 1].split())
            yield Finding(path, text.line + whole.count("\n", 0, match.start()), match[0].lower(), sentence)


def rate_of(paths: Iterable[Path]) -> tuple[list[Finding], float]:
    """Return the findings of files, and how many there are in 1,000 lines."""
    paths = list(paths)
    findings = sorted(finding for path in paths for finding in findings_in(path))
    lines = sum(path.read_text("utf-8").count("\n") for path in paths)
    return findings, 1000 * len(findings) / max(lines, 1)


@pytest.mark.parametrize("group", GROUPS)
def test_sentences_are_plain(group: str) -> None:
    findings, rate = rate_of(GROUPS[group])
    listed = "\n".join(map(str, findings))
    assert rate <= LIMIT_PER_1000_LINES, f"{rate:.1f} in 1,000 lines, at most {LIMIT_PER_1000_LINES}:\n{listed}"


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("a.py", '"""Return how many.\n\nStop after so\nmany.\n"""\n', [(3, "so many")]),
        ("a.py", "x = 1  # the list that he saw,\n# nobody else\n", [(1, "he"), (2, "nobody")]),
        ("a.py", 'raise ValueError(f"{x} was held by a worker")\n', [(1, "held")]),
        ("a.py", "told = kept(asked)\n", []),
        ("a.md", "The model is judged on held-out clicks.\n\n    what is(asked)  # nobody\n", [(3, "nobody")]),
        ("a.md", "Run `so many`. What is it?\n", []),
        ("a.lua", "-- it stays\nlocal told = 1\n", [(1, "stays")]),
        ("a.yaml", "key: 1  # it stays\n", [(1, "stays")]),
        ("a.js", 'const told = "list of his"; // nobody\n', [(1, "his"), (1, "nobody")]),
        ("a.html", "<p id='told'>A list.</p>\n<p>Seen by him.</p>\n", [(2, "him")]),
    ],
)
def test_what_is_found(tmp_path: Path, name: str, source: str, found: list[tuple[int, str]]) -> None:
    path = tmp_path / name
    path.write_text(source, "utf-8")
    assert sorted((finding.line, finding.words) for finding in findings_in(path)) == found


def main(arguments: list[str]) -> int:
    """Print the findings of each path, or of all that the tests look at."""
    suffixes = (".py", ".md", ".lua", ".yaml", ".env", ".js", ".html")
    groups = {
        name: [p for p in sorted(Path(name).rglob("*")) if p.suffix in suffixes and "uPlot" not in p.name]
        for name in arguments
    }
    groups |= {name: [Path(name)] for name in arguments if Path(name).is_file()}
    total = 0
    for name, paths in (groups or GROUPS).items():
        findings, rate = rate_of(path.resolve() for path in paths)
        total += len(findings)
        summary = f"{name}: {len(findings)} findings, {rate:.1f} in 1,000 lines (at most {LIMIT_PER_1000_LINES})"
        sys.stdout.writelines(f"{line}\n" for line in (*findings, summary))
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
