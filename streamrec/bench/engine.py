"""What a click costs: one cached token against re-encoding the window, and what a cached user takes."""

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
MODULE_TOKENS = 1_024  # that go through modules at once, so that they stay in the processor's cache
LENGTHS = 5  # of windows that are re-encoded, evenly from the shortest to the longest
SHAPES = tuple(
    SASRecConfig(3_416, max_len, hidden, blocks)
    for hidden, blocks, max_len in ((64, 2, 50), (64, 2, 200), (128, 3, 200))
)
CACHED_BYTES = 2 * 2**30


class Subject(NamedTuple):
    """A model to be measured."""

    model: SASRec
    vocab: ItemVocab


def random_model(config: SASRecConfig) -> Subject:
    """A model of this shape with random weights: they cost what trained ones cost."""
    torch.manual_seed(0)
    return Subject(SASRec(config).eval(), ItemVocab(map(str, range(config.num_items))))


def measure_engine(
    subjects: Iterable[Subject],
    batches: Sequence[int] = BATCHES,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Microseconds of one thread for a click and its list of the ten best, of three ways to the same answer.

    Users have full windows, each at another place between two jumps, and click in turn, so that ``cached_us`` holds
    its share of windows that jumped and were encoded whole. The others encode windows of the same lengths, all of a
    batch equally long so that nothing is padded, as many at once as is best: ``torch_us`` by PyTorch's modules, in the
    last block the newest token alone, ``reencode_us`` so or as the engine does it without a cache, what is faster,
    ``full_us`` by modules over all positions. The ways take turns; medians of the repeats.

    Returns:
        A row for each model and batch: ``hidden``, ``blocks``, ``heads``, ``max_len``, ``items``, ``batch``,
        ``cached_us``, ``reencode_us``, ``torch_us``, ``full_us``, ``ratio`` (``reencode_us`` by ``cached_us``) and
        ``spread``, the largest of the ways' (most - least) by median.
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
    """As many as the daemon has for its model by default."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure(subject: Subject, batch: int, repeats: int) -> dict[str, float]:
    config = subject.model.config
    clicks = _Clicks(subject, batch)
    times = [
        (clicks.cached_us(), *(clicks.encoded_us(encode) for encode in (clicks.packed, clicks.newest, clicks.full)))
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


class _Clicks:
    """Users who click in turn, a batch at a time, for ever."""

    def __init__(self, subject: Subject, batch: int) -> None:
        self.model, self.batch = subject.model, batch
        self.engine = Engine(subject.model, subject.vocab, cache_bytes=CACHED_BYTES)
        self.max_len, self.slack = self.engine.max_len, self.engine.slack
        users = min(max(2 * batch, 64) // batch * batch, max(batch, self.engine.slots))
        self.random = np.random.default_rng(0)
        # each user at another place between two jumps
        self.counts = self.max_len + self.random.integers(self.slack, size=users)
        self.items = np.tile(self.random.integers(1, len(subject.vocab) + 1, (users, 2 * self.max_len)), 2)
        for group in self._groups():
            self.engine.encode([self._window(user) for user in group], group)

    def _groups(self) -> list[list[int]]:
        users = list(range(len(self.counts)))
        return [users[i : i + self.batch] for i in range(0, len(users), self.batch)]

    def _window(self, user: int) -> NDArray[np.int64]:
        """The last items of an endless sequence that repeats itself."""
        n, items = int(self.counts[user]), self.items[user]
        first = (n - self.max_len) % (len(items) // 2)
        return self.engine.window(items[first : first + self.max_len], n)

    def cached_us(self) -> float:
        """From jump to jump, so that every user's window jumps once."""
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
        """The same windows' lengths, all that stand between two jumps equally often."""
        found = []
        for length in np.linspace(self.max_len - self.slack + 1, self.max_len, LENGTHS).round().astype(int).tolist():
            windows = self.items[: self.batch, :length]
            started = time.perf_counter()
            self.engine.top_k(encode(windows), K, windows=list(windows))
            found.append((time.perf_counter() - started) / self.batch * 1e6)
        return float(np.mean(found))

    def packed(self, windows: NDArray[np.int64]) -> Tensor:
        """Hidden states (B, D) of windows (B, T) as an engine without a cache encodes them."""
        return self.engine.encode(list(windows))

    @torch.inference_mode()
    def newest(self, windows: NDArray[np.int64]) -> Tensor:
        """By PyTorch's modules, of the last block each newest token alone."""
        last = torch.full((len(windows),), windows.shape[1] - 1)
        return torch.cat([self.model(part, last[: len(part)]) for part in _at_once(windows)])

    @torch.inference_mode()
    def full(self, windows: NDArray[np.int64]) -> Tensor:
        """By PyTorch's modules, of all positions."""
        return torch.cat([self.model(part)[:, -1] for part in _at_once(windows)])


def _at_once(windows: NDArray[np.int64]) -> Sequence[Tensor]:
    """Parts of MODULE_TOKENS."""
    return torch.split(torch.from_numpy(windows), max(1, MODULE_TOKENS // windows.shape[1]))


def measure_half_cache(subject: Subject, users: int) -> dict[str, float]:
    """What a cached user takes in either precision, and how much the lower one changes lists of the ten best.

    Returns:
        ``float32_bytes`` and ``float16_bytes`` a user, ``same_top_10``, the share of items that both lists hold.
    """
    config, weight = subject.model.config, subject.model.item_embedding.weight
    sizes = {half: KVCache.bytes_per_slot(config, weight, half) for half in (False, True)}
    random = np.random.default_rng(0)
    sequences = random.integers(1, config.num_items + 1, (users, config.max_len)).tolist()
    lists = []
    for half, size in sizes.items():
        engine = Engine(subject.model, subject.vocab, cache_bytes=users * size, half_cache=half)
        engine.encode([sequence[:-1] for sequence in sequences], range(users))
        hidden = engine.encode(sequences, range(users))  # one token after what was cached
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
