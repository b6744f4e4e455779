"""Structured log lines: a message and fields, for people (text) or machines (JSON), on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_PLAIN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# Their warnings repeat many times a second while a broker is unreachable; the daemon logs its own warning once.
_CHATTY = ("aiokafka", "kafka")
# It logs at DEBUG what it signs, and at INFO where it found credentials, for every token.
_SIGNER = "botocore"


def configure_logging(level: str, log_format: str) -> None:
    """Configure the root logger of this process; only commands call this."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_mask_sasl)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "DEBUG" else logging.CRITICAL)
    logging.getLogger(_SIGNER).setLevel(logging.WARNING)


def _mask_sasl(record: logging.LogRecord) -> bool:
    """Replace SASL requests by their type: aiokafka logs them at DEBUG, and they contain the password."""
    if isinstance(record.args, tuple):
        kinds = [type(arg).__name__ for arg in record.args]
        record.args = tuple(
            kind if kind.startswith("Sasl") else arg for kind, arg in zip(kinds, record.args, strict=True)
        )
    return True


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _PLAIN}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def one_line(text: str) -> str:
    """Escape characters that break a line or control a terminal: ids in log lines come from clients."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def json_line(value: object) -> str:
    """Return a value as one line of JSON that controls no terminal; printable text stays as it is."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def utc(ts_ms: float) -> str:
    """Return a Unix time as text; the number if no calendar has it."""
    try:
        return datetime.fromtimestamp(ts_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{ts_ms} ms since 1970"


class LogOnce:
    """Log a repeated warning once, until its text changes or ``reset`` is called."""

    def __init__(self, log: logging.Logger, level: int = logging.WARNING) -> None:
        self._log = log
        self._level = level
        self._last = ""

    def __call__(self, message: str, *args: object) -> bool:
        """Log the message unless it equals the last one; return whether it was logged."""
        text = message % args
        new = text != self._last
        if new:
            self._log.log(self._level, message, *args)
        self._last = text
        return new

    def reset(self) -> None:
        """Log the next message even if it equals the last one."""
        self._last = ""


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = one_line(f"{_time(record)} {record.levelname:7} {record.getMessage()}{fields}")
        if not record.exc_info:
            return line
        return "\n".join([line, *map(one_line, self.formatException(record.exc_info).split("\n"))])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | _fields(record), default=str)
