"""Which items may be among the best of a large catalogue: a quick look, for exact scores to choose from.

Every item is kept as 4 bits a dimension (product quantization with a sub-quantizer for each dimension: Jégou et
al., TPAMI 2011), from WIDE_UNITS dimensions on as 4 bits for two, compared with table look-ups in registers (André et
al., "Quicker ADC", TPAMI 2019). No item is skipped, so what is found depends on no clusters. Graphs and inverted
lists miss the rare items, which have large norms and stand alone, and the former take minutes to build.
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

# Exact time by approximate, measured with streamrec/bench_catalogue.py, 64 and 128 dimensions, batches of 1 and 64:
# 0.2 to 0.3 at 10,000 items, 0.4 to 1.0 at 30,000, 1.0 to 1.8 at 100,000, where exact scores come from the kernel; of
# 64 at a million 3.2 and, without it, 6.6. (It takes the smaller catalogues: engine.PACKED_ITEMS.)
AUTO_ITEMS = 100_000
# Candidates for k places: of a million items at least .999 of the ten best are among so many, .98 of the ten behind
# fifty that a user has seen. From WIDE_UNITS dimensions on half the bits do, with four times as many, in less time.
CANDIDATES, CANDIDATES_PER_PLACE = 200, 6
WIDE_UNITS, MORE_CANDIDATES = 128, 4
# Two times four, as the library writes it: a third less time than what it chooses for eight users and more.
QUERIES_AT_ONCE = 0x44
# Below, a search would return most of the items.
LEAST_ITEMS = 1_000
ADD_ROWS = 65_536
MISSING = "faiss, which is not installed: pip install 'streamrec[index]'"


def open_index(embedding: Tensor, choice: IndexChoice) -> ItemIndex | None:
    """An index of the items where it is wanted and pays, else None.

    Args:
        embedding: (num_items + 1, D), row 0 padding.
        choice: "auto" takes one from AUTO_ITEMS on a processor, "approximate" from LEAST_ITEMS, "exact" none.

    Raises:
        ValueError: the choice is none of these.
        ImportError: "approximate" is asked for, and faiss is not installed.
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
    """The items of an embedding, searched by inner product with as many threads as torch has in the calling thread.

    Args:
        embedding: (num_items + 1, D), row 0 padding, which is never found; at least 16 items. It is not kept.

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
        # rotated at random, so that no dimension holds more than its share of 4 bits can tell
        library: Any = faiss  # whose types know less than it does
        self._index = library.index_factory(width, f"RR{width},PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
        library.downcast_index(self._index.index).qbs = QUERIES_AT_ONCE
        self._index.train(vectors)
        for start in range(0, len(vectors), ADD_ROWS):
            self._index.add(vectors[start : start + ADD_ROWS])

    @property
    def nbytes(self) -> int:
        """Memory that the index takes, in bytes."""
        return int(self._faiss.serialize_index(self._index).nbytes)

    def candidates(self, k: int) -> int:
        """How many items to search for so that the k best are among them."""
        return (CANDIDATES + CANDIDATES_PER_PLACE * k) * (MORE_CANDIDATES if self._wide else 1)

    def search(self, hidden: Tensor, count: int) -> Tensor:
        """The items whose inner products with ``hidden`` (B, D) are about the largest, best first.

        Returns:
            (B, count) indices on the device of ``hidden``, none twice in a row; 0 where no more were found.
        """
        self._faiss.omp_set_num_threads(torch.get_num_threads())  # it holds for the calling thread alone
        _, found = self._index.search(_finite(hidden), count)  # counted from 0; -1 where no more were found
        return torch.from_numpy(found + 1).to(hidden.device)


def _finite(vectors: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """As the library takes them: float32, in one piece, 0 for what is not finite."""
    return np.ascontiguousarray(vectors.float().nan_to_num(0.0, 0.0, 0.0).cpu().numpy())


@functools.cache
def _warn_once() -> None:
    log.warning(
        'top-k lists stay exact, which is slow from %d items on: the index that "auto" takes there needs %s',
        AUTO_ITEMS,
        MISSING,
    )
