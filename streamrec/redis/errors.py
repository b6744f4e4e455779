"""Errors of Redis in words for the operator."""

from __future__ import annotations

from redis.exceptions import AskError, AuthenticationError, ClusterCrossSlotError, NoPermissionError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from streamrec.errors import RIGHTS_ARE_LISTED, RedisRefused, RedisUnavailable
from streamrec.redis.sentinels import NoPrimary, SentinelRefused
from streamrec.redis_urls import SENTINEL_FORM
from streamrec.setting_groups import RedisSettings
from streamrec.tls import REDIS, closed_connection_hint, tls_problem


def redis_error(settings: RedisSettings, error: Exception) -> RedisUnavailable:
    """Return an error of Redis with its address, the reason, and what to do."""
    kind, detail = _explained(settings, error)
    return kind(f"Redis at {settings.address}: {detail}")


def _explained(settings: RedisSettings, error: Exception) -> tuple[type[RedisUnavailable], str]:
    detail = (str(error) or type(error).__name__).rstrip(".")
    if not settings.cluster and isinstance(error, (AskError, ClusterCrossSlotError)):
        return RedisRefused, "it is a node of a Redis Cluster; set STREAMREC_REDIS_CLUSTER=true"
    if isinstance(error, AskError):
        return RedisUnavailable, f"its nodes do not agree on the owner of slot {error.slot_id}"
    if settings.cluster and "cluster support disabled" in detail:
        return RedisRefused, "it is a single server, no Redis Cluster; set STREAMREC_REDIS_CLUSTER=false"
    problem = tls_problem(error, REDIS, settings.tls)
    if problem:
        return RedisRefused, problem
    if isinstance(error, NoPrimary):
        detail += closed_connection_hint(error, REDIS, settings.uses_tls, settings.tls)
        return RedisRefused if isinstance(error, SentinelRefused) else RedisUnavailable, detail
    if "unknown command" in detail.lower() and "'exists'" in detail.lower():
        return RedisRefused, f"it is a sentinel, no server; write {SENTINEL_FORM}"
    if isinstance(error, AuthenticationError):
        return (
            RedisRefused,
            f"{detail}; set STREAMREC_REDIS_USERNAME and STREAMREC_REDIS_PASSWORD, or ..._PASSWORD_FILE",
        )
    if "DB index is out of range" in detail:
        return RedisRefused, f"{detail}; the number at the end of STREAMREC_REDIS_URL is too large"
    if isinstance(error, NoPermissionError) or "ACL failure" in detail or "The user executing the script" in detail:
        return RedisRefused, f"{detail}; {RIGHTS_ARE_LISTED}"
    if isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError)):
        if settings.sentinels:
            question = "; is this server, which the sentinels name, up and reachable from here?"
        else:
            question = "; is STREAMREC_REDIS_URL right, and the server up?"
        detail += closed_connection_hint(error, REDIS, settings.uses_tls, settings.tls) or question
    return RedisUnavailable, detail
