"""The cost of a click in the engine, cached and re-encoded, and the memory of a cached user."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sasrec import Engine, ItemVocab, SASRec, SASRecConfig
from sasrec.inference.kv_cache import KVCache

K = 10
BATCHES = (1, 16, 64, 256)
TOKENS_PER_CALL = 1_024  # of PyTorch's modules: their activations fit into the processor's cache
NUM_LENGTHS = 5  # window lengths that are re-encoded, evenly spaced from the shortest to the longest
SHAPES = tuple(
    SASRecConfig(3_416, max_len, hidden, blocks)
    for hidden, blocks, max_len in ((64, 2, 50), (64, 2, 200), (128, 3, 200))
)
CACHED_BYTES = 2 * 2**30


class Subject(NamedTuple):
    """A model to measure, and its vocabulary."""

    model: SASRec
    vocab: ItemVocab


def random_model(config: SASRecConfig) -> Subject:
    """Return a model with random weights, which cost the same as trained ones."""
    torch.manual_seed(0)
    return Subject(SASRec(config).eval(), ItemVocab(map(str, range(config.num_items))))


def measure_engine(
    subjects: Iterable[Subject],
    batches: Sequence[int] = BATCHES,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Measure a click and its list of ten items, computed in four ways with the same result.

    Users have full windows at different places between two jumps, and click in turn, so that ``cached_us`` has its
    share of windows that jumped and were encoded whole. The other ways encode windows of the same lengths; the
    windows of a batch are equally long, so that nothing is padded.

    Returns:
        A row for each model and batch size: ``hidden``, ``blocks``, ``heads``, ``max_len``, ``items``, ``batch``.
        Microseconds per click on one thread, medians of the repeats, which alternate between the ways:
        ``cached_us``: the engine with a cache. ``torch_us``: PyTorch's modules, in the last block only the newest
        token. ``reencode_us``: that, or the engine without a cache if it is faster. ``full_us``: PyTorch's modules
        over all positions. ``ratio``: ``reencode_us`` / ``cached_us``. ``spread``: (max - min) / median, the
        largest of all ways.
    """
    rows = []
    with one_thread():
        for subject in subjects:
            for batch in batches:
                config = subject.model.config
                progress(
                    f"engine: {config.hidden_units} dimensions, {config.num_blocks} blocks, "
                    f"max_len {config.max_len}, batches of {batch}"
                )
                rows.append(_measure(subject, batch, repeats))
    return rows


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, the default of the daemon."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure(subject: Subject, batch: int, repeats: int) -> dict[str, float]:
    config = subject.model.config
    users = ClickingUsers(subject, batch)
    times = [
        (users.cached_us(), *(users.encoded_us(encode) for encode in (users.packed, users.newest, users.full)))
        for _ in range(repeats)
    ]
    cached, packed, newest, full = np.median(times, axis=0).tolist()
    reencoded = min(packed, newest)
    return {
        "hidden": config.hidden_units,
        "blocks": config.num_blocks,
        "heads": config.num_heads,
        "max_len": config.max_len,
        "items": config.num_items,
        "batch": batch,
        "cached_us": cached,
        "reencode_us": reencoded,
        "torch_us": newest,
        "full_us": full,
        "ratio": reencoded / cached,
        "spread": float((np.ptp(times, axis=0) / np.median(times, axis=0)).max()),
    }


class ClickingUsers:
    """Users with full windows, who click in turn, a batch at a time."""

    def __init__(self, subject: Subject, batch: int) -> None:
        self.model, self.batch = subject.model, batch
        self.engine = Engine(subject.model, subject.vocab, cache_bytes=CACHED_BYTES)
        self.max_len, self.slack = self.engine.max_len, self.engine.slack
        users = min(max(2 * batch, 64) // batch * batch, max(batch, self.engine.slots))
        self.random = np.random.default_rng(0)
        # users are at different places between two jumps
        self.counts = self.max_len + self.random.integers(self.slack, size=users)
        self.items = np.tile(self.random.integers(1, len(subject.vocab) + 1, (users, 2 * self.max_len)), 2)
        for group in self._groups():
            self.engine.encode([self._window(user) for user in group], group)

    def _groups(self) -> list[list[int]]:
        users = list(range(len(self.counts)))
        return [users[i : i + self.batch] for i in range(0, len(users), self.batch)]

    def _window(self, user: int) -> NDArray[np.int64]:
        """Return the window of a user, whose items repeat without an end."""
        n, items = int(self.counts[user]), self.items[user]
        first = (n - self.max_len) % (len(items) // 2)
        return self.engine.window(items[first : first + self.max_len], n)

    def cached_us(self) -> float:
        """Measure the engine with a cache, from jump to jump: the window of every user jumps once."""
        elapsed, clicks = 0.0, 0
        for _ in range(self.slack):
            for group in self._groups():
                self.counts[group] += 1
                windows = [self._window(user) for user in group]
                started = time.perf_counter()
                self.engine.top_k(self.engine.encode(windows, group), K, windows=windows)
                elapsed += time.perf_counter() - started
                clicks += len(group)
        return elapsed / clicks * 1e6

    def encoded_us(self, encode: Callable[[NDArray[np.int64]], Tensor]) -> float:
        """Measure a way to encode windows, over the lengths between two jumps."""
        lengths = np.linspace(self.max_len - self.slack + 1, self.max_len, NUM_LENGTHS).round().astype(int)
        found = []
        for length in lengths.tolist():
            windows = self.items[: self.batch, :length]
            started = time.perf_counter()
            self.engine.top_k(encode(windows), K, windows=list(windows))
            found.append((time.perf_counter() - started) / self.batch * 1e6)
        return float(np.mean(found))

    def packed(self, windows: NDArray[np.int64]) -> Tensor:
        """Return the hidden states (B, D) of windows (B, T), encoded by the engine without a cache."""
        return self.engine.encode(list(windows))

    @torch.inference_mode()
    def newest(self, windows: NDArray[np.int64]) -> Tensor:
        """Encode with PyTorch's modules, in the last block only the newest token."""
        last = torch.full((len(windows),), windows.shape[1] - 1)
        return torch.cat([self.model(part, last[: len(part)]) for part in _parts(windows)])

    @torch.inference_mode()
    def full(self, windows: NDArray[np.int64]) -> Tensor:
        """Encode all positions with PyTorch's modules."""
        return torch.cat([self.model(part)[:, -1] for part in _parts(windows)])


def _parts(windows: NDArray[np.int64]) -> Sequence[Tensor]:
    """Split windows (B, T) into parts of at most TOKENS_PER_CALL tokens."""
    return torch.split(torch.from_numpy(windows), max(1, TOKENS_PER_CALL // windows.shape[1]))


def measure_half_cache(subject: Subject, users: int) -> dict[str, float]:
    """Measure the memory of a cached user in both precisions, and the effect of float16 on lists of ten items.

    Returns:
        ``float32_bytes`` and ``float16_bytes`` per user; ``same_top_10``, the share of items that are in both lists.
    """
    config, weight = subject.model.config, subject.model.item_embedding.weight
    sizes = {half: KVCache.bytes_per_slot(config, weight, half) for half in (False, True)}
    random = np.random.default_rng(0)
    sequences = random.integers(1, config.num_items + 1, (users, config.max_len)).tolist()
    lists = []
    for half, size in sizes.items():
        engine = Engine(subject.model, subject.vocab, cache_bytes=users * size, half_cache=half)
        engine.encode([sequence[:-1] for sequence in sequences], range(users))
        hidden = engine.encode(sequences, range(users))  # one token after the cached ones
        lists.append(engine.top_k(hidden, K, windows=sequences))
    same = sum(len(set(a.items) & set(b.items)) for a, b in zip(*lists, strict=True))
    return {
        "hidden": config.hidden_units,
        "blocks": config.num_blocks,
        "max_len": config.max_len,
        "float32_bytes": sizes[False],
        "float16_bytes": sizes[True],
        "same_top_10": same / sum(len(ranking.items) for ranking in lists[0]),
    }
