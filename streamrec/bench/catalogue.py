"""How long a list takes, and how good it is, as the catalogue grows: exact and approximate, one after the other.

The items are synthetic, shaped like those of a model with 128 units that was trained on the sessions of a real
shop with 27,636 items, where was measured:

    cosine of an item and its 1st, 2nd, 5th, 10th, 20th, 50th, 100th neighbour   .82 .75 .67 .62 .57 .51 .46
    the same of the state of a user and his best items                          .78 .73 .68 .63 .56 .47 .38
    norm of an item: least, 10th, 50th, 90th percentile, most                   .56 .68 .79 .94 1.31
    norm of a state 24.3, hardly varying; every dimension varies alike; rare items are longer and more alone

A cosine that falls by about .1 as the neighbourhood trebles is a tree with three branches at each fork.
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
SHARED_BY_ALL = 0.15  # variance, of 1 in all but an item's own
SHARED_AT_A_FORK = 0.1
RARE_SHARE = 0.4  # of the items
OWN, OWN_OF_RARE = 0.12, 0.6  # share of an item's variance that it shares with none
NORM, NORM_OF_RARE = 0.76, 0.95
STATE_NORM = 24.3
RECALL_USERS = 512
SEEN = 20  # items of the user that are left out of his list


def synthetic_catalogue(items: int, hidden: int, users: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Item embeddings (items + 1, hidden), row 0 padding, and states of users (users, hidden), float32."""
    random = np.random.default_rng(seed)
    count = items + users
    leaf = np.concatenate([random.permutation(items), random.integers(items, size=users)])
    rare = np.arange(count) < RARE_SHARE * items  # leaves are random: any will do
    own = np.where(rare, OWN_OF_RARE, OWN) * np.exp(0.3 * random.standard_normal(count))
    own[items:] = OWN
    own = own.clip(max=0.8)[:, None]  # (count, 1)
    vectors = np.sqrt(1 - own) * _shared(leaf, items, hidden, random)
    vectors += np.sqrt(own / hidden) * random.standard_normal((count, hidden), dtype=np.float32)
    # coarse forks use few directions, but none of them is an axis
    vectors @= np.linalg.qr(random.standard_normal((hidden, hidden)))[0]
    norms = np.where(rare, NORM_OF_RARE, NORM) * np.exp(0.07 * random.standard_normal(count))
    norms[items:] = STATE_NORM
    vectors *= (norms / np.linalg.norm(vectors, axis=1))[:, None]
    padding = torch.zeros(1, hidden)
    found = torch.from_numpy(vectors.astype(np.float32))
    return torch.cat([padding, found[:items]]), found[items:]


def _shared(leaf: NDArray[np.int64], items: int, hidden: int, random: np.random.Generator) -> NDArray[np.float32]:
    """What the leaves have of their forks, fine ones first, (len(leaf), hidden)."""
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
    """Lists of synthetic users, in batches as the daemon has them, exact and approximate in turn.

    With as many threads as torch has, for both.

    Returns:
        A row for each size and width: ``items``, ``hidden``, ``batch``; ``exact_us`` and ``approx_us``, medians of
        microseconds a list; ``recall_at_10``, the share of the k best that the approximate lists hold (whatever k);
        ``build_s`` and ``index_bytes``, of the index; ``spread``, the larger of both interquartile ranges by the
        median.

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
    random = np.random.default_rng(1)
    seen = random.integers(1, len(vocab) + 1, (len(states), SEEN)).tolist()
    hits = 0
    for start in range(0, len(states), batch):
        part, seen_of_part = states[start : start + batch], seen[start : start + batch]
        right, ours = (engine.top_k(part, k, seen_of_part) for engine in (exact, approximate))
        hits += sum(len(set(a.items) & set(b.items)) for a, b in zip(right, ours, strict=True))
    times: list[list[float]] = [[], []]
    for n in range(repeats):
        start = n * batch % (len(states) - batch + 1)
        part, seen_of_part = states[start : start + batch], seen[start : start + batch]
        for engine, of_engine in zip((exact, approximate), times, strict=True):
            started = time.perf_counter()
            engine.top_k(part, k, seen_of_part)
            of_engine.append((time.perf_counter() - started) / batch * 1e6)
    quartiles = np.percentile(times, (25, 50, 75), axis=1)  # (3, 2)
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
