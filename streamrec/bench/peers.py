"""`sasrec` against scikit-rec, whose API it follows: same data, model shape, loss and batch size, in turn."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

import sasrec
from sasrec import DataFileError, Interactions, read_events
from streamrec.errors import StreamrecError

Times = list[list[float]]
MISSING = "scikit-rec, which is not installed: pip install 'streamrec[bench]'"
MAX_LEN, K = 50, 10
SHAPE: dict[str, Any] = {
    "hidden_units": 50,
    "num_blocks": 2,
    "num_heads": 1,
    "dropout_rate": 0.2,
    "num_negatives": 1,
    "max_len": MAX_LEN,
    "learning_rate": 0.001,
    "batch_size": 128,
    "early_stopping_patience": None,
    "random_state": 42,
    "device": "cpu",
}
MIN_RATING = 4.0
USERS = (1, 64, 1_024)
USERS_PER_TIMING = 64  # with fewer users per call, each repeat makes several calls
EPOCHS = 3  # after the first epoch, whose time includes reading the data


def measure_peers(
    ratings: Path, repeats: int = 5, users: Sequence[int] = USERS, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Train on ratings of at least 4, then recommend to users from their histories, with each library in turn.

    Both use binary cross-entropy with one negative per position, learned positions, batches of 128, a user's newest
    51 events, and torch's current number of threads; neither leaves out seen items.

    Args:
        ratings: file of events with ratings, for example MovieLens.
        repeats: the results are medians of this number of repeats.
        users: numbers of users per call of recommend.

    Returns:
        ``training``: ``events``: targets per epoch; ``epoch_s``, ``events_per_s``, ``peer_epoch_s``,
        ``peer_events_per_s``, ``ratio``, ``spread``. An epoch is the difference of two fits, so that it does not
        include reading the data. ``recommend``: a row for each number of ``users``: ``ms``, ``peer_ms``, ``ratio``,
        ``spread``. The spread is (max - min) / median, the larger of both libraries.

    Raises:
        StreamrecError: scikit-rec is not installed, or no user has two ratings.
    """
    libraries = _ours(), _scikit_rec()
    logging.getLogger("sasrec").setLevel(logging.WARNING)
    clicks = _read(ratings)
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
        trained, epochs_s = _train(libraries, _write(Path(folder), clicks), repeats, progress)
    newest = clicks.to_pandas().groupby("USER_ID", sort=False).tail(MAX_LEN)  # scikit-rec accepts only pandas
    in_order = newest.USER_ID.unique()
    rows = []
    for count in users:
        progress(f"recommending to {count:,} users")
        histories = newest[newest.USER_ID.isin(in_order[:count])]
        times_ms = _recommend(libraries, trained, histories, repeats, max(1, USERS_PER_TIMING // count // repeats))
        ms, peer_ms = map(float, np.median(times_ms, axis=1))
        row = {"users": min(count, len(in_order)), "ms": ms, "peer_ms": peer_ms}
        rows.append(row | {"ratio": peer_ms / ms, "spread": _spread(times_ms)})
    return {"training": _training(clicks, epochs_s), "recommend": rows}


def _training(clicks: pa.Table, epochs_s: Times) -> dict[str, float]:
    events = sum(min(MAX_LEN, count - 1) for count in Counter(clicks["USER_ID"].to_pylist()).values())
    ours_s, peer_s = map(float, np.median(epochs_s, axis=1))
    return {
        "events": events,
        "epoch_s": ours_s,
        "events_per_s": events / ours_s,
        "peer_epoch_s": peer_s,
        "peer_events_per_s": events / peer_s,
        "ratio": peer_s / ours_s,
        "spread": _spread(epochs_s),
    }


def check_peers() -> None:
    """Raise StreamrecError if scikit-rec is not installed."""
    if find_spec("skrec") is None:
        raise StreamrecError(f"the peers part needs {MISSING}")


def _ours() -> SimpleNamespace:
    return SimpleNamespace(
        name="sasrec",
        estimator=lambda epochs: sasrec.SASRecClassifierEstimator(**SHAPE, epochs=epochs, windows="newest"),
        scorer=sasrec.SequentialScorer,
        recommender=sasrec.SequentialRecommender,
        interactions=sasrec.InteractionsDataset,
        items=sasrec.ItemsDataset,
        options={"filter_seen": False},
    )


def _scikit_rec() -> SimpleNamespace:
    check_peers()
    from skrec.dataset.interactions_dataset import InteractionsDataset
    from skrec.dataset.items_dataset import ItemsDataset
    from skrec.estimator.sequential.sasrec_estimator import SASRecClassifierEstimator
    from skrec.recommender.sequential.sequential_recommender import SequentialRecommender
    from skrec.scorer.sequential import SequentialScorer

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("skrec"):  # each logger has its own level, and logs every call
            logging.getLogger(name).setLevel(logging.WARNING)
    return SimpleNamespace(
        name="scikit-rec",
        estimator=lambda epochs: SASRecClassifierEstimator(**SHAPE, epochs=epochs),
        scorer=SequentialScorer,
        recommender=SequentialRecommender,
        interactions=InteractionsDataset,
        items=ItemsDataset,
        options={},
    )


def _read(ratings: Path) -> pa.Table:
    try:
        clicks = Interactions.from_events(read_events(ratings, outcomes=True))
    except DataFileError as error:
        raise StreamrecError(str(error)) from None
    if clicks.outcomes is not None:
        clicks = clicks.at_least_outcome(MIN_RATING)
    if len(clicks) == len(set(clicks.user_ids)):
        raise StreamrecError(f"{ratings} has no user with two ratings of at least {MIN_RATING:.0f}")
    return pa.table({"USER_ID": clicks.user_ids, "ITEM_ID": clicks.item_ids, "TIMESTAMP": clicks.timestamps_ms})


def _write(folder: Path, clicks: pa.Table) -> tuple[str, str]:
    """Write events and items as both libraries read them; return the paths."""
    paths = str(folder / "interactions.csv"), str(folder / "items.csv")
    pa.csv.write_csv(clicks.append_column("OUTCOME", pa.array([1.0] * len(clicks))), paths[0])
    pa.csv.write_csv(pa.table({"ITEM_ID": clicks["ITEM_ID"].unique()}), paths[1])
    return paths


def _train(
    libraries: Sequence[SimpleNamespace], files: tuple[str, str], repeats: int, progress: Callable[[str], None]
) -> tuple[list[Any], Times]:
    """Return the last trained recommender of each library, and seconds per epoch, (libraries, repeats)."""
    trained: list[Any] = [None] * len(libraries)
    epochs_s: Times = [[] for _ in libraries]
    for turn in range(repeats):
        for place, library in enumerate(libraries):
            progress(f"training: {library.name}, {turn + 1} of {repeats}")
            short_s, _ = _fit(library, files, 1)
            long_s, trained[place] = _fit(library, files, 1 + EPOCHS)
            epochs_s[place].append((long_s - short_s) / EPOCHS)
    return trained, epochs_s


def _fit(library: SimpleNamespace, files: tuple[str, str], epochs: int) -> tuple[float, Any]:
    recommender = library.recommender(library.scorer(library.estimator(epochs)), max_len=MAX_LEN)
    interactions, items = library.interactions(files[0]), library.items(files[1])
    started = time.perf_counter()
    recommender.train(items_ds=items, interactions_ds=interactions)
    return time.perf_counter() - started, recommender


def _recommend(
    libraries: Sequence[SimpleNamespace], trained: Sequence[Any], histories: Any, turns: int, calls: int
) -> Times:
    """Return milliseconds per call, (libraries, turns * calls); a library makes several calls in a turn, as in use."""
    times_ms: Times = [[] for _ in libraries]
    for _ in range(turns):
        for place, library in enumerate(libraries):
            for call in range(1 + calls):
                started = time.perf_counter()
                trained[place].recommend(interactions=histories, top_k=K, **library.options)
                if call:  # during the first, the other library's data are in the processor's cache
                    times_ms[place].append((time.perf_counter() - started) * 1e3)
    return times_ms


def _spread(times: Times) -> float:
    return float((np.ptp(times, axis=1) / np.median(times, axis=1)).max())
