"""Errors of Redis in words for the operator, by what helps.

RedisUnavailable   waiting: the server does not answer, or takes no writes now (RedisTakesNoWrites)
RedisRefused       an operator: login, right, kind of server
RedisRejected      neither: the data of this command, or of its key, are in the way
"""

from __future__ import annotations

import re

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    DataError,
    ExecAbortError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from streamrec.errors import RIGHTS_ARE_LISTED, RedisRefused, RedisRejected, RedisTakesNoWrites, RedisUnavailable
from streamrec.redis.nodes import NotReplicated
from streamrec.redis.sentinels import NoPrimary, SentinelRefused
from streamrec.redis_urls import SENTINEL_FORM
from streamrec.setting_groups import RedisSettings
from streamrec.tls import REDIS, closed_connection_hint, tls_problem

REFUSAL = "STREAMREC "  # first word of errors that our scripts raise
# a server refuses for now; redis-py has types for some of these codes only
FOR_NOW = (
    *(AskError, BusyLoadingError, ClusterDownError, ExecAbortError, NoScriptError, NotReplicated, OutOfMemoryError),
    *(ReadOnlyError, TryAgainError),
)
CODES_FOR_NOW = re.compile(
    "(?:^|-)(?:OOM|MISCONF|NOREPLICAS|READONLY|LOADING|MASTERDOWN|BUSY|UNKILLABLE|INPROG|DENIED) |max number of clients"
)

RedisFailure = RedisUnavailable | RedisRejected


def redis_error(settings: RedisSettings, error: Exception, key: str = "") -> RedisFailure:
    """Return an error of Redis with its address, the reason, and what to do.

    Args:
        key: of the command that failed.
    """
    kind, detail = _explained(settings, error)
    if kind is RedisUnavailable and _is_for_now(error):
        at_key = f" (key {key})" if key and "," not in key else ""
        return RedisTakesNoWrites(f"Redis at {settings.address}: {detail}{at_key}{_remedy(error, detail)}")
    if kind is RedisUnavailable and isinstance(error, (ResponseError, DataError)):
        if detail.startswith(REFUSAL):
            return RedisRejected(detail.removeprefix(REFUSAL))
        return RedisRejected(f"key {key} of Redis at {settings.address}: {detail}{_remedy(error, detail)}")
    return kind(f"Redis at {settings.address}: {detail}")


def _is_for_now(error: Exception) -> bool:
    return isinstance(error, FOR_NOW) or CODES_FOR_NOW.search(str(error)) is not None


def _remedy(error: Exception, detail: str) -> str:
    if isinstance(error, OutOfMemoryError) or detail.startswith("OOM"):
        return "; Redis is full: raise its maxmemory"
    return "; another program wrote the key: remove or rename it" if detail.startswith("WRONGTYPE") else ""


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
