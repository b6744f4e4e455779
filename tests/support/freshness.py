"""The figures of the freshness study: latencies, the time until they are as before, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from support.due_clicks import Seen

BIN_S = 0.5
# slow: over four times the median before the fault; recovered: for 5 s no half second has a tenth of slow clicks
SLOW_MEDIANS, LEAST_SLOW_S, SLOW_SHARE, CALM_S = 4, 0.1, 0.1, 5.0


def figures(seen: Sequence[Seen], struck_s: float, last_mark_s: float) -> dict[str, Any]:
    """Return the latencies before the fault and after it, and the time until they are as before.

    A click that waits when the fault strikes belongs to those after it.
    """
    before = [click for click in seen if click.seen_s < struck_s]
    after = [click for click in seen if click.seen_s >= struck_s]
    found = quantiles(before)
    slow_s = max(LEAST_SLOW_S, SLOW_MEDIANS * found["p50_ms"] / 1000)
    return {
        "before": found,
        "after": quantiles(after),
        "slow_ms": slow_s * 1000,
        "recovered_s": recovered_s(after, struck_s, last_mark_s, slow_s),
    }


def quantiles(clicks: Sequence[Seen]) -> dict[str, float]:
    waited_ms = 1000 * np.array([click.waited_s for click in clicks])
    p50, p99, highest = np.quantile(waited_ms, (0.5, 0.99, 1.0))
    return {"clicks": len(clicks), "p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(highest)}


def recovered_s(after: Sequence[Seen], struck_s: float, last_mark_s: float, slow_s: float) -> float:
    """Return the time from the fault until the last slow click of the disturbance has its list; 0: none was slow.

    The disturbance ends when no half second of the next 5 s has a tenth of slow clicks; noise after that is not its.
    """
    bins: dict[int, list[Seen]] = {}
    for click in after:
        bins.setdefault(int((click.due_s - struck_s) / BIN_S), []).append(click)
    found_s, calm_after_s = 0.0, last_mark_s - struck_s + CALM_S
    for number, clicks in sorted(bins.items()):
        late = [click for click in clicks if click.waited_s > slow_s]
        if number * BIN_S > calm_after_s:
            break
        if len(late) >= SLOW_SHARE * len(clicks):
            found_s = max(found_s, *(click.seen_s - struck_s for click in late))
            calm_after_s = max(calm_after_s, (number + 1) * BIN_S + CALM_S)
    return found_s


def course(seen: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """Return quantiles by half second in which the clicks were due."""
    bins: dict[int, list[float]] = {}
    for at_s, waited_s in seen:
        bins.setdefault(int(at_s // BIN_S), []).append(waited_s * 1000)
    return [
        {"at_s": number * BIN_S}
        | {name: float(np.quantile(waited, q)) for name, q in (("p50_ms", 0.5), ("p90_ms", 0.9), ("max_ms", 1.0))}
        for number, waited in sorted(bins.items())
    ]


def table(report: dict[str, Any]) -> str:
    """Return the table of the performance page."""
    lines = [
        f"`make freshness`, commit {report['commit']}, {report['kafka']}, "
        f"{', '.join(sorted({fault['redis'] for fault in report['faults'].values()}))}, "
        f"{report['clicks_per_s']:,.0f} clicks per second.",
        "",
        "| fault | p50 before, ms | p99 before | p50 after | p99 after | max after | recovered after, s |",
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
        "click to list; points: clicks, line: nine of ten clicks of a half second were faster", fontsize=10
    )
    figure.savefig(path)


def _draw_fault(axes: Any, found: dict[str, Any], after_s: float) -> None:
    blue, orange, grey = "#1b5faa", "#c4500f", "#555555"
    took_s = found["recovered_s"]
    axes.axvspan(0, took_s, color="#f3e3d8", linewidth=0, zorder=0)
    at_s, waited_s = np.array(found["seen"]).T
    axes.scatter(at_s, waited_s, s=1.5, color=blue, alpha=0.2, linewidths=0, rasterized=True)
    line = [(point["at_s"] + BIN_S / 2, point["p90_ms"] / 1000) for point in course(found["seen"])]
    axes.plot(*np.array(line).T, color=orange, linewidth=1.6)
    taken_s = {70: -100.0, 28: -100.0}  # where a row of labels has its last one
    for place, (mark_s, text) in enumerate(found["marks"]):
        if mark_s > after_s - 4:
            continue
        height = next((height for height, last_s in taken_s.items() if mark_s - last_s > 8), 28)
        taken_s[height] = mark_s
        axes.axvline(mark_s, color="black", linewidth=1.2, linestyle=":" if place else "--")
        axes.text(mark_s + 0.3, height, text, fontsize=8, color=grey, va="top")
    outcome = f"recovered after {took_s:.1f} s" if took_s else "no slower"
    axes.set_title(f"{found['title']}: {outcome}", fontsize=9.5, loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
