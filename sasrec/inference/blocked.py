"""The items of a catalogue that no list may contain, as a mask in which one item changes at a time."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from sasrec.data.vocab import PADDING


class BlockedItems:
    """Blocked indices of a vocabulary. A list of many items costs no more than a list of a few.

    Args:
        mask: (num_items + 1,), True for blocked items; it is not copied. Padding becomes blocked.
    """

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self.mask = mask
        self.mask[PADDING] = True
        self.count = int(mask.sum()) - 1  # without padding

    @classmethod
    def of(cls, blocked: Collection[int] | BlockedItems, num_items: int) -> BlockedItems:
        """Return a mask of these indices, 0 is ignored; a mask is returned as it is.

        Raises:
            IndexError: an index is too large.
        """
        if isinstance(blocked, BlockedItems):
            return blocked
        mask = np.zeros(num_items + 1, np.bool_)
        mask[list(blocked)] = True
        return cls(mask)

    def set(self, index: int, blocked: bool) -> None:
        """Block an item, or allow it again; padding remains blocked."""
        if index != PADDING:
            self.count += int(blocked) - int(self.mask[index])
            self.mask[index] = blocked
