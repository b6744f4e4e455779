"""Draw a soak: records behind and what happened over time, and the seconds until all worked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.soak.chaos import VICTIMS
from studies.soak.state import State

COLORS = {
    "daemon": "#1b5faa",
    "broker": "#c4500f",
    "Redis primary": "#2a7f3e",
    "retrain worker": "#7b3fa0",
    "rebalance": "#767676",
    "model swap": "#767676",
}


def draw(state: State, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1), height_ratios=(1.4, 1))
    over_time = figure.add_subplot(grid[0, 0])
    _behind(over_time, state)
    _events(figure.add_subplot(grid[1, 0], sharex=over_time), state)
    _recoveries(figure.add_subplot(grid[:, 1]), state)
    figure.savefig(path)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _behind(axes: Any, state: State) -> None:
    times, _, behind = np.array(state.samples or [(0, 0, 0)], float).T
    axes.fill_between(times / 60, behind, color="#b9cde5", step="post", linewidth=0)
    axes.step(times / 60, behind, where="post", color=COLORS["daemon"], linewidth=0.7)
    axes.set_ylim(0)
    axes.set_xlim(0, max(state.run_s, 1) / 60)
    axes.set_ylabel("records behind (gap: no broker)")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(labelbottom=False)
    _plain(axes)


def _events(axes: Any, state: State) -> None:
    times = {name: [kill.at_s for kill in state.killed if kill.victim == name] for name in COLORS}
    times |= {"rebalance": state.rebalances, "model swap": state.swaps}
    names = list(COLORS)[::-1]
    axes.eventplot(
        [np.array(times[name]) / 60 for name in names],
        lineoffsets=range(len(names)),
        linelengths=0.7,
        linewidths=1.0,
        colors=[COLORS[name] for name in names],
        alpha=0.8,
    )
    axes.set_yticks(range(len(names)), [f"{name} ({len(times[name])})" for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(COLORS[name])
    axes.set_xlabel("minutes")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _plain(axes)


def _recoveries(axes: Any, state: State) -> None:
    rng = np.random.default_rng(0)
    names = list(COLORS)[: len(VICTIMS)]
    for place, name in enumerate(names):
        found = [kill.recovered_s for kill in state.killed if kill.victim == name and kill.recovered_s is not None]
        if found:
            middle, jitter = float(np.median(found)), rng.uniform(-0.26, 0.26, len(found))
            axes.plot(place + jitter, found, ".", color=COLORS[name], alpha=0.5, markersize=5, markeredgewidth=0)
            axes.plot((place - 0.34, place + 0.34), (middle, middle), color=COLORS[name], linewidth=2)
            axes.text(place + 0.38, middle, f"{middle:.1f}", color=COLORS[name], va="center", fontsize=9)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=9)
    axes.set_xlim(-0.5, len(names) - 0.2)
    axes.set_ylim(0)
    axes.set_title("seconds from SIGKILL until it is up\nand clicks are applied; bar: median", fontsize=9, loc="left")
    axes.yaxis.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0)
    _plain(axes)
