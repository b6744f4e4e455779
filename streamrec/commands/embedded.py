"""Run `python -m streamrec.commands.embedded ...` as `streamrec ...`, against the embedded Kafka-protocol server.

Demo, benchmark and tests start their child processes with it. It adapts aiokafka to that server, and removes group
members of dead daemons, which the server itself never removes.
"""

from __future__ import annotations

import asyncio
import sys

from streamrec.commands.main import main
from streamrec.errors import StreamrecError
from streamrec.kafka.members import member_prefix, remove_members
from streamrec.local.embedded_kafka import adapt, has_died
from streamrec.settings_sources import load_settings


def run(arguments: list[str]) -> int:
    """Run a command; return the exit status."""
    adapt()
    if arguments[:1] == ["serve"]:
        try:
            kafka = load_settings().kafka
            asyncio.run(remove_members(kafka, lambda client_id: has_died(client_id, member_prefix())))
        except StreamrecError:
            pass  # the command reports it
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
