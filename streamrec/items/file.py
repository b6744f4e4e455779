"""The table of items from a file, which is read again when it changes.

JSON lines with item_id and the fields of an item (table.py), or CSV and TSV with a header: categories are separated by
"|", and empty fields are left out. The file is the whole table: an item that it lacks is gone. A bad line is a warning,
and the item's former row remains. Replace the file by a rename: half a file would be read as half a table.
"""

from __future__ import annotations

import asyncio
import csv
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamrec.errors import BadRecord, SettingsError
from streamrec.items.refusals import Refusals
from streamrec.items.table import ItemTable
from streamrec.kafka.decode import identifier
from streamrec.logs import LogOnce
from streamrec.metrics import Metrics

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
LOGGED_LINES = 10
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
Bad = dict[str, str]  # why a line is no item, by its item id, or by its number if it has none


class ItemFile:
    """Reads the items file into the table of the refusals."""

    def __init__(self, path: Path, refusals: Refusals, metrics: Metrics) -> None:
        self._path = path
        self._refusals = refusals
        self._metrics = metrics
        self._state: object = None  # of the file that was read
        self._log_unread = LogOnce(log)

    async def read(self) -> None:
        """Read the file.

        Raises:
            SettingsError: it cannot be read.
        """
        state = self._look()
        table, _ = await self._read_whole()
        self._refusals.replace(table)
        self._done(state)

    async def follow(self) -> None:
        """Read the file again if it has changed."""
        await asyncio.sleep(LOOK_EVERY_S)
        try:
            state = self._look()
            if state == self._state:
                return
            table, bad = await self._read_whole()
        except SettingsError as error:
            self._log_unread("the table of items remains as it is: %s", error)
            return
        await self._refusals.change_to(table, bad)
        self._done(state)

    async def aclose(self) -> None:
        """Do nothing: the file is open only while it is read."""

    def _look(self) -> object:
        try:
            found = self._path.stat()
        except OSError as error:
            raise SettingsError(f"the items in {self._path} cannot be read: {error.strerror}") from None
        return found.st_mtime_ns, found.st_size, found.st_ino

    async def _read_whole(self) -> tuple[ItemTable, Bad]:
        started_s = time.monotonic()
        table, bad = await asyncio.to_thread(read_items, self._path)
        self._metrics.bad_items.inc(len(bad))
        for reason in list(bad.values())[:LOGGED_LINES]:
            log.warning("bad item: %s", reason)
        took_s = round(time.monotonic() - started_s, 1)
        where = {"file": str(self._path), "items": len(table), "bad": len(bad), "seconds": took_s}
        log.info("items read", extra=where)
        if not table:
            log.warning("%s has no item: until it has one, no item is refused", self._path)
        return table, bad

    def _done(self, state: object) -> None:
        self._state = state
        self._log_unread.reset()
        self._metrics.items.set(len(self._refusals.table or ()))


def read_items(path: Path) -> tuple[ItemTable, Bad]:
    """Return the items of a file, and its bad lines.

    Raises:
        SettingsError: the file cannot be read, or its first line is neither JSON nor a header with item_id.
    """
    table, bad = ItemTable(), Bad()
    for line, fields in _rows(path):
        item_id = ""
        try:
            item_id, value = _item(fields)
            table.put(item_id, value)
            bad.pop(item_id, None)
        except BadRecord as error:
            bad[item_id or f"line {line}"] = f"{path}, line {line}: {error}"
    return table, bad


def items_of(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Yield line, id and value of each item of a file.

    Raises:
        SettingsError: the file cannot be read, or has a bad line, which is named.
    """
    for line, fields in _rows(path):
        try:
            item_id, value = _item(fields)
            ItemTable().put(item_id, value)
        except BadRecord as error:
            raise SettingsError(f"{path}, line {line}: {error}") from None
        yield line, item_id, value


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number and fields of each line; text if it is not JSON.

    Raises:
        SettingsError: the file cannot be read, or its first line is neither JSON nor a header with item_id.
    """
    try:
        yield from _lines(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SettingsError(f"the items in {path} cannot be read: {problem}") from None


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        if first.lstrip().startswith("{"):
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json(line)
            return
        delimiter = max("\t,;", key=first.count)
        rows = csv.DictReader(file, delimiter=delimiter)
        if "item_id" not in (rows.fieldnames or ()):
            raise SettingsError(
                f"the items in {path} cannot be read: the first line {first.strip()[:60]!r} is neither a JSON object "
                "nor a header with item_id (CSV, TSV)"
            )
        for row in rows:
            yield rows.line_num, {name: _typed(name, text) for name, text in row.items() if name and text}


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _typed(name: str, text: str) -> object:
    """Return a field of CSV as JSON would have it; text that does not fit is refused later."""
    if name == "available":
        return BOOLEANS.get(text.lower(), text)
    if name == "categories":
        return text.split("|")
    if name in ("available_from", "available_until", "boost"):
        try:
            return float(text) if name == "boost" else int(text)
        except ValueError:
            return text
    return text


def _item(fields: object) -> tuple[str, bytes]:
    """Return id and value.

    Raises:
        BadRecord: the line is no JSON object, or its item_id is no id.
    """
    if not isinstance(fields, dict):
        raise BadRecord("not a JSON object")
    item_id = fields.pop("item_id", None)
    if not isinstance(item_id, str | int) or isinstance(item_id, bool):
        raise BadRecord("item_id is missing, or neither text nor an integer")
    try:
        value = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise BadRecord(f"cannot be written as UTF-8 text: {error}") from None
    return identifier("item_id", item_id), value
