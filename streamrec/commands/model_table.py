"""The table of `streamrec models list`: the figures of a version, and aligned columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamrec.serving.online import OnlineFigures
    from streamrec.versions import Version

HEADER = (
    "",
    "version",
    "made, UTC",
    "offline on",
    "hr@10",
    "ndcg@10",
    "mrr@10",
    "online hr@10",
    "online mrr@10",
    "popular hr@10",
    "clicks",
)
SHADOW_HEADER = ("as shadow hr@10", "champion on the same clicks", "same clicks")


def offline(version: Version) -> Iterator[str]:
    """Yield the data and the metrics of the gate's comparison, or of training if the gate did not compare it."""
    report = version.metadata.get("report")
    judged = report.get("challenger") if isinstance(report, dict) else None
    validation = version.metadata.get("validation")
    for judged_on, found in (("newest clicks", judged), ("validation", validation), ("-", {})):
        if isinstance(found, dict) and (found or judged_on == "-"):
            yield judged_on
            yield from (_rate(found, name) for name in ("hr@10", "ndcg@10", "mrr@10"))
            return


def online(figures: OnlineFigures | None, with_shadows: bool) -> Iterator[str]:
    """Yield the figures on clicks that the daemons have judged."""
    rates = figures.rates() if figures else {}
    yield from (_rate(rates, name) for name in ("hr@10", "mrr@10", "popularity_hr@10"))
    yield f"{rates.get('judged', 0):,}"
    if with_shadows:
        yield from (_rate(rates, name) for name in ("shadow_hr@10", "champion_hr@10"))
        yield f"{rates.get('champion_judged', 0):,}"


def _rate(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"


def aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield the rows with aligned columns; the last cell of a short row may exceed its column."""
    width = len(rows[0])
    widths = [max(len(row[at]) for row in rows if len(row) == width) for at in range(width)]
    for row in rows:
        yield "  ".join(f"{cell:{size}}" for cell, size in zip(row, widths, strict=False)).rstrip()
