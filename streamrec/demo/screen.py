"""The screen of the demo: a live picture on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from streamrec.demo.snapshot import Snapshot
from streamrec.logs import one_line

LINE_EVERY_S = 5.0
SHOWN_CLICKS, SHOWN_LISTED = 6, 10
BLOCKS = "▁▂▃▄▅▆▇█"


class Screen:
    """Draws snapshots until closed."""

    def __init__(self, console: Console, titles: Mapping[str, str]) -> None:
        self._console = console
        self._titles = titles
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def draw(self, now: Snapshot) -> None:
        """Draw a snapshot; without a terminal, print a line at most every LINE_EVERY_S."""
        if self._live:
            self._live.update(self._picture(now), refresh=True)
        elif time.monotonic() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._console.print(
                f"{now.sent:,}/{now.total:,} clicks  {now.events_per_s:.0f}/s  latency p50 {as_ms(now.p50_ms)} "
                f"p99 {as_ms(now.p99_ms)}  lag {now.lag_records}  hit rate@10 {now.hit_rate:.3f} "
                f"(popularity {now.popularity_hit_rate:.3f})",
                highlight=False,
                soft_wrap=True,
            )
            if now.clicks and now.listed:
                self._console.print(
                    f"   user {one_line(now.user_id)} clicked {self._title(now.clicks[-1])}; "
                    f"now first: {'; '.join(self._title(item) for item in now.listed[:3])}",
                    highlight=False,
                    soft_wrap=True,
                    markup=False,
                )

    def note(self, line: str) -> None:
        """Print an event, unless the live picture shows it."""
        if not self._live:
            self._console.print(one_line(line), highlight=False, soft_wrap=True, markup=False)

    def say(self, line: str) -> None:
        """Print a line that remains, above the live picture if there is one."""
        self._console.print(one_line(line), highlight=False, soft_wrap=True, markup=False)

    def _picture(self, now: Snapshot) -> RenderableType:
        layout = Layout()
        layout.split_column(Layout(self._head(now), size=3), Layout(name="body"))
        layout["body"].split_row(
            Layout(Panel(_numbers(now), title="the stream"), ratio=2), Layout(self._user(now), ratio=3)
        )
        height = min(SHOWN_CLICKS + SHOWN_LISTED + 9, self._console.height - 1)
        table = Table.grid(expand=True)
        table.add_row(layout)
        layout.size = height
        return _Fixed(layout, height)

    def _head(self, now: Snapshot) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        left_s = (now.total - now.sent) / now.events_per_s if now.events_per_s else 0.0
        grid.add_row(
            "replaying clicks through Kafka",
            ProgressBar(total=now.total, completed=now.sent),
            f"{now.sent:,} of {now.total:,}   {left_s:3.0f} s left   Ctrl-C stops",
        )
        return Panel(grid, title="streamrec demo")

    def _user(self, now: Snapshot) -> RenderableType:
        clicks = Table.grid(padding=(0, 1))
        for item in now.clicks[-SHOWN_CLICKS:]:
            clicks.add_row("·", Text(self._title(item), overflow="ellipsis", no_wrap=True))
        listed = Table.grid(padding=(0, 1))
        for place, item in enumerate(now.listed[:SHOWN_LISTED], start=1):
            listed.add_row(Text(f"{place:2}", style="dim"), Text(self._title(item), no_wrap=True, overflow="ellipsis"))
        age = f"{now.listed_ago_s * 1000:.0f} ms" if now.listed_ago_s < 1 else f"{now.listed_ago_s:.0f} s"
        caption = f"published {age} ago, after {now.listed_after} clicks" if now.listed else "no list yet"
        return Panel(
            Group(
                Text("last clicks", style="bold"),
                clicks,
                Text(""),
                Text.assemble(("recommended next", "bold"), ("  " + caption, "dim")),
                listed,
            ),
            title=Text(f"user {one_line(now.user_id)}") if now.user_id else "a user",
        )

    def _title(self, item: str) -> str:
        return one_line(self._titles.get(item, item))


class _Fixed:
    """A renderable with a fixed height, so that the picture does not fill the terminal."""

    def __init__(self, inner: RenderableType, height: int) -> None:
        self._inner, self._height = inner, height

    def __rich_console__(self, console: Console, options):  # type: ignore[no-untyped-def]
        yield from console.render(self._inner, options.update(height=self._height))


def _numbers(now: Snapshot) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_row("clicks per second", f"{now.events_per_s:,.0f}")
    table.add_row("click to list, p50", as_ms(now.p50_ms))
    table.add_row("click to list, p99", as_ms(now.p99_ms))
    table.add_row("lag, records", f"{now.lag_records:,}")
    table.add_row("dead letters", f"{now.dead_letters:,}")
    table.add_row("", "")
    table.add_row("hit rate@10, model", Text(f"{now.hit_rate:.4f}", style="bold green"))
    table.add_row("hit rate@10, popularity", f"{now.popularity_hit_rate:.4f}")
    if now.popularity_hit_rate:
        table.add_row("model / popularity", f"{now.hit_rate / now.popularity_hit_rate:.1f} x")
    return Group(
        table, Text(""), Text("hit rate@10 of the model, over time", style="dim"), _over_time(now), _retraining(now)
    )


def _over_time(now: Snapshot) -> Text:
    blocks = sparkline(now.hit_rates_over_time)
    if now.swap is None:
        return Text(blocks, style="green", no_wrap=True)
    at = now.swap.first_point
    return Text.assemble((blocks[:at], "green"), ("|", "bold"), (blocks[at:], "cyan"), no_wrap=True)


def _retraining(now: Snapshot) -> Text:
    if now.swap:
        return Text.assemble(
            ("|", "bold"), (f" new model {now.swap.version} since click {now.swap.after_clicks:,}", "cyan")
        )
    if now.round and not now.round.promoted:
        return Text(one_line(f"no new model this time: {now.round.reason}"), style="dim")
    return Text("" if now.retraining_s is None else f"retraining beside the daemon, {now.retraining_s:.0f} s")


def sparkline(values: list[float]) -> str:
    """Return values as a row of blocks; the highest value is a full block."""
    top = max(values, default=0.0)
    return "".join(BLOCKS[round(value / top * (len(BLOCKS) - 1))] for value in values) if top else ""


def as_ms(value: float | None) -> str:
    """Return a latency as text; "-" if there is none."""
    return "-" if value is None else f"{value:.1f} ms"
