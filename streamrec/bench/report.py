"""The figures of `streamrec bench` as tables: on a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

MIB = 2**20
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A table: the values of each row under these names."""

    title: str
    names: str  # separated by spaces
    rows: Sequence[Row]

    def cells(self) -> Iterator[list[str]]:
        """Yield the rows as text, the header first."""
        names = self.names.split()
        yield [name.replace("_", " ") for name in names]
        for row in self.rows:
            yield [_text(row[name]) for name in names]


def sections(report: Mapping[str, Any]) -> list[Section]:
    """Return the tables of a report."""
    found: list[Section] = []
    for part, sections_of in SECTIONS.items():
        if part in report:
            found += sections_of(report)
    return found


def _engine(report: Mapping[str, Any]) -> Iterator[Section]:
    ways = ("cached", "reencode", "torch", "full")
    names = f"hidden blocks max_len batch {' '.join(ways)} ratio spread"
    rows = [row | {way: row[f"{way}_us"] for way in ways} for row in report["engine"]]
    yield Section("Engine: µs per click with its list, one thread", names, rows)


def _daemon(report: Mapping[str, Any]) -> Iterator[Section]:
    row = report["daemon"]
    names = "hidden blocks max_len items users events_per_s spread cold_events_per_s"
    if "two_daemons_per_s" in row:
        names += " two_daemons_per_s cluster_events_per_s"
    names += " naive_events_per_s ratio"
    ratio = row["events_per_s"] / row["naive_events_per_s"]
    title = f"Daemon: clicks per second from {row['broker']} to Redis"
    yield Section(title, names, [row | {"ratio": ratio}])
    rows = [{"share": f"{share} %"} | latencies for share, latencies in row["latency_ms"].items()]
    names = "share events_per_s p50 p95 p99 p999 lag"
    yield Section("Click to list, ms, at a share of that throughput", names, rows)


def _memory(report: Mapping[str, Any]) -> Iterator[Section]:
    memory = report["memory"]
    names = "hidden blocks max_len float32_bytes float16_bytes same_top_10"
    yield Section("Memory of a cached user", names, memory["cached_user"])
    names = "max_len sequence_bytes list_bytes"
    yield Section("Memory of a user in Redis, bytes", names, memory["redis_user"])
    rows = [
        row | {"resident_MiB": row["resident_bytes"] / MIB, "cache_MiB": row["cache_bytes"] / MIB}
        for row in memory["process"]
    ]
    yield Section("Memory of the process", "users cached_users resident_MiB cache_MiB", rows)


def _catalogue(report: Mapping[str, Any]) -> Iterator[Section]:
    names = "items hidden batch exact_us approx_us recall_at_10 ratio build_s spread"
    rows = [row | {"ratio": row["exact_us"] / row["approx_us"]} for row in report["catalogue"]]
    yield Section("Lists of ten items from large catalogues, µs, one thread", names, rows)


def _peers(report: Mapping[str, Any]) -> Iterator[Section]:
    names = "epoch_s events_per_s peer_epoch_s peer_events_per_s ratio spread"
    yield Section("Training beside scikit-rec", names, [report["training"]])
    names = "users ms peer_ms ratio spread"
    yield Section("Recommending to users at once beside scikit-rec", names, report["recommend"])


# by the first key that a part adds to the report
SECTIONS = {
    "engine": _engine,
    "daemon": _daemon,
    "memory": _memory,
    "catalogue": _catalogue,
    "training": _peers,
}


def as_table(section: Section) -> Table:
    """Return a table for a terminal."""
    header, *rows = section.cells()
    table = Table(title=section.title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for name in header:
        table.add_column(name, justify="right", vertical="bottom")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(report: Mapping[str, Any]) -> str:
    """Return all tables, with machine, versions and commit."""
    machine, versions = report["machine"], report["versions"]
    on = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}"
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"`streamrec bench`, commit {report['commit'] or 'unknown'}. {on}; {installed}."]
    for section in sections(report):
        header, *rows = section.cells()
        lines += ["", f"**{section.title}**", "", _line(header), "|" + "---:|" * len(header), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
