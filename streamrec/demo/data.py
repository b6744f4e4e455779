"""The clicks of the demo: MovieLens 100K, the visitor's own file, or simulated ones without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sasrec import Columns, Interactions, read_events
from streamrec.errors import StreamrecError
from streamrec.local.movielens import TITLES, FetchError, fetch_movielens
from streamrec.local.simulator import simulate_clicks
from streamrec.web.titles import read_titles

TRAIN_FRACTION = 0.8  # of the time line; the rest is replayed as live clicks
MAX_OWN_EVENTS = 100_000  # the newest events of an own file; they train in about a minute on two cores
REPEATS_MATTER = 0.1  # share of clicks on an item that the user clicked before


@dataclass(frozen=True)
class DemoData:
    """Clicks before and after the moment at which the demo goes live, and titles by item id."""

    source: str
    past: Interactions
    live: Interactions
    titles: dict[str, str]

    @property
    def filter_seen(self) -> bool:
        """Whether to leave seen items out: films are watched once, groceries are bought again and again."""
        distinct = len(set(zip(self.past.user_ids, self.past.item_ids, strict=True)))
        return len(self.past) - distinct < REPEATS_MATTER * len(self.past)


def load_data(clicks: Path | None, columns: Columns, items: Path | None, console: Console) -> DemoData:
    """Read the clicks and titles of the given files; without ``clicks``, MovieLens 100K or simulated clicks.

    Raises:
        StreamrecError: titles without clicks, or unreadable titles.
        DataFileError: the clicks cannot be read.
    """
    if clicks is not None:
        return _own_clicks(clicks, columns, items, console)
    if items is not None:
        raise StreamrecError("--items has the titles of your own clicks: also give their file with --data")
    try:
        file = fetch_movielens()
    except FetchError as error:
        text = f"MovieLens 100K is not available ({error}); using simulated clicks instead"
        console.print(text, highlight=False, soft_wrap=True)
        events, titles = simulate_clicks()
        return DemoData("simulated clicks", *Interactions.from_events(events).split_at(TRAIN_FRACTION), titles)
    past, live = Interactions.from_events(read_events(file)).split_at(TRAIN_FRACTION)
    return DemoData("MovieLens 100K", past, live, read_titles(file.with_name(TITLES)))


def _own_clicks(clicks: Path, columns: Columns, items: Path | None, console: Console) -> DemoData:
    titles = read_titles(items) if items else {}
    everything = Interactions.from_events(read_events(clicks, columns))
    newest = everything.newest(MAX_OWN_EVENTS)
    if len(newest) < len(everything):
        console.print(f"{clicks}: using the newest {len(newest):,} of {len(everything):,} clicks", highlight=False)
    return DemoData(clicks.name, *newest.split_at(TRAIN_FRACTION), titles)
