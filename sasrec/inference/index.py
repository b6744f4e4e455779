"""An approximate index: it names candidates for the best items of a large catalogue, which are then scored exactly.

Every item is stored with 4 bits a dimension (product quantization with a sub-quantizer for each dimension: Jégou et
al., TPAMI 2011), from WIDE_UNITS dimensions on with 4 bits for two, compared by table look-ups in registers (André et
al., "Quicker ADC", TPAMI 2019). No item is skipped, so results depend on no clusters. Graphs and inverted lists miss
rare items, which have large norms and few neighbours, and graphs take minutes to build.
"""

from __future__ import annotations

import functools
import logging
import time
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

IndexChoice = Literal["auto", "exact", "approximate"]

# From this number of items on the index is faster. Exact time / approximate time, 64 and 128 dimensions, batches of 1
# and 64 (streamrec/bench/catalogue.py), with exact scores from the kernel: 0.2 to 0.3 at 10,000 items, 0.4 to 1.0 at
# 30,000, 1.0 to 1.8 at 100,000, 3.2 for a batch of 64 at a million (6.6 without the kernel).
AUTO_ITEMS = 100_000
# Candidates for k places. In a million items they hold at least .999 of the ten best, and .98 of the ten best that
# follow fifty seen ones. From WIDE_UNITS dimensions on, half the bits with MORE_CANDIDATES times as many are faster.
CANDIDATES, CANDIDATES_PER_PLACE = 200, 6
WIDE_UNITS, MORE_CANDIDATES = 128, 4
# faiss's notation for blocks of 4 and 4 queries: a third less time than its own choice for eight users and more.
QUERIES_AT_ONCE = 0x44
# Of fewer items a search would return most.
LEAST_ITEMS = 1_000
ADD_ROWS = 65_536
MISSING = "faiss, which is not installed: pip install 'streamrec[index]'"


def open_index(embedding: Tensor, choice: IndexChoice) -> ItemIndex | None:
    """Build an index of the items if it is wanted and pays off, else return None.

    Args:
        embedding: (num_items + 1, D), row 0 padding.
        choice: "auto" takes one from AUTO_ITEMS on a processor, "approximate" from LEAST_ITEMS, "exact" none.

    Raises:
        ValueError: the choice is none of these.
        ImportError: the choice is "approximate", and faiss is not installed.
    """
    if choice not in ("auto", "exact", "approximate"):
        raise ValueError(f"index={choice!r}: must be 'auto', 'exact' or 'approximate'")
    items, automatic = len(embedding) - 1, choice == "auto"
    if choice == "exact" or (automatic and (items < AUTO_ITEMS or embedding.device.type != "cpu")):
        return None
    if find_spec("faiss") is None:
        if not automatic:
            raise ImportError(f"an approximate index needs {MISSING}")
        _warn_once()
        return None
    if items < LEAST_ITEMS:
        return None
    started = time.perf_counter()
    index = ItemIndex(embedding)
    log.info("index of %d items built in %.1f s", items, time.perf_counter() - started)
    return index


class ItemIndex:
    """The items of an embedding, searched by inner product with the calling thread's number of torch threads.

    Args:
        embedding: (num_items + 1, D), row 0 padding, which is never found; at least 16 items. It is not stored.

    Raises:
        ImportError: faiss is not installed.
    """

    def __init__(self, embedding: Tensor) -> None:
        import faiss

        self._faiss = faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        vectors = _finite(embedding.detach()[1:])  # (num_items, D)
        width = vectors.shape[1]
        self._wide = width >= WIDE_UNITS and width % 2 == 0
        parts = width // 2 if self._wide else width
        # RR: a random rotation, so that no dimension carries more than 4 bits can express
        library: Any = faiss  # its type hints lack index_factory's result
        self._index = library.index_factory(width, f"RR{width},PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
        library.downcast_index(self._index.index).qbs = QUERIES_AT_ONCE
        self._index.train(vectors)
        for start in range(0, len(vectors), ADD_ROWS):
            self._index.add(vectors[start : start + ADD_ROWS])

    @property
    def nbytes(self) -> int:
        """The memory that the index takes, in bytes."""
        return int(self._faiss.serialize_index(self._index).nbytes)

    def candidates(self, k: int) -> int:
        """Return the number of items to search for, so that the k best are among them."""
        return (CANDIDATES + CANDIDATES_PER_PLACE * k) * (MORE_CANDIDATES if self._wide else 1)

    def search(self, hidden: Tensor, count: int) -> Tensor:
        """Return the items with about the largest inner products with ``hidden`` (B, D), best first.

        Returns:
            (B, count) indices on the device of ``hidden``, none twice in a row; 0 where fewer items were found.
        """
        self._faiss.omp_set_num_threads(torch.get_num_threads())  # faiss stores it per thread
        _, found = self._index.search(_finite(hidden), count)  # counted from 0; -1 where fewer were found
        return torch.from_numpy(found + 1).to(hidden.device)


def _finite(vectors: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return vectors as faiss takes them: contiguous float32, 0 for NaN and infinity."""
    return np.ascontiguousarray(vectors.float().nan_to_num(0.0, 0.0, 0.0).cpu().numpy())


@functools.cache
def _warn_once() -> None:
    log.warning(
        'top-k lists are exact, which is slow from %d items on: the index that "auto" takes there needs %s',
        AUTO_ITEMS,
        MISSING,
    )
