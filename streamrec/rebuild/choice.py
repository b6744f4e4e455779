"""Choose the sequence of one user: the stored one, or one rebuilt from past clicks."""

from __future__ import annotations

import dataclasses

from streamrec.errors import StreamrecError
from streamrec.serving.sequences import StoredSequence


def includes(user: str, rebuilt: StoredSequence, stored: StoredSequence) -> bool:
    """Return whether the rebuilt sequence was made from every click that the stored one was made from.

    Raises:
        StreamrecError: the stored sequence has a later topic epoch than the configured one.
    """
    if stored.topic_epoch > rebuilt.topic_epoch:
        raise StreamrecError(
            f"the stored sequence of user {user!r} has topic epoch {stored.topic_epoch}, but kafka_topic_epoch is "
            f"{rebuilt.topic_epoch}: set STREAMREC_KAFKA_TOPIC_EPOCH to the value that the daemons use"
        )
    if stored.topic_epoch < rebuilt.topic_epoch:  # its offsets are of another topic
        return True
    return all(rebuilt.offsets.get(partition, -1) >= offset for partition, offset in stored.offsets.items())


def replacement(stored: StoredSequence | None, rebuilt: StoredSequence) -> StoredSequence | None:
    """Return the sequence to store in the place of one that ``rebuilt`` includes; None if ``stored`` is as complete."""
    if stored is None or rebuilt.n > stored.n:
        return rebuilt
    if len(rebuilt.items) <= len(stored.items):
        return None
    # the stored sequence counts as many clicks but has fewer items: max_len was raised
    if rebuilt.n == stored.n:
        return rebuilt
    return dataclasses.replace(rebuilt, n=stored.n, session_n=max(stored.session_n, rebuilt.session_n))
