"""The table of items from a compacted Kafka topic: read whole at the start, then followed.

    key            item id
    value          JSON (table.py); none: the item is gone
    a bad record   a dead letter; the item's former row remains
    another topic  it was created again or cut back: it is read whole, and items that it lacks are gone

While Kafka does not answer, the daemon continues with the table that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection

from streamrec.errors import BadRecord, KafkaUnavailable, TopicChanged
from streamrec.items.refusals import Refusals
from streamrec.items.table import ItemTable
from streamrec.kafka.decode import identifier
from streamrec.kafka.table import Record, TableReader
from streamrec.logs import LogOnce
from streamrec.metrics import Metrics
from streamrec.schemas import DeadLetter
from streamrec.setting_groups import KafkaSettings

log = logging.getLogger(__name__)

START_RECORDS, FOLLOW_RECORDS = 5_000, 500  # of a poll: clicks wait for them
LOG_EVERY_S = 5.0
MOST_LETTERS = 1_000  # bad records that wait to be sent; a topic of nothing else must not fill the memory
RETRY_S = 1.0

Send = Callable[[Collection[DeadLetter]], Awaitable[None]]


class ItemTopic:
    """Reads the items topic into the table of the refusals.

    Args:
        kafka: the settings, with the items topic as topic.
        send: sends dead letters until they are acknowledged.
    """

    def __init__(self, kafka: KafkaSettings, refusals: Refusals, metrics: Metrics, send: Send) -> None:
        self._kafka = kafka
        self._refusals = refusals
        self._metrics = metrics
        self._send = send
        self._clients = contextlib.AsyncExitStack()
        self._reader: TableReader | None = None
        self._letters: list[DeadLetter] = []
        self._log_away = LogOnce(log)
        self._log_bad = LogOnce(log)

    async def read(self) -> None:
        """Read the topic to the end that it has now.

        Raises:
            KafkaUnavailable: Kafka does not answer; read again. KafkaForbidden: the right to read is missing.
        """
        table, _ = await self._read_whole()
        self._refusals.replace(table)
        self._show()

    async def follow(self) -> None:
        """Apply the next records."""
        await self._send_letters()
        try:
            if self._reader is None:
                await self._read_again()
            else:
                self._apply(await self._reader.poll(FOLLOW_RECORDS))
        except TopicChanged:
            log.info("the items topic was created again or cut back: it is read whole", extra=self._where)
            await self._close()
        except KafkaUnavailable as error:
            self._log_away("items are not followed, the table remains as it is: %s", error)
            await asyncio.sleep(RETRY_S)
        else:
            self._log_away.reset()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._close()

    async def _read_whole(self) -> tuple[ItemTable, set[str]]:
        """Return the table that the topic makes, and the ids of bad records."""
        await self._close()
        table, bad, started_s = ItemTable(), set[str](), time.monotonic()
        logged_s = started_s
        self._reader = reader = await self._clients.enter_async_context(TableReader(self._kafka))
        try:
            while True:
                for record in await reader.poll(START_RECORDS):
                    self._put(record, table.put, table.remove, bad)
                read, in_all = await reader.progress()
                if read >= in_all:
                    break
                if time.monotonic() - logged_s > LOG_EVERY_S:
                    logged_s = time.monotonic()
                    log.info("reading items", extra=self._where | {"read": read, "of": in_all, "items": len(table)})
                await asyncio.sleep(0)
        except BaseException:
            await self._close()
            raise
        took_s = round(time.monotonic() - started_s, 1)
        log.info("items read", extra=self._where | {"items": len(table), "bad": len(bad), "seconds": took_s})
        if not table:
            log.warning("the items topic is empty: until it has an item, no item is refused", extra=self._where)
        return table, bad

    async def _read_again(self) -> None:
        """Read the topic whole, and apply what differs from the table."""
        table, bad = await self._read_whole()
        await self._refusals.change_to(table, bad)
        self._show()

    def _apply(self, records: list[Record]) -> None:
        for record in records:
            self._put(record, self._refusals.put, self._refusals.remove, set())
        if records:
            self._show()

    def _put(
        self, record: Record, put: Callable[[str, bytes], None], remove: Callable[[str], None], bad: set[str]
    ) -> None:
        """Apply a record; a bad one becomes a dead letter, and its id is added to ``bad``."""
        item_id = ""
        try:
            item_id = item_of(record)
            if record.value is None:
                remove(item_id)
            else:
                put(item_id, record.value)
            bad.discard(item_id)
        except BadRecord as error:
            bad.add(item_id)
            self._refuse(record.letter(str(error)))

    def _refuse(self, letter: DeadLetter) -> None:
        self._metrics.bad_items.inc()
        where = {"topic": letter.topic, "partition": letter.partition, "offset": letter.offset}
        self._log_bad("bad item: %s; its former row remains (%s)", letter.reason, where)
        if len(self._letters) < MOST_LETTERS:
            self._letters.append(letter)

    async def _send_letters(self) -> None:
        letters = self._letters[:]
        if not letters:
            return
        try:
            await self._send(letters)
        except KafkaUnavailable as error:
            self._log_away("dead letters of items wait: %s", error)
        else:
            del self._letters[: len(letters)]

    async def _close(self) -> None:
        self._reader = None
        await self._clients.aclose()

    def _show(self) -> None:
        self._metrics.items.set(len(self._refusals.table or ()))

    @property
    def _where(self) -> dict[str, object]:
        return {"topic": self._kafka.topic}


def item_of(record: Record) -> str:
    """Return the item id of a record.

    Raises:
        BadRecord: the record cannot be read, or its key is no id.
    """
    if record.unreadable:
        raise BadRecord(record.unreadable)
    try:
        return identifier("the record's key", (record.key or b"").decode())
    except UnicodeDecodeError:
        raise BadRecord("the record's key is not UTF-8 text") from None
