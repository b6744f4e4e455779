"""Held-out targets from a separate validation set."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress

import numpy as np

from sasrec.data.datasets import InteractionRows
from sasrec.data.sequences import Holdout, Indices, Interactions, Sequences
from sasrec.data.vocab import ItemVocab


def new_events_holdout(rows: InteractionRows, valid: InteractionRows, vocab: ItemVocab) -> Holdout:
    """Make each new event of the validation rows a target, after all earlier events of its user.

    Rows of ``valid`` that are also in ``rows`` are history only, and so are rows with an outcome of 0.

    Raises:
        ValueError: no row of ``valid`` can be a target.
    """
    known = set(_keys(rows))
    new = [key not in known for key in _keys(valid)]
    positive = np.ones(len(new), bool) if valid.outcomes is None else valid.outcomes > 0
    both = Interactions(
        rows.user_ids + list(compress(valid.user_ids, new)),
        rows.item_ids + list(compress(valid.item_ids, new)),
        np.concatenate((_times(rows), _times(valid)[new])),
        np.concatenate((np.zeros(len(rows.item_ids), np.float32), positive[new].astype(np.float32))),
    )
    sequences = Sequences.build(both.in_order(), vocab)  # its outcomes mark the targets
    assert sequences.outcomes is not None
    holdout = sequences.each_after_the_first(sequences.outcomes > 0)
    if not len(holdout):
        raise ValueError(
            "valid_interactions holds no event that is new, on an item of the training data, and of a user with an "
            "earlier event: there is nothing to validate on"
        )
    return holdout


def _keys(rows: InteractionRows) -> Iterator[tuple[str, str, int]]:
    return zip(rows.user_ids, rows.item_ids, _times(rows).tolist(), strict=True)


def _times(rows: InteractionRows) -> Indices:
    assert rows.timestamps is not None  # read_interactions refuses data without them
    return rows.timestamps
