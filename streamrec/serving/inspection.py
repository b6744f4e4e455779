"""Published lists and stored sequences for `streamrec recs` and `streamrec user`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import TypeVar

from streamrec.errors import StreamrecError
from streamrec.redis.client import SCAN_COUNT, RedisClient
from streamrec.schemas import PublishedList, UserSequence, parse_published
from streamrec.serving.sequences import parse_sequence

V = TypeVar("V")
OnError = Callable[[StreamrecError], None]


def published(
    redis: RedisClient, users: list[str] | None, on_error: OnError | None = None
) -> AsyncIterator[tuple[str, PublishedList | None]]:
    """Yield each user's published list, None if there is none.

    Args:
        users: all users if None.
        on_error: called with the error of a value that cannot be read, which is left out [raise the error].
    """
    return _parsed(_values(redis, redis.keys.recommendation, users), parse_published, on_error)


def stored(
    redis: RedisClient, users: list[str] | None, on_error: OnError | None = None
) -> AsyncIterator[tuple[str, UserSequence | None]]:
    """Yield each user's stored sequence; arguments as for ``published``."""
    return _parsed(_values(redis, redis.keys.sequence, users), parse_sequence, on_error)


async def _parsed(
    values: AsyncIterator[tuple[str, bytes | None]],
    parse: Callable[[str, bytes], V],
    on_error: OnError | None,
) -> AsyncIterator[tuple[str, V | None]]:
    async for user, value in values:
        try:
            parsed = None if value is None else parse(user, value)
        except StreamrecError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        yield user, parsed


async def _values(
    redis: RedisClient, key_of: Callable[[str], str], users: list[str] | None
) -> AsyncIterator[tuple[str, bytes | None]]:
    all_users = users is None
    if users is None:
        prefix = key_of("").removesuffix("}")  # includes the opening brace
        found = [redis.keys.user_of(name) async for name in redis.scan(prefix)]
        users = [user for user in found if user is not None]  # another program may have put a key there
    remaining = iter(users)
    while chunk := list(islice(remaining, SCAN_COUNT)):
        for user, value in zip(chunk, await redis.get_many([key_of(user) for user in chunk]), strict=True):
            if value is not None or not all_users:  # else the key expired after the scan
                yield user, value
