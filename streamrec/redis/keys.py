"""Name the Redis keys. The braces are literal: a hash tag places all keys of a user on one cluster node.

A hash tag ends at the first ``}``, and an empty one does not count. So ``}`` of a user id is percent-encoded, and ``%``
too: each id has one slot and one name. Keys without braces belong to no user, so no user id can collide with them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ENCODED = {"%": "%25", "}": "%7D"}
DECODED = {code: character for character, code in ENCODED.items()}
USER_KEY = re.compile(r":(?:seq|recs):\{((?:[^%}]|%25|%7D)+)\}", re.DOTALL)


@dataclass(frozen=True)
class Keys:
    """Key names under a prefix."""

    prefix: str = "streamrec"

    def sequence(self, user_id: str) -> str:
        """Return the key of a user's sequence, STRING: header, then the last items (serving/sequences.py)."""
        return f"{self.prefix}:seq:{{{_encoded(user_id)}}}"

    def recommendation(self, user_id: str) -> str:
        """Return the key of a user's published list, STRING: JSON (serving/publisher.py)."""
        return f"{self.prefix}:recs:{{{_encoded(user_id)}}}"

    def exclusions(self, user_id: str) -> str:
        """Return the key of the items that a user's lists may not contain, ZSET by time (serving/append.lua)."""
        return f"{self.prefix}:excl:{{{_encoded(user_id)}}}"

    @property
    def popular(self) -> str:
        """Key of the popular list, STRING: JSON like a user's list."""
        return f"{self.prefix}:recs:popular"

    @property
    def popularity(self) -> str:
        """Key of the time-decayed click counts, ZSET (serving/lists.py)."""
        return f"{self.prefix}:popularity"

    @property
    def blocklist(self) -> str:
        """Key of the items that no list may contain, SET; operators write it."""
        return f"{self.prefix}:blocklist"

    @property
    def sweep_lock(self) -> str:
        """Key of the lock of the daemon that sweeps published lists, STRING with a TTL."""
        return f"{self.prefix}:sweep:lock"

    @property
    def swept(self) -> str:
        """Key of the last sweeps, HASH with a TTL (items/swept.lua)."""
        return f"{self.prefix}:sweep:swept"

    def online(self, version: str) -> str:
        """Return the key of the online figures of a model version, HASH (serving/online.py)."""
        return f"{self.prefix}:online:{version}"

    @property
    def format(self) -> str:
        """Key of the format version of all data under the prefix, STRING (formats.py)."""
        return f"{self.prefix}:format"

    def topic_mark(self, partition: int) -> str:
        """Return the key of the last record that was read of a partition, STRING (serving/topic_marks.py)."""
        return f"{self.prefix}:topic:{partition}"

    @property
    def models_channel(self) -> str:
        """Pub/sub channel: a message when champion or shadow may have changed."""
        return f"{self.prefix}:models"

    @property
    def training(self) -> str:
        """Key of the training lock, STRING with a TTL."""
        return f"{self.prefix}:training"

    def probe(self, number: int) -> str:
        """Return the key of a write that shows whether a primary takes writes, STRING with a TTL; one a primary."""
        return f"{self.prefix}:probe:{number}"

    def user_of(self, key: str) -> str | None:
        """Return the user of a sequence or recommendation key; None for a key of no user."""
        found = USER_KEY.fullmatch(key.removeprefix(self.prefix))
        if found is None or not key.startswith(self.prefix):
            return None
        return re.sub("%25|%7D", lambda code: DECODED[code[0]], found[1])


def _encoded(user_id: str) -> str:
    return re.sub("[%}]", lambda character: ENCODED[character[0]], user_id)
