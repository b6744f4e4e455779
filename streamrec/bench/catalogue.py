"""Time and recall of lists from growing catalogues, exact and approximate.

The items are synthetic. Their distribution follows a model with 128 hidden units that was trained on the sessions of
a real shop with 27,636 items, where these values were measured:

    cosine of an item and its 1st, 2nd, 5th, 10th, 20th, 50th, 100th neighbour   .82 .75 .67 .62 .57 .51 .46
    cosine of a user's state and the items with these ranks                     .78 .73 .68 .63 .56 .47 .38
    norm of an item: minimum, 10th, 50th, 90th percentile, maximum              .56 .68 .79 .94 1.31
    norm of a state: 24.3, nearly constant

All dimensions have the same variance; rare items have larger norms and more distant neighbours. A cosine that falls
by about .1 when the neighbourhood triples is a tree with three branches at each fork.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec import Engine, ItemVocab, SASRec, SASRecConfig

BRANCHES = 3
SHARED_BY_ALL = 0.15  # shares of the variance that an item shares with others
SHARED_AT_A_FORK = 0.1
RARE_SHARE = 0.4  # of the items
OWN, OWN_OF_RARE = 0.12, 0.6  # share of the variance that is an item's own
NORM, NORM_OF_RARE = 0.76, 0.95
STATE_NORM = 24.3
RECALL_USERS = 512
SEEN = 20  # items of the user that are left out of the list


def synthetic_catalogue(items: int, hidden: int, users: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return item embeddings (items + 1, hidden), row 0 padding, and user states (users, hidden), float32."""
    random = np.random.default_rng(seed)
    count = items + users
    leaf = np.concatenate([random.permutation(items), random.integers(items, size=users)])
    rare = np.arange(count) < RARE_SHARE * items  # the leaves are random, so the first ones are as good as any
    own = np.where(rare, OWN_OF_RARE, OWN) * np.exp(0.3 * random.standard_normal(count))
    own[items:] = OWN
    own = own.clip(max=0.8)[:, None]  # (count, 1)
    vectors = np.sqrt(1 - own) * _shared(leaf, items, hidden, random)
    vectors += np.sqrt(own / hidden) * random.standard_normal((count, hidden), dtype=np.float32)
    # coarse forks use few directions: rotate them away from the axes
    vectors @= np.linalg.qr(random.standard_normal((hidden, hidden)))[0]
    norms = np.where(rare, NORM_OF_RARE, NORM) * np.exp(0.07 * random.standard_normal(count))
    norms[items:] = STATE_NORM
    vectors *= (norms / np.linalg.norm(vectors, axis=1))[:, None]
    padding = torch.zeros(1, hidden)
    found = torch.from_numpy(vectors.astype(np.float32))
    return torch.cat([padding, found[:items]]), found[items:]


def _shared(leaf: NDArray[np.int64], items: int, hidden: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Return the part of the leaves that comes from their forks, fine forks first, (len(leaf), hidden)."""
    forks = min(math.ceil(math.log(items, BRANCHES)), round((1 - SHARED_BY_ALL) / SHARED_AT_A_FORK))
    vectors = np.zeros((len(leaf), hidden), np.float32)
    left = 1 - SHARED_BY_ALL
    for level in range(1, forks + 1):
        variance = SHARED_AT_A_FORK if level < forks else left
        left -= variance
        spectrum = (1 + 8 * np.arange(hidden) / hidden) ** (-2.0 * level / forks)
        spectrum *= math.sqrt(variance) / np.linalg.norm(spectrum)
        nodes = random.standard_normal((-(-items // BRANCHES**level), hidden), dtype=np.float32)
        vectors += (nodes * spectrum.astype(np.float32))[leaf // BRANCHES**level]
    return vectors + math.sqrt(SHARED_BY_ALL / hidden) * random.standard_normal((1, hidden), dtype=np.float32)


def measure_catalogue(
    sizes: Sequence[int] = (3_416, 100_000, 1_000_000),
    hidden: Sequence[int] = (64, 128),
    batch: int = 64,
    k: int = 10,
    repeats: int = 7,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Measure lists of synthetic users in batches of the daemon's size, exact and approximate in turn.

    Both use torch's current number of threads.

    Returns:
        A row for each size and width: ``items``, ``hidden``, ``batch``; ``exact_us`` and ``approx_us``: median
        microseconds per list; ``recall_at_10``: share of the exact k items that are in the approximate lists;
        ``build_s`` and ``index_bytes``: the index; ``spread``: interquartile range / median, the larger of both.

    Raises:
        ImportError: faiss is not installed.
    """
    rows = []
    for items in sizes:
        vocab = ItemVocab(map(str, range(items)))
        for width in hidden:
            progress(f"{items:,} items, {width} dimensions")
            rows.append(_measure(vocab, width, batch, k, repeats))
    return rows


def _measure(vocab: ItemVocab, hidden: int, batch: int, k: int, repeats: int) -> dict[str, float]:
    embedding, states = synthetic_catalogue(len(vocab), hidden, users=max(RECALL_USERS, batch))
    model = SASRec(SASRecConfig(len(vocab), hidden_units=hidden))
    model.item_embedding.weight = torch.nn.Parameter(embedding, requires_grad=False)
    exact = Engine(model, vocab, cache_bytes=0, index="exact")
    started = time.perf_counter()
    approximate = Engine(model, vocab, cache_bytes=0, index="approximate")
    build_s = time.perf_counter() - started
    assert approximate.index is not None, f"{len(vocab)} items need no index"
    seen = np.random.default_rng(1).integers(1, len(vocab) + 1, (len(states), SEEN)).tolist()
    hits = 0
    for start in range(0, len(states), batch):
        part = states[start : start + batch], k, seen[start : start + batch]
        rankings = exact.top_k(*part), approximate.top_k(*part)
        hits += sum(len(set(a.items) & set(b.items)) for a, b in zip(*rankings, strict=True))
    times_us = _times_us((exact, approximate), states, seen, batch, k, repeats)
    quartiles = np.percentile(times_us, (25, 50, 75), axis=1)  # (3, 2)
    return {
        "items": len(vocab),
        "hidden": hidden,
        "batch": batch,
        "exact_us": float(quartiles[1, 0]),
        "approx_us": float(quartiles[1, 1]),
        "recall_at_10": hits / (len(states) * min(k, len(vocab))),
        "build_s": build_s,
        "index_bytes": approximate.index.nbytes,
        "spread": float(((quartiles[2] - quartiles[0]) / quartiles[1]).max()),
    }


def _times_us(
    engines: Sequence[Engine], states: Tensor, seen: list[list[int]], batch: int, k: int, repeats: int
) -> list[list[float]]:
    """Return microseconds per list, (engines, repeats); the engines take turns."""
    times_us: list[list[float]] = [[] for _ in engines]
    for n in range(repeats):
        start = n * batch % (len(states) - batch + 1)
        part = states[start : start + batch], k, seen[start : start + batch]
        for engine, of_engine in zip(engines, times_us, strict=True):
            started = time.perf_counter()
            engine.top_k(*part)
            of_engine.append((time.perf_counter() - started) / batch * 1e6)
    return times_us
