"""Find the users whose data make a call fail, so that all others are served.

No list of errors says which are a user's own. So a call that fails is repeated for each user alone, and beside each
user who fails, a test call is made: it has the same script and slot, other keys, and harmless arguments.

only the user's call fails   Redis refuses the user's data
both calls fail              the server refuses everything: the batch waits
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from streamrec.errors import RedisRejected, RedisUnavailable
from streamrec.redis.errors import RedisFailure
from streamrec.redis.nodes import RedisArg
from streamrec.redis.script import Script

CONTROL = ":control"  # ends the keys of a test call; the hash tag before it places them beside the user's
TRIES = 3  # of a call at which the connection is lost; a test call succeeds between them
# at data that a server or a proxy does not take, like a value that is too long, some close the connection
LOST = re.compile("while (?:reading|writing)|closed by server|reset by peer")

Call = tuple[list[str], list[RedisArg]]
Attempt = Callable[[Script, Sequence[Call]], Awaitable[list[Any]]]
ErrorOf = Callable[[Exception, Sequence[str]], RedisFailure]


class Isolation:
    """Repeats the calls of users that have failed.

    Args:
        attempt: makes calls; returns the answers, errors among them.
        error_of: explains an error for some keys.
    """

    def __init__(self, script: Script, attempt: Attempt, error_of: ErrorOf) -> None:
        self._script = script
        self._attempt = attempt
        self._error_of = error_of

    async def together(self, failure: Exception, calls: Sequence[Call]) -> list[list[Any] | RedisRejected]:
        """Return the replies after one call for all users has failed.

        Raises:
            RedisUnavailable: the server refuses or does not answer.
        """
        if _is_lost(failure):
            return await self.each([failure] * len(calls), calls)
        error = self._error_of(failure, [])
        if isinstance(error, RedisUnavailable):
            raise error from failure
        return await self.each(await self._attempt(self._script, calls), calls)

    async def each(self, answers: list[Any], calls: Sequence[Call]) -> list[list[Any] | RedisRejected]:
        """Return the replies after each user had a call; an error in place of a reply that never comes.

        Raises:
            RedisUnavailable: the server refuses or does not answer.
        """
        lost = [place for place, answer in enumerate(answers) if _is_lost(answer)]
        if lost:
            await self._check_server(answers[lost[0]], [calls[lost[0]]])
        for place in lost:
            answers[place] = await self._alone(calls[place])
        failed = [place for place, answer in enumerate(answers) if isinstance(answer, Exception)]
        for place in failed:
            answers[place] = self._rejection(answers[place], calls[place][0])
        for place in failed[:1]:
            await self._check_server(answers[place], [calls[place] for place in failed])
        return answers

    async def _alone(self, call: Call) -> Any:
        """Return the answer to a call at which the connection was lost; the error if it is lost each time."""
        answer: Any = None
        for _ in range(TRIES):
            (answer,) = await self._attempt(self._script, [call])
            if not _is_lost(answer):
                break
            await self._check_server(answer, [call])
        return answer

    def _rejection(self, answer: Exception, keys: Sequence[str]) -> RedisRejected:
        if _is_lost(answer):
            return RedisRejected(f"key {', '.join(keys)}: Redis takes other calls, and ends the connection at this one")
        error = self._error_of(answer, keys)
        if isinstance(error, RedisUnavailable):
            raise error from answer
        return error

    async def _check_server(self, error: Exception, calls: Sequence[Call]) -> None:
        """Raise RedisUnavailable if test calls beside the users of these calls fail too."""
        controls: list[Call] = [
            ([f"{keys[0]}{place or ''}{CONTROL}" for place in range(len(keys))], list(self._script.control))
            for keys, _ in calls
        ]
        for answer in await self._attempt(self._script, controls):
            if isinstance(answer, Exception):
                failure = self._error_of(answer, [])
                if isinstance(failure, RedisRejected):
                    failure = RedisUnavailable(f"{error}; a test call with other keys fails too")
                raise failure from answer


def _is_lost(answer: Any) -> bool:
    return type(answer) is RedisConnectionError and LOST.search(str(answer)) is not None
