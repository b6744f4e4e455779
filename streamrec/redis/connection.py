"""Turn the settings into options of redis-py, and into the server or servers that they name."""

from __future__ import annotations

from typing import Any

from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from streamrec.errors import SettingsError
from streamrec.redis.cluster import Cluster
from streamrec.redis.nodes import OneServer
from streamrec.redis.sentinels import Sentinels, WatchedServer
from streamrec.setting_groups import RedisSettings
from streamrec.tls import REDIS, tls_context

MAX_CONNECTIONS = 6  # per node: loop, refresh, probe, re-scoring, listener, page
RETRIES = 2


def connect(settings: RedisSettings) -> OneServer | Cluster | WatchedServer:
    """Return the server or servers that the settings name; no connection is made yet.

    Raises:
        SettingsError: the URL has an unknown option or a wrong value of one, or a TLS file is wrong.
    """
    identity = _identity(settings)
    try:
        options = {
            "max_connections": MAX_CONNECTIONS,
            "timeout": settings.timeout_s * (RETRIES + 2),
            "socket_timeout": settings.timeout_s,
            "socket_connect_timeout": settings.timeout_s,
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), RETRIES),
            **identity,
            **parse_url(settings.server_url),
        }
        return _nodes(settings, options)
    except (ValueError, TypeError, RedisError) as error:
        raise SettingsError(f"redis_url: an option after the ? is unknown or wrong: {error}") from None


def _nodes(settings: RedisSettings, options: dict[str, Any]) -> OneServer | Cluster | WatchedServer:
    """Return the server or servers that the settings name."""
    sentinels = settings.sentinels
    if sentinels is None:
        return Cluster(options) if settings.cluster else OneServer(options)
    password = settings.sentinel_password
    login = {"username": settings.sentinel_username, "password": password.get_secret_value() if password else None}
    return WatchedServer(options, Sentinels(sentinels.sentinels, sentinels.name, options, login))


def _identity(settings: RedisSettings) -> dict[str, Any]:
    """Return the options of redis-py for login and TLS."""
    password = settings.password
    given: dict[str, Any] = {"username": settings.username}
    given["password"] = password.get_secret_value() if password else None
    if settings.uses_tls:
        tls_context(settings.tls, REDIS)  # redis-py would read the files later, without naming the wrong one
        files = {"ca_certs": settings.tls.ca_file, "certfile": settings.tls.cert_file}
        files["keyfile"] = settings.tls.key_file
        given |= {f"ssl_{name}": str(path) if path else None for name, path in files.items()}
        given["ssl_check_hostname"] = True  # the default only of newer redis-py
    return {name: value for name, value in given.items() if value}
