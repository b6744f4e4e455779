"""Send commands to the primary that Redis Sentinel names.

redis-py's own pool for Sentinel is not used, for three reasons. It queries the sentinels only when it connects, so it
continues to use a former primary that still answers. It raises when all connections are busy. And its error does not
say whether no sentinel answers, the name is unknown, or a failover is due.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from streamrec.redis.nodes import Address, OneServer, new_client, renew
from streamrec.waiting import cancel

OF_THE_PRIMARY = ("host", "port", "db", "username", "password")  # options that do not hold for a sentinel
GRACE_S = (
    0.1  # for the last sentinels to answer: one that hangs must not delay, and one alone may know the newest primary
)
State = Mapping[str, Any]  # of a primary, as a sentinel sees it
View = Mapping[str, State]  # the primaries that a sentinel monitors, by name


class NoPrimary(RedisError):
    """The sentinels name no primary; the message says what to do."""


class SentinelRefused(NoPrimary):
    """A sentinel refuses the password or a right."""


class Sentinels:
    """The sentinels that watch a primary.

    Args:
        addresses: their hosts and ports.
        name: of the primary, as the sentinels know it.
        options: of the primary's connection pool.
        login: options for the sentinels that differ.
    """

    def __init__(
        self, addresses: Sequence[Address], name: str, options: Mapping[str, Any], login: Mapping[str, Any]
    ) -> None:
        self._name = name
        common = {key: value for key, value in options.items() if key not in OF_THE_PRIMARY}
        common |= {**login, "retry": Retry(NoBackoff(), 1)}
        self._clients = {
            f"{host}:{port}": new_client({**common, "host": host, "port": port}) for host, port in addresses
        }

    async def primary(self) -> Address:
        """Return the address of the primary. The answer of the newest failover counts.

        Raises:
            NoPrimary: no sentinel answers, knows the name, or sees the primary up.
        """
        views, errors = await self._query()
        states = [view[self._name] for view in views if self._name in view]
        if not views:
            raise _none_answers(errors)
        if not states:
            known = ", ".join(sorted({name for view in views for name in view})) or "none"
            raise NoPrimary(
                f"the sentinels know no primary {self._name!r} (they know: {known}); correct the name in "
                "STREAMREC_REDIS_URL, or let the sentinels monitor it"
            )
        newest = max(states, key=lambda state: (state["config-epoch"], not _is_down(state)))
        host, port = newest["ip"], int(newest["port"])
        if _is_down(newest):
            raise NoPrimary(
                f"the sentinels see the primary {self._name!r} ({host}:{port}) down and name no other; if none follows "
                f"soon, `SENTINEL CKQUORUM {self._name}` at a sentinel says why"
            )
        return host, port

    def renew(self) -> None:
        """Resolve the names of the sentinels anew at the next query."""
        for client in self._clients.values():
            renew(client)

    async def aclose(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()

    async def _query(self) -> tuple[list[View], dict[str, BaseException]]:
        """Return what the sentinels see, and the errors of the others. Wait little for one that hangs."""
        queried = {asyncio.ensure_future(client.sentinel_masters()): a for a, client in self._clients.items()}
        waiting = set(queried)
        views: list[Any] = []
        errors: dict[str, BaseException] = {}
        try:
            while waiting:
                most_answered = len(views) > len(queried) // 2
                done, waiting = await asyncio.wait(
                    waiting, timeout=GRACE_S if most_answered else None, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for task in done:
                    error = task.exception()
                    if error is None:
                        views.append(task.result())
                    else:
                        errors[queried[task]] = error
        finally:
            await cancel(*waiting)
        return views, errors


def _none_answers(errors: Mapping[str, BaseException]) -> NoPrimary:
    """Return the error if no sentinel answered: the most telling one, and what to do."""
    for address, error in errors.items():
        if isinstance(error, (AuthenticationError, NoPermissionError)):
            return SentinelRefused(
                f"sentinel {address}: {error}; set STREAMREC_REDIS_SENTINEL_USERNAME and "
                "STREAMREC_REDIS_SENTINEL_PASSWORD, or ..._PASSWORD_FILE; the user needs +sentinel|masters"
            )
        if isinstance(error, ResponseError):
            return NoPrimary(f"{address} is no sentinel ({error}); name sentinels, or write redis://{address}/DB")
    address, error = next(iter(errors.items()))
    found = NoPrimary(
        f"no sentinel answers ({address}: {error}); is STREAMREC_REDIS_URL right, and are the sentinels up?"
    )
    found.__cause__ = error
    return found


class WatchedServer(OneServer):
    """The primary that sentinels name; they are queried again after any error.

    Args:
        options: of redis-py's connection pool; host and port are replaced by those of the primary.
    """

    def __init__(self, options: Mapping[str, Any], sentinels: Sentinels) -> None:
        super().__init__(options)
        self._options = dict(options)
        self._sentinels = sentinels
        self._address: Address | None = None
        self._former: list[redis.Redis] = []  # their busy connections end by themselves
        self._stale = True
        self._querying = asyncio.Lock()

    async def client_of(self, key: str) -> redis.Redis:
        """Return the client of the primary.

        Raises:
            NoPrimary: the sentinels name none.
        """
        if self._stale:
            async with self._querying:
                if self._stale:
                    await self._query()
        return self._client

    async def follow(self) -> None:
        """Query the sentinels though no error came: a former primary that they cannot reach may still answer here."""
        if not self._stale:
            with contextlib.suppress(NoPrimary):
                async with self._querying:
                    await self._query()

    async def aclose(self) -> None:
        """Close all connections."""
        for client in (self._client, *self._former):
            await client.aclose()
        await self._sentinels.aclose()

    async def _query(self) -> None:
        """Query the sentinels; close idle connections to former primaries; after an error renew the others."""
        if self._stale:
            self._sentinels.renew()
        address = await self._sentinels.primary()
        if address != self._address:
            self._former.append(self._client)
            self._client = new_client(self._options | {"host": address[0], "port": address[1]})
            self._address = address
        elif self._stale:
            renew(self._client)
        for client in self._former:  # nobody takes their connections any more
            await client.connection_pool.disconnect(inuse_connections=False)
        self._stale = False


def _is_down(state: State) -> bool:
    return bool(state["is_sdown"] or state["is_odown"] or not state["is_master"])
