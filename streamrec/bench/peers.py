"""`sasrec` beside scikit-rec, the library whose names it carries: same data, model shape, loss and batch, in turn."""

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
LEAST_RATING = 4.0
USERS = (1, 64, 1_024)
FEW = 64  # users that are too few for one call to be measured
EPOCHS = 3  # more than the first, which bears the reading of the data


def measure_peers(
    ratings: Path, repeats: int = 5, users: Sequence[int] = USERS, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Train on the ratings of at least 4, then recommend to users from given histories, with each library in turn.

    Both get binary cross-entropy with one negative a position, learned positions, batches of 128, a user's newest 51
    events; neither leaves out what was seen. As many threads as torch has.

    Args:
        ratings: file of events with ratings, such as MovieLens'.
        repeats: of which medians are taken.
        users: how many are recommended to at once.

    Returns:
        ``training``: ``events``, targets of an epoch, ``epoch_s``, ``events_per_s``, ``peer_epoch_s``,
        ``peer_events_per_s``, ``ratio``, ``spread``; an epoch is a difference of fits, so that the reading of data is
        no part of it. ``recommend``, a row for each number of ``users``: ``ms``, ``peer_ms``, ``ratio``, ``spread``.
        The spread is (most - least) by median, the larger of both.

    Raises:
        StreamrecError: scikit-rec is not installed, or the file has too little.
    """
    libraries = _ours(), _scikit_rec()
    logging.getLogger("sasrec").setLevel(logging.WARNING)
    clicks = _read(ratings)
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
        trained, epochs_s = _train(libraries, _write(Path(folder), clicks), repeats, progress)
    newest = clicks.to_pandas().groupby("USER_ID", sort=False).tail(MAX_LEN)  # scikit-rec takes no other frame
    in_order = newest.USER_ID.unique()
    rows = []
    for count in users:
        progress(f"recommending to {count:,} users")
        histories = newest[newest.USER_ID.isin(in_order[:count])]
        times_ms = _recommend(libraries, trained, histories, repeats, max(1, FEW // count // repeats))
        ours, peer = map(float, np.median(times_ms, axis=1))
        rows.append(
            {
                "users": min(count, len(in_order)),
                "ms": ours,
                "peer_ms": peer,
                "ratio": peer / ours,
                "spread": _spread(times_ms),
            }
        )
    events = sum(min(MAX_LEN, count - 1) for count in Counter(clicks["USER_ID"].to_pylist()).values())
    ours, peer = map(float, np.median(epochs_s, axis=1))
    return {
        "training": {
            "events": events,
            "epoch_s": ours,
            "events_per_s": events / ours,
            "peer_epoch_s": peer,
            "peer_events_per_s": events / peer,
            "ratio": peer / ours,
            "spread": _spread(epochs_s),
        },
        "recommend": rows,
    }


def check_peers() -> None:
    """Raises StreamrecError where scikit-rec is not installed."""
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
        if name.startswith("skrec"):  # each logs at its own level, a line a call
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
        clicks = clicks.at_least_outcome(LEAST_RATING)
    if len(clicks) == len(set(clicks.user_ids)):
        raise StreamrecError(f"{ratings} holds no user with two ratings of at least {LEAST_RATING:.0f}")
    return pa.table({"USER_ID": clicks.user_ids, "ITEM_ID": clicks.item_ids, "TIMESTAMP": clicks.timestamps_ms})


def _write(folder: Path, clicks: pa.Table) -> tuple[str, str]:
    """The events and the catalogue as both libraries read them."""
    paths = str(folder / "interactions.csv"), str(folder / "items.csv")
    pa.csv.write_csv(clicks.append_column("OUTCOME", pa.array([1.0] * len(clicks))), paths[0])
    pa.csv.write_csv(pa.table({"ITEM_ID": clicks["ITEM_ID"].unique()}), paths[1])
    return paths


def _train(
    libraries: Sequence[SimpleNamespace], files: tuple[str, str], repeats: int, progress: Callable[[str], None]
) -> tuple[list[Any], Times]:
    """What each library trained last, and the seconds of an epoch, (libraries, repeats)."""
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
    """Milliseconds of each call, (libraries, turns * calls); each library has several calls in a turn, as in use."""
    times_ms: Times = [[] for _ in libraries]
    for _ in range(turns):
        for place, library in enumerate(libraries):
            for call in range(1 + calls):
                started = time.perf_counter()
                trained[place].recommend(interactions=histories, top_k=K, **library.options)
                if call:  # the first finds the other library's data in the processor's cache
                    times_ms[place].append((time.perf_counter() - started) * 1e3)
    return times_ms


def _spread(times: Times) -> float:
    return float((np.ptp(times, axis=1) / np.median(times, axis=1)).max())
