"""Compare a new model with the champion on held-out clicks, and decide whether it may be promoted.

Neither model was trained on the held-out clicks. Both rank the full catalogue after the same histories,
through the engine that serves. Popularity and a Markov chain are measured for comparison.
"""

from __future__ import annotations

import math
from typing import NotRequired, TypedDict

import numpy as np

from sasrec import Engine, Holdout, Interactions, ItemVocab, Metrics, SavedModel, Sequences, evaluate
from sasrec.evaluation.baselines import MarkovChain, Popularity
from streamrec.errors import RetrainError

K = 10
MAX_CASES = 5_000
MAX_LISTS = 500  # cases for coverage and overlap, which need the lists themselves

Figures = TypedDict(
    "Figures",
    {
        "hr@10": float,
        "ndcg@10": float,
        "mrr@10": float,
        "coverage@10": NotRequired[float],  # of models: share of their items that stand in at least one list
    },
)
Report = TypedDict(
    "Report",
    {
        "cases": int,
        "challenger": Figures,
        "champion": NotRequired[Figures],
        "popularity": Figures,
        "markov": Figures,
        "overlap@10": NotRequired[float],  # share of items that challenger and champion both list, mean over all cases
    },
)


def compare(
    challenger: SavedModel, champion: SavedModel | None, events: Interactions, held_out: int, filter_seen: bool
) -> Report:
    """Measure challenger, champion and baselines on the last ``held_out`` events.

    The catalogue is that of challenger and champion together. A target that a model does not know is a miss.

    Raises:
        RetrainError: no held-out event has an earlier event of its user.
    """
    champion_ids = champion.vocab.ids if champion else []
    catalogue = ItemVocab(dict.fromkeys([*challenger.vocab.ids, *champion_ids]))
    cases = _cases(events, held_out, catalogue).sample(MAX_CASES, seed=0)
    if not len(cases):
        raise RetrainError("no held-out click follows an earlier click of its user: there is nothing to compare on")
    history = Sequences.build(events.first(len(events) - held_out), challenger.vocab)
    translated = _translate(cases, catalogue, challenger.vocab)
    popularity = _figures(evaluate(Popularity().fit(history), translated, (K,), filter_seen))
    markov = _figures(evaluate(MarkovChain().fit(history), translated, (K,), filter_seen))
    ours, our_lists = _measure(challenger, cases, catalogue, filter_seen)
    if champion is None:
        return {"cases": len(cases), "challenger": ours, "popularity": popularity, "markov": markov}
    theirs, their_lists = _measure(champion, cases, catalogue, filter_seen)
    shared = [len(mine & other) / K for mine, other in zip(our_lists, their_lists, strict=True)]
    return {
        "cases": len(cases),
        "challenger": ours,
        "champion": theirs,
        "popularity": popularity,
        "markov": markov,
        "overlap@10": float(np.mean(shared)),
    }


def refusal(report: Report, tolerance: float) -> str | None:
    """Return why a challenger must not be promoted; None if it may be.

    Args:
        tolerance: how much lower than the champion's its NDCG may be, as a share.
    """
    ours, popular = report["challenger"]["ndcg@10"], report["popularity"]["ndcg@10"]
    if not math.isfinite(ours):
        return "its scores are NaN or infinite"
    if ours <= popular:
        return f"NDCG@{K} {ours:.4f} is no better than popularity's {popular:.4f}"
    champion = report.get("champion")
    if champion and ours < champion["ndcg@10"] * (1 - tolerance):
        return f"NDCG@{K} {ours:.4f} is below the champion's {champion['ndcg@10']:.4f} by more than {tolerance:.0%}"
    return None


def _cases(events: Interactions, held_out: int, vocab: ItemVocab) -> Holdout:
    """Make each of the last events a target after the user's events before it; a user's first event is none."""
    histories, targets = [], []
    clicked: dict[str, list[int]] = {}
    begin = len(events) - held_out
    for at, (user, item) in enumerate(zip(events.user_ids, vocab.encode(events.item_ids), strict=True)):
        history = clicked.setdefault(user, [])
        if at >= begin and history:
            histories.append(np.array(history, np.int64))
            targets.append(item)
        history.append(item)
    return Holdout(histories, np.array(targets, np.int64))


def _translate(cases: Holdout, catalogue: ItemVocab, vocab: ItemVocab) -> Holdout:
    """Return the cases in the indices of another vocabulary; items unknown to it become 0."""
    index = np.array([0, *vocab.encode(catalogue.ids)], np.int64)  # (C + 1,)
    return Holdout([index[history] for history in cases.histories], index[cases.targets])


def _measure(
    saved: SavedModel, cases: Holdout, catalogue: ItemVocab, filter_seen: bool
) -> tuple[Figures, list[set[str]]]:
    """Return the figures of a model, and its lists for the first MAX_LISTS cases."""
    engine = Engine(saved.model, saved.vocab, cache_bytes=0, index="exact")
    try:
        figures = _figures(evaluate(engine, _translate(cases, catalogue, saved.vocab), (K,), filter_seen))
    except ValueError:  # NaN or infinite scores
        figures = {"hr@10": math.nan, "ndcg@10": math.nan, "mrr@10": math.nan}
    histories = [catalogue.decode(history[history > 0].tolist()) for history in cases.histories[:MAX_LISTS]]
    rankings = engine.recommend(histories, K, filter_seen=filter_seen)
    lists = [set(ranking.items) if ranking else set() for ranking in rankings]
    figures["coverage@10"] = len(set().union(*lists)) / len(saved.vocab)
    return figures, lists


def _figures(metrics: Metrics) -> Figures:
    return {"hr@10": metrics.hr[K], "ndcg@10": metrics.ndcg[K], "mrr@10": metrics.mrr[K]}
