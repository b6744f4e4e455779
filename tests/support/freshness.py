"""The figures of the freshness study: latencies, the time until they are as before, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from support.due_clicks import Seen

BIN_S = 0.5
SLOW_S, CALM_S = 0.5, 5.0

Point = dict[str, float]


def figures(seen: Sequence[Seen], struck_s: float, last_mark_s: float) -> dict[str, Any]:
    """Return the latencies before the fault and after it, their course, and the time until they are good again.

    A click that waits when the fault strikes belongs to those after it.

    Args:
        struck_s, last_mark_s: Unix time of the fault, and of the last thing that was done.
    """
    points = course(seen, struck_s)
    return {
        "before": quantiles([click for click in seen if click.seen_s < struck_s]),
        "after": quantiles([click for click in seen if click.seen_s >= struck_s]),
        "recovered_s": recovered_s(points, last_mark_s - struck_s),
        "course": points,
    }


def quantiles(clicks: Sequence[Seen]) -> dict[str, float]:
    waited_ms = 1000 * np.array([click.waited_s for click in clicks])
    p50, p99, highest = np.quantile(waited_ms, (0.5, 0.99, 1.0))
    return {"clicks": len(clicks), "p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(highest)}


def course(seen: Sequence[Seen], struck_s: float) -> list[Point]:
    """Return quantiles for each half second in which clicks were due; ``at_s`` is its begin, from the fault."""
    bins: dict[int, list[float]] = {}
    for click in seen:
        bins.setdefault(int((click.due_s - struck_s) // BIN_S), []).append(click.waited_s * 1000)
    return [
        {"at_s": number * BIN_S}
        | {name: float(np.quantile(waited, q)) for name, q in (("p50_ms", 0.5), ("p90_ms", 0.9), ("max_ms", 1.0))}
        for number, waited in sorted(bins.items())
    ]


def recovered_s(points: Sequence[Point], last_mark_s: float) -> float:
    """Return the time from the fault after which nine of ten clicks have their list within half a second again.

    The disturbance ends when this holds for 5 s; what comes later is not the fault's. 0: it held all the time.
    """
    found_s, calm_after_s = 0.0, last_mark_s + CALM_S
    for point in points:
        if 0 <= point["at_s"] <= calm_after_s and point["p90_ms"] > SLOW_S * 1000:
            found_s = point["at_s"] + BIN_S
            calm_after_s = max(calm_after_s, found_s + CALM_S)
    return found_s


def table(report: dict[str, Any]) -> str:
    """Return the table of the performance page."""
    lines = [
        f"`make freshness`, commit {report['commit']}, {report['kafka']}, "
        f"{', '.join(sorted({fault['redis'] for fault in report['faults'].values()}))}, "
        f"{report['clicks_per_s']:,.0f} clicks per second.",
        "",
        "| fault | p50 before, ms | p99 before | p50 after | p99 after | max after | good again after, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in report["faults"].values():
        before, after = found["before"], found["after"]
        values = before["p50_ms"], before["p99_ms"], after["p50_ms"], after["p99_ms"], after["max_ms"]
        cells = " | ".join(f"{value:,.0f}" for value in values)
        lines.append(f"| {found['title']} | {cells} | {found['recovered_s']:.1f} |")
    return "\n".join(lines) + "\n"


def draw(measured: dict[str, dict[str, Any]], path: str, after_s: float) -> None:
    """Draw the time that clicks waited, over the moment at which they were due; a panel a fault."""
    from matplotlib.figure import Figure

    rows = -(-len(measured) // 2)
    figure = Figure(figsize=(11, 0.9 + 2.4 * rows), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
    for axes, found in zip(panels.flat, measured.values(), strict=False):
        _draw_fault(axes, found, after_s)
    for axes in panels.flat[len(measured) :]:
        axes.set_visible(False)
    first = panels[0][0]
    first.set(yscale="log", ylim=(0.003, 90), xlim=(-10, after_s))
    first.set_yticks((0.01, 0.1, 1, 10), ("10 ms", "100 ms", "1 s", "10 s"))
    figure.supxlabel("moment of the click, seconds from the fault", fontsize=10)
    figure.supylabel(
        "click to list; band: median to longest of a half second, line: nine of ten are faster", fontsize=10
    )
    figure.savefig(path)


def _draw_fault(axes: Any, found: dict[str, Any], after_s: float) -> None:
    blue, orange, grey = "#a9c3de", "#c4500f", "#555555"
    took_s = found["recovered_s"]
    axes.axvspan(0, took_s, color="#f3e3d8", linewidth=0, zorder=0)
    at_s = [point["at_s"] + BIN_S / 2 for point in found["course"]]
    p50, p90, highest = ([point[name] / 1000 for point in found["course"]] for name in ("p50_ms", "p90_ms", "max_ms"))
    axes.fill_between(at_s, p50, highest, color=blue, linewidth=0)
    axes.plot(at_s, p90, color=orange, linewidth=1.6)
    taken_s = {70: -100.0, 28: -100.0}  # where a row of labels has its last one
    for place, (mark_s, text) in enumerate(found["marks"]):
        if mark_s > after_s - 4:
            continue
        height = next((height for height, last_s in taken_s.items() if mark_s - last_s > 8), 28)
        taken_s[height] = mark_s
        axes.axvline(mark_s, color="black", linewidth=1.2, linestyle=":" if place else "--")
        axes.text(mark_s + 0.3, height, text, fontsize=8, color=grey, va="top")
    outcome = f"good again after {took_s:.1f} s" if took_s else "good all the time"
    axes.set_title(f"{found['title']}: {outcome}", fontsize=9.5, loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
