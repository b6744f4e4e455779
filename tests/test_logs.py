"""Log lines for people and for machines, with any content."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from streamrec.logs import configure_logging


def logged(monkeypatch: pytest.MonkeyPatch, log_format: str, message: str, *args: Any, **extra: Any) -> str:
    """Log one INFO line, and return it as it stands on stderr."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("INFO", log_format)
    logging.getLogger("streamrec.test").info(message, *args, extra=extra)
    return stderr.getvalue()


def test_a_text_line_has_time_level_message_and_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    line = logged(monkeypatch, "text", "topic %s created", "clicks", partitions=4, path=Path("/tmp"))
    time, level, rest = line.split(maxsplit=2)
    assert time.endswith("Z")
    assert len(time) == len("2024-01-01T00:00:00.000Z")
    assert (level, rest) == ("INFO", "topic clicks created partitions=4 path=/tmp\n")


def test_a_json_line_is_an_object_with_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(logged(monkeypatch, "json", "topic %s created", "clicks", partitions=[0, 1], path=Path("/é")))
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "INFO",
        "logger": "streamrec.test",
        "message": "topic clicks created",
        "partitions": [0, 1],
        "path": "/é",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("text", ["a\nINFO forged", "a\r\nb", "\x1b[31mred", "a\u2028b", "a\x85b", "\0"], ids=repr)
def test_an_event_cannot_forge_a_line(monkeypatch: pytest.MonkeyPatch, log_format: str, text: str) -> None:
    line = logged(monkeypatch, log_format, "dead letter: %s", text, user_id=text)
    assert len(line.splitlines()) == 1
    assert line.removesuffix("\n").isprintable()


def test_an_exception_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("INFO", "text")
    try:
        raise ValueError("an id \x1b[31m\x9b2J\r")
    except ValueError:
        logging.getLogger("streamrec.test").exception("failed")
    assert "ValueError: an id" in stderr.getvalue()
    assert all(line.isprintable() for line in stderr.getvalue().split("\n"))


@pytest.mark.parametrize("value", ["plain", "two words", "é", "日本", 5, 1.5, None], ids=repr)
def test_printable_values_are_not_escaped(monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    assert logged(monkeypatch, "text", "x", field=value).endswith(f" x field={value}\n")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_logged_with_its_traceback(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("INFO", log_format)
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("streamrec.test").exception("it failed")
    text = stderr.getvalue()
    assert "it failed" in text
    assert "ValueError: wrong" in text
    if log_format == "json":
        assert "Traceback" in json.loads(text)["exception"]


def test_lower_levels_and_the_kafka_client_are_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("WARNING", "text")
    logging.getLogger("streamrec.test").info("below the level")
    logging.getLogger("aiokafka.client").error("the daemon logs its own line")
    logging.getLogger("streamrec.test").warning("logged")
    assert [line.split(maxsplit=2)[2] for line in stderr.getvalue().splitlines()] == ["logged"]


def test_debug_logs_the_kafka_client(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("DEBUG", "text")
    logging.getLogger("aiokafka.client").debug("details")
    assert "details" in stderr.getvalue()


def test_configuring_twice_writes_each_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_logging("INFO", "json")
    configure_logging("INFO", "text")
    logging.getLogger("streamrec.test").info("once")
    assert stderr.getvalue().count("once") == 1
