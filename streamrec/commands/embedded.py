"""Run `python -m streamrec.commands.embedded ...` as `streamrec ...`, against the embedded Kafka-protocol server.

Demo, benchmark and tests start their child processes with it. It adapts aiokafka to that server, and removes group
members of dead daemons, which the server itself never removes.
"""

from __future__ import annotations

import asyncio
import sys

from streamrec.commands import main as command_line
from streamrec.errors import StreamrecError
from streamrec.kafka.members import member_prefix, remove_members
from streamrec.local.embedded_kafka import adapt, has_died
from streamrec.logs import configure_logging
from streamrec.settings_sources import load_settings


def main() -> int:
    """Run the command of this process; return the exit status."""
    arguments = sys.argv[1:]
    adapt()
    configure_logging("CRITICAL", "text")  # the command reports what is wrong
    if arguments[:1] == ["serve"]:
        try:
            kafka = load_settings().kafka
            if kafka.group_instance_id is None:  # a static member resumes its place
                asyncio.run(remove_members(kafka, lambda client_id: has_died(client_id, member_prefix())))
        except StreamrecError:
            pass  # the command reports it
    return command_line.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
