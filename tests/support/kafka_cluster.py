"""Three nodes of Apache Kafka: three replicas of each partition, two of which acknowledge every record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from streamrec.local.apache_kafka import apache_kafka
from streamrec.local.process import ServerProcess, free_port

SIZE = 3


@contextlib.contextmanager
def kafka_cluster(home: Path, folder: Path, **properties: str) -> Iterator[list[ServerProcess]]:
    """Run the cluster; yield its nodes, which a test may stop, kill and pause.

    Args:
        properties: of each node, with _ for the dots.
    """
    more = {name.replace("_", "."): value for name, value in properties.items()}
    ports = [free_port() for _ in range(SIZE)]
    controllers = [free_port() for _ in range(SIZE)]
    voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in enumerate(controllers, 1))
    nodes = [
        apache_kafka(home, folder / str(number), _properties(number, port, controller, voters) | more, port)
        for number, (port, controller) in enumerate(zip(ports, controllers, strict=True), 1)
    ]
    try:
        for node in nodes:
            node.launch()
        for node in nodes:
            node.wait_up()
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def _properties(number: int, port: int, controller: int, voters: str) -> dict[str, str]:
    return {
        "node.id": str(number),
        "controller.quorum.voters": voters,
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
        "min.insync.replicas": str(SIZE - 1),
        "default.replication.factor": str(SIZE),
        "offsets.topic.replication.factor": str(SIZE),
        "transaction.state.log.replication.factor": str(SIZE),
        # a paused broker is replaced within seconds
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        "replica.lag.time.max.ms": "3000",
    }
