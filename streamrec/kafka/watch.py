"""Watch whether Kafka answers, and the lag."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from streamrec.errors import StreamrecError
from streamrec.health import Health
from streamrec.kafka.connection import BROKER_TIMEOUT_S, NO_RIGHT, client_of, diagnose, learn_brokers_again
from streamrec.kafka.lag import Lag
from streamrec.setting_groups import KafkaSettings

log = logging.getLogger(__name__)

WATCH_EVERY_S = 2.0
LEARN_AGAIN_AFTER_S = 10.0  # without an answer, the brokers may have moved to other addresses


class BrokerWatch:
    """Fetches the lag regularly; this also shows whether Kafka answers."""

    def __init__(self, kafka: KafkaSettings, consumer: AIOKafkaConsumer, lag: Lag, health: Health) -> None:
        self._kafka = kafka
        self._consumer = consumer
        self._lag = lag
        self._health = health
        self._answered_s = health.now_s()

    async def run(self) -> None:
        """Watch without end."""
        while True:
            settled = not self._rebalancing
            try:
                async with asyncio.timeout(BROKER_TIMEOUT_S):
                    await self._fetch_lag()
            except (KafkaError, TimeoutError, OSError) as error:
                if settled and self._rebalancing:
                    continue  # the coordinator does not answer during a join: fetch metadata instead
                await self._note_silence(error)
            else:
                self._note_answer()
            await asyncio.sleep(WATCH_EVERY_S)

    @property
    def _rebalancing(self) -> bool:
        return self._health.rebalancing_since_s is not None

    async def _fetch_lag(self) -> None:
        assigned = self._consumer.assignment()
        if not assigned or self._rebalancing:  # the coordinator is busy; metadata shows whether a broker answers
            # The group's leader assigns the partitions that its metadata name. Those of a broker that has just started
            # may lack the topic: without new ones the group would have no partitions until they expire.
            if not await client_of(self._consumer).force_metadata_update():
                raise KafkaError("no broker answers a request for metadata")
        else:
            await self._lag.fetch(self._consumer, assigned)

    def _note_answer(self) -> None:
        self._answered_s = self._health.now_s()
        self._lag.publish()
        if not self._health.kafka_answers:
            log.info("Kafka is reachable again")
            self._health.tick()  # the loop needs a moment before it polls and commits again
            self._health.progressed()
        self._health.kafka_answers = True

    async def _note_silence(self, error: Exception) -> None:
        answered, self._health.kafka_answers = self._health.kafka_answers, False
        if answered and not isinstance(error, NO_RIGHT):  # the next poll reports a missing right
            log.warning("Kafka is unreachable, waiting for it: %s", await diagnose(self._kafka, error))
        if self._health.now_s() - self._answered_s > LEARN_AGAIN_AFTER_S:
            with contextlib.suppress(StreamrecError, KafkaError, OSError):
                async with asyncio.timeout(BROKER_TIMEOUT_S):
                    await learn_brokers_again(self._kafka, self._consumer)
