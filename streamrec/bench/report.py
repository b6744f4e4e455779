"""The figures of `streamrec bench` for people: tables on a terminal, the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

MIB = 2**20
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One table: of each row the values under these names."""

    title: str
    names: Sequence[str]
    rows: Sequence[Row]

    def cells(self) -> Iterator[list[str]]:
        """The rows as they are read, the header first."""
        yield [name.replace("_", " ") for name in self.names]
        for row in self.rows:
            yield [_text(row[name]) for name in self.names]


def sections(report: Mapping[str, Any]) -> list[Section]:
    """What there is in a report, a table each."""
    found = []

    def add(title: str, names: str, rows: Sequence[Row]) -> None:
        found.append(Section(title, names.split(), rows))

    if "engine" in report:
        ways = ("cached", "reencode", "torch", "full")
        names = f"hidden blocks max_len batch {' '.join(ways)} ratio spread"
        rows = [row | {way: row[f"{way}_us"] for way in ways} for row in report["engine"]]
        add("Engine: µs a click and its list, one thread", names, rows)
    if "daemon" in report:
        row = report["daemon"]
        names = "hidden blocks max_len items users events_per_s spread cold_events_per_s"
        if "two_daemons_per_s" in row:
            names += " two_daemons_per_s cluster_events_per_s"
        add(
            "Daemon: clicks a second between a real Kafka and a real Redis",
            f"{names} naive_events_per_s ratio",
            [row | {"ratio": row["events_per_s"] / row["naive_events_per_s"]}],
        )
        shares = [{"share": f"{share} %"} | latencies for share, latencies in row["latency_ms"].items()]
        add("Click to list, ms, at a share of that rate", "share events_per_s p50 p95 p99 p999 lag", shares)
    if "memory" in report:
        names = "hidden blocks max_len float32_bytes float16_bytes same_top_10"
        add("Memory of a cached user", names, report["memory"]["cached_user"])
        add("Memory of a user in Redis, bytes", "max_len sequence_bytes list_bytes", report["memory"]["redis_user"])
        rows = [
            row | {"resident_MiB": row["resident_bytes"] / MIB, "cache_MiB": row["cache_bytes"] / MIB}
            for row in report["memory"]["process"]
        ]
        add("Memory of the process", "users cached_users resident_MiB cache_MiB", rows)
    if "catalogue" in report:
        names = "items hidden batch exact_us approx_us recall_at_10 ratio build_s spread"
        rows = [row | {"ratio": row["exact_us"] / row["approx_us"]} for row in report["catalogue"]]
        add("Lists of ten from catalogues, µs, one thread", names, rows)
    if "training" in report:
        names = "epoch_s events_per_s peer_epoch_s peer_events_per_s ratio spread"
        add("Training beside scikit-rec", names, [report["training"]])
        add(
            "Recommending to many users at once beside scikit-rec", "users ms peer_ms ratio spread", report["recommend"]
        )
    return found


def as_table(section: Section) -> Table:
    """For a terminal."""
    header, *rows = section.cells()
    table = Table(title=section.title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for name in header:
        table.add_column(name, justify="right", vertical="bottom")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(report: Mapping[str, Any]) -> str:
    """All of it, with what it was measured on."""
    machine, versions = report["machine"], report["versions"]
    on = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}"
    of = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"`streamrec bench`, commit {report['commit'] or 'unknown'}. {on}; {of}."]
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
