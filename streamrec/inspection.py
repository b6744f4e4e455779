"""`streamrec recs` and `streamrec user`: what is published for, and stored of, a user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import islice

import msgspec

from streamrec.errors import StreamrecError
from streamrec.keys import Keys
from streamrec.redis_client import SCAN_COUNT, RedisClient
from streamrec.schemas import PublishedList, UserSequence
from streamrec.sequences import parse_sequence


def parse_published(user_id: str, value: bytes) -> PublishedList:
    """Read a recommendation key.

    Raises:
        StreamrecError: it is not what this version writes.
    """
    try:
        return msgspec.json.decode(value, type=PublishedList)
    except msgspec.MsgspecError as error:
        raise StreamrecError(f"the published list of user {user_id!r} cannot be read: {error}") from None


async def published(
    redis: RedisClient, keys: Keys, users: list[str] | None
) -> AsyncIterator[tuple[str, PublishedList | None]]:
    """The published list of each user, None where there is none; of all users where ``users`` is None."""
    async for user, value in _values(redis, keys, keys.recommendation, users):
        yield user, None if value is None else parse_published(user, value)


async def stored(
    redis: RedisClient, keys: Keys, users: list[str] | None
) -> AsyncIterator[tuple[str, UserSequence | None]]:
    """The stored sequence of each user, None where there is none; of all users where ``users`` is None."""
    async for user, value in _values(redis, keys, keys.sequence, users):
        yield user, None if value is None else parse_sequence(user, value)


async def _values(
    redis: RedisClient, keys: Keys, key_of: Callable[[str], str], users: list[str] | None
) -> AsyncIterator[tuple[str, bytes | None]]:
    everybody = users is None
    if users is None:
        prefix = key_of("").removesuffix("}")  # up to and with the opening brace
        users = [keys.user_of(name) async for name in redis.scan(prefix)]
    rest = iter(users)
    while chunk := list(islice(rest, SCAN_COUNT)):
        for user, value in zip(chunk, await redis.get_many([key_of(user) for user in chunk]), strict=True):
            if value is not None or not everybody:  # else it expired since the scan
                yield user, value
