"""Members of the consumer group: their names, and removing one whose client cannot leave by itself."""

from __future__ import annotations

import asyncio
import collections
import os
import socket
from collections.abc import Callable
from pathlib import Path

from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.errors import KafkaError
from aiokafka.protocol.admin import DescribeGroupsRequest
from aiokafka.protocol.group import LeaveGroupRequest

from streamrec.kafka.connection import FencedInstanceIdError, check_brokers, connection_options, kafka_error
from streamrec.setting_groups import KafkaSettings

TIMEOUT_S = 5.0
# A static member that loses its place this often has a twin; a session that ended costs it one place.
LOST_TIMES, LOST_WITHIN_S = 3, 60.0


class StaticPlace:
    """The place that a static member has in its group under `kafka_group_instance_id`."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._lost_s: collections.deque[float] = collections.deque(maxlen=LOST_TIMES)

    def lost(self, now_s: float) -> None:
        """Note that the group does not know this member any more: its session ended, or another took its name.

        aiokafka does not tell the two apart.
        """
        self._lost_s.append(now_s)

    @property
    def is_taken(self) -> bool:
        """Whether another member has the same name."""
        often = len(self._lost_s) == LOST_TIMES and self._lost_s[-1] - self._lost_s[0] < LOST_WITHIN_S
        return often and self._kafka.group_instance_id is not None

    def check(self) -> None:
        """Raise KafkaForbidden if another member has the same name."""
        if self.is_taken:
            raise kafka_error(self._kafka, FencedInstanceIdError())


def member_name() -> str:
    """Return a new client id for a group member of this process; it names the machine and the process."""
    return f"{member_prefix()}{os.getpid()}-{os.urandom(3).hex()}"


def member_prefix() -> str:
    """Return the start of the client ids of this machine's members; the process id follows."""
    # process ids are unique within their namespace only; containers may share a host name, and so may machines
    namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    booted = boot.read_text().strip() if boot.exists() else ""
    return f"streamrec-{socket.gethostname()}-{booted}-{inode}-"


async def remove_members(kafka: KafkaSettings, chosen: Callable[[str], bool]) -> int:
    """Leave the group on behalf of its members with chosen client ids; return how many there were.

    It only spares the others the session time-out: if the broker does not allow it, nothing happens.
    """
    client = AIOKafkaClient(**connection_options(kafka))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await client.bootstrap()
            check_brokers(client)
            node = await client.coordinator_lookup(CoordinationType.GROUP, kafka.group)
            if not await client.ready(node, group=ConnectionGroup.COORDINATION):
                return 0
            request = DescribeGroupsRequest([kafka.group])
            described = await client.send(node, request, group=ConnectionGroup.COORDINATION)
            members = [member for _, _, _, _, _, members, *_ in described.groups for member in members]
            removed = [member_id for member_id, client_id, *_ in members if chosen(client_id)]
            for member_id in removed:
                await client.send(node, LeaveGroupRequest(kafka.group, member_id), group=ConnectionGroup.COORDINATION)
            return len(removed)
    except (KafkaError, OSError, TimeoutError):
        return 0
    finally:
        await client.close()
