"""Every Redis key name. The braces are literal: a hash tag keeps all keys of a user on one cluster node.

Keys without braces belong to no user, so no user id can collide with them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keys:
    """Key names under a prefix."""

    prefix: str = "streamrec"

    def sequence(self, user_id: str) -> str:
        """STRING: header, then the user's last items (sequences.py)."""
        return f"{self.prefix}:seq:{{{user_id}}}"

    def recommendation(self, user_id: str) -> str:
        """STRING: the published list, JSON (publisher.py)."""
        return f"{self.prefix}:recs:{{{user_id}}}"

    @property
    def popular(self) -> str:
        """STRING: the popular list, same JSON."""
        return f"{self.prefix}:recs:popular"

    @property
    def popularity(self) -> str:
        """ZSET: time-decayed click counts (lists.py)."""
        return f"{self.prefix}:popularity"

    @property
    def blocklist(self) -> str:
        """SET, kept by the operator: items never to be recommended."""
        return f"{self.prefix}:blocklist"

    def online(self, version: str) -> str:
        """HASH: how the clicks judged the lists of a model version (online.py)."""
        return f"{self.prefix}:online:{version}"

    @property
    def format(self) -> str:
        """STRING: the version of what is stored under the prefix (formats.py)."""
        return f"{self.prefix}:format"

    @property
    def models_channel(self) -> str:
        """Pub/sub channel: the champion, whenever it or its shadow may have changed."""
        return f"{self.prefix}:models"

    @property
    def training(self) -> str:
        """STRING with a TTL: who trains now."""
        return f"{self.prefix}:training"

    def user_of(self, key: str) -> str:
        """The user of a sequence or recommendation key."""
        return key[key.index("{") + 1 : -1]
