"""`streamrec serve`: run the daemon."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import TYPE_CHECKING

from streamrec.commands.options import KAFKA, REDIS, Subparsers, add_command
from streamrec.settings import Settings, own_settings

if TYPE_CHECKING:
    from streamrec.local.servers import LocalServers

FLAGS = (
    *KAFKA,
    *REDIS,
    "kafka_group",
    "model_dir",
    "registry_dir",
    "sequences_max_len",
    "sequences_session_gap_s",
    "lists_top_k",
    "lists_filter_seen",
    "events_preset",
    "events_roles",
    "kafka_max_batch",
    "http_host",
    "http_port",
    "http_titles",
    "log_level",
    "log_format",
)


def add_to(commands: Subparsers) -> None:
    """Declare the command."""
    command = add_command(
        commands,
        "serve",
        run,
        FLAGS,
        "run the daemon: read clicks, publish lists",
        "Read clicks from Kafka, store every user's last items in Redis, and publish a fresh list after every click. "
        "If Kafka, Redis or the registry's first champion is missing, the daemon waits for it. "
        "SIGTERM or Ctrl-C finishes the current batch, commits and leaves the group; a second signal exits at once.",
    )
    command.add_argument("--burst", action="store_true", help="read the topic to its end, then exit; wait for nothing")
    command.add_argument(
        "--embedded",
        action="store_true",
        help="start Redis and a Kafka-protocol server as child processes and print their addresses; their data are "
        "deleted at exit",
    )


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from streamrec.daemon import serve
    from streamrec.errors import NoChampion
    from streamrec.stop_signals import end_soon

    if not options.embedded:
        return asyncio.run(serve(settings, options.burst, on_end=end_soon))
    from streamrec.local.embedded_kafka import adapt
    from streamrec.local.servers import LocalServers
    from streamrec.serving.model import read_model

    with contextlib.suppress(NoChampion):  # the daemon waits for it
        read_model(settings)  # fail before anything is started
    adapt()
    with LocalServers() as servers:
        print(f"export STREAMREC_KAFKA_BOOTSTRAP_SERVERS={servers.kafka_bootstrap_servers}")
        print(f"export STREAMREC_REDIS_URL={servers.redis_url}", flush=True)
        return asyncio.run(serve(_embedded(settings, servers), options.burst, on_end=end_soon))


def _embedded(settings: Settings, servers: LocalServers) -> Settings:
    """Return the settings with the addresses of the embedded servers, which use neither TLS nor passwords."""
    security = [
        name
        for name, setting in own_settings().items()
        if setting.group in ("kafka", "redis") and setting.key.startswith(("tls_", "username", "password"))
    ]
    given = {name: value for name, value in settings.given.items() if name not in security}
    return Settings.of(
        **given
        | {
            "kafka_bootstrap_servers": servers.kafka_bootstrap_servers,
            "kafka_security_protocol": "PLAINTEXT",
            "redis_url": servers.redis_url,
            "redis_cluster": False,
            "redis_wait_replicas": 0,
        }
    )
