"""The summary of the demo: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from streamrec.demo.retrain import Round
from streamrec.demo.screen import as_ms
from streamrec.demo.snapshot import Snapshot, Swap
from streamrec.errors import StreamrecError


def print_summary(console: Console, now: Snapshot, source: str, complete: bool) -> None:
    """Print the summary as a table."""
    table = Table(title="streamrec demo: summary" + ("" if complete else " (stopped early)"), title_justify="left")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_row("data", source)
    table.add_row("live clicks", f"{now.applied:,} in {now.seconds:.0f} s, {now.events_per_s:,.0f} per second")
    table.add_row("click to published list", f"p50 {as_ms(now.p50_ms)}, p99 {as_ms(now.p99_ms)}")
    table.add_row("hit rate@10 of the published lists", f"{now.hit_rate:.4f}")
    table.add_row("hit rate@10 of the most popular items", f"{now.popularity_hit_rate:.4f}")
    if now.popularity_hit_rate:
        times = now.hit_rate / now.popularity_hit_rate
        table.add_row("hits, model against popularity", f"{times:.1f} times as many")
    table.add_row("dead letters", f"{now.dead_letters:,}")
    table.add_section()
    for row in _retraining_rows(now):
        table.add_row(*row)
    console.print(table)


def _retraining_rows(now: Snapshot) -> Iterator[tuple[str, str]]:
    swap = now.swap
    if swap is None:
        if now.round and not now.round.promoted:
            yield "retrained beside the daemon", f"no new model this time: {now.round.reason}"
        elif now.round or now.retraining_s is not None:
            yield "retrained beside the daemon", "stopped before the new model was ready"
        return
    yield "model", f"{swap.old_version} -> {swap.version}"
    yield "swapped after", f"{swap.after_clicks:,} of {now.total:,} clicks"
    if now.round:
        yield "training beside the daemon", f"{now.round.train_s:.0f} s"
        yield (
            "NDCG@10 on the newest clicks, for the gate",
            f"{now.round.ndcg:.4f}, old model {now.round.champion_ndcg:.4f}",
        )
    yield "hit rate@10 before the swap", f"{swap.before.model:.4f}, popularity {swap.before.popularity:.4f}"
    after = swap.after
    yield (
        "hit rate@10 after the swap",
        f"{after.model:.4f}, popularity {after.popularity:.4f}" if after else "no click came",
    )
    if swap.old_model_after is not None:
        yield "on the same clicks, the old model", f"{swap.old_model_after:.4f}"
    p99s = (as_ms(swap.p99_ms.get(phase)) for phase in ("before", "training", "swap"))
    yield "p99 before, in training, at the swap", ", ".join(p99s)


def summary(now: Snapshot) -> dict[str, object]:
    """Return the summary as JSON values."""
    return {
        "events": now.applied,
        "events_per_s": round(now.events_per_s, 1),
        "latency_ms": {"p50": now.p50_ms, "p99": now.p99_ms},
        "hit_rate_at_10": round(now.hit_rate, 5),
        "popularity_hit_rate_at_10": round(now.popularity_hit_rate, 5),
        "dead_letters": now.dead_letters,
        "swap": _swap(now.swap, now.round) if now.swap else None,
    }


def _swap(swap: Swap, result: Round | None) -> dict[str, object]:
    return {
        "after_clicks": swap.after_clicks,
        "version": swap.version,
        "hit_rate_before": round(swap.before.model, 5),
        "hit_rate_after": round(swap.after.model, 5) if swap.after else None,
        "old_model_after": None if swap.old_model_after is None else round(swap.old_model_after, 5),
        "popularity_before": round(swap.before.popularity, 5),
        "popularity_after": round(swap.after.popularity, 5) if swap.after else None,
        "train_s": result.train_s if result else None,
        "p99_ms": swap.p99_ms,
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a file.

    Raises:
        StreamrecError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise StreamrecError(f"cannot write the summary to {path}: {error.strerror}") from None
