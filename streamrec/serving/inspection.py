"""`streamrec recs` and `streamrec user`: what is published for, and stored of, a user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import TypeVar

from streamrec.errors import StreamrecError
from streamrec.redis.client import SCAN_COUNT, RedisClient
from streamrec.schemas import PublishedList, UserSequence, parse_published
from streamrec.serving.sequences import parse_sequence

V = TypeVar("V")
Unreadable = Callable[[StreamrecError], None]


def published(
    redis: RedisClient, users: list[str] | None, unreadable: Unreadable | None = None
) -> AsyncIterator[tuple[str, PublishedList | None]]:
    """The published list of each user, None where there is none; of all users where ``users`` is None.

    A value that cannot be read raises, or is left out and told to ``unreadable`` where that is given.
    """
    return _parsed(_values(redis, redis.keys.recommendation, users), parse_published, unreadable)


def stored(
    redis: RedisClient, users: list[str] | None, unreadable: Unreadable | None = None
) -> AsyncIterator[tuple[str, UserSequence | None]]:
    """The same of stored sequences."""
    return _parsed(_values(redis, redis.keys.sequence, users), parse_sequence, unreadable)


async def _parsed(
    values: AsyncIterator[tuple[str, bytes | None]],
    parse: Callable[[str, bytes], V],
    unreadable: Unreadable | None,
) -> AsyncIterator[tuple[str, V | None]]:
    async for user, value in values:
        try:
            parsed = None if value is None else parse(user, value)
        except StreamrecError as error:
            if unreadable is None:
                raise
            unreadable(error)
            continue
        yield user, parsed


async def _values(
    redis: RedisClient, key_of: Callable[[str], str], users: list[str] | None
) -> AsyncIterator[tuple[str, bytes | None]]:
    everybody = users is None
    if users is None:
        prefix = key_of("").removesuffix("}")  # up to and with the opening brace
        users = [redis.keys.user_of(name) async for name in redis.scan(prefix)]
    rest = iter(users)
    while chunk := list(islice(rest, SCAN_COUNT)):
        for user, value in zip(chunk, await redis.get_many([key_of(user) for user in chunk]), strict=True):
            if value is not None or not everybody:  # else it expired since the scan
                yield user, value
