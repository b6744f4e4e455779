"""Run a real Redis Cluster as child processes, for tests and the benchmark."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from streamrec.errors import EmbeddedError
from streamrec.local.process import START_TIMEOUT_S, ServerProcess, free_port
from streamrec.local.servers import answers_ping, redis_command

SLOTS = 16_384
BUS_PORT = 10_000  # added to the port of a node: nodes talk to each other there
HIGHEST_PORT = 65_535
NODE_TIMEOUT_MS = 1_000


class EmbeddedCluster:
    """Primaries that share the slots evenly, and their replicas, on free ports of 127.0.0.1.

    Each node starts with a nodes.conf that names all nodes, so that they need not find each other.

    Args:
        replicas: of each primary.
    """

    def __init__(self, primaries: int = 3, replicas: int = 0) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="streamrec-cluster-"))
        self.nodes = [self._node(number) for number in range(primaries * (1 + replicas))]  # the primaries first
        bounds = [SLOTS * place // primaries for place in range(primaries + 1)]
        self.slots = [range(start, end) for start, end in pairwise(bounds)]

    @property
    def redis_url(self) -> str:
        """URL of the first node."""
        return f"redis://127.0.0.1:{self.nodes[0].port}"

    def node_id(self, number: int) -> str:
        """Return the id of a node within the cluster."""
        return f"{number + 1:040x}"

    def replicas_of(self, primary: int) -> list[ServerProcess]:
        """Return the nodes that started as replicas of a primary."""
        return self.nodes[len(self.slots) + primary :: len(self.slots)]

    def start(self) -> Self:
        """Start all nodes and wait until they form a cluster.

        Raises:
            EmbeddedError: the server is not installed, or the nodes do not form a cluster.
        """
        try:
            for number, node in enumerate(self.nodes):
                (self._folder / str(node.port) / "nodes.conf").write_text(self._nodes_conf(number))
                node.start()
            deadline = time.monotonic() + START_TIMEOUT_S
            while not all(map(_is_in_cluster, self.nodes)):
                if time.monotonic() > deadline:
                    raise EmbeddedError(
                        f"the nodes of the embedded Redis Cluster formed no cluster; see {self._folder}"
                    )
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop all nodes and remove their data."""
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _node(self, number: int) -> ServerProcess:
        def command(port: int) -> list[str]:
            return [
                *redis_command(port, self._folder / str(port)),
                "--cluster-enabled",
                "yes",
                "--cluster-node-timeout",
                str(NODE_TIMEOUT_MS),
                "--repl-diskless-sync-delay",
                "0",
            ]

        node = ServerProcess("Redis", self._folder / f"node-{number}.log", command, answers_ping, _free_port())
        (self._folder / str(node.port)).mkdir()
        return node

    def _nodes_conf(self, myself: int) -> str:
        lines = []
        for number, node in enumerate(self.nodes):
            primary = number % len(self.slots)
            slots = self.slots[primary]
            if number < len(self.slots):
                role, of, rest = "master", "-", f" {slots[0]}-{slots[-1]}"
            else:
                role, of, rest = "slave", self.node_id(primary), ""
            flags = f"myself,{role}" if number == myself else role
            address = f"127.0.0.1:{node.port}@{node.port + BUS_PORT}"
            lines.append(f"{self.node_id(number)} {address} {flags} {of} 0 0 {primary + 1} connected{rest}\n")
        return "".join(lines) + f"vars currentEpoch {len(self.slots)} lastVoteEpoch 0\n"


def _is_in_cluster(node: ServerProcess) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", node.port), 1.0) as connection:
        connection.sendall(b"CLUSTER INFO\r\nINFO replication\r\nQUIT\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        return b"cluster_state:ok" in answer and b"master_link_status:down" not in answer
    return False


def _free_port() -> int:
    """Return a free port of 127.0.0.1 whose bus port is free too."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.socket() as bus:
            if port + BUS_PORT <= HIGHEST_PORT:
                bus.bind(("127.0.0.1", port + BUS_PORT))
                return port
