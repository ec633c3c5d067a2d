"""Text tables of rows, printed by a run and shown in README.md."""

from collections.abc import Sequence

from .history import Row

NO_PEERS = ("dense", "dense-torchao", "gate")
"""Providers that compute something else."""


def row_table(row: Row) -> list[str]:
    """Formats a row as a title and one line per provider; marks the fastest peer."""
    best = best_peer(row)
    ours = row["providers"]["ours"]["median_ms"]
    title = row["key"]
    if best is not None:
        title += f"  ours / best peer ({best}) {ours / row['providers'][best]['median_ms']:.2f}"
    lines = [title]
    for name, figures in row["providers"].items():
        share = figures["share_of_limit"]
        cells = (
            f"{name:26}",
            f"{figures['median_ms']:10.3f} ms",
            f"{figures['rate']:9.1f} {row['unit']:8}",
            f"{share:5.0%} of limit" if share else " " * 14,
            f"{figures['ratio']:7.2f}x {row['anchor']}",
            f"+-{figures['noise']:4.0%}",
            f"peak {_mib(figures.get('peak_extra_bytes'))}",
            f"kept {_mib(figures.get('saved_bytes'))}" if "saved_bytes" in figures else "",
        )
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def summary_table(rows: Sequence[Row]) -> list[str]:
    """Formats all rows, one line each, with the anchor and the best peer."""
    width = max(len(row["key"]) for row in rows)
    lines = [
        f"{'row':{width}}  {'ours ms':>9}  {'rate':>16}  {'of limit':>8}  {'ratio to anchor':>20}"
        "  ours / best peer"
    ]
    for row in rows:
        ours, best = row["providers"]["ours"], best_peer(row)
        share = f"{ours['share_of_limit']:.0%}" if ours["share_of_limit"] else "-"
        peer = "-"
        if best is not None:
            peer = f"{ours['median_ms'] / row['providers'][best]['median_ms']:.2f} {best}"
        lines.append(
            f"{row['key']:{width}}  {ours['median_ms']:9.3f}  "
            f"{ours['rate']:8.1f} {row['unit']:7}  {share:>8}  "
            f"{ours['ratio']:6.2f} +-{ours['noise']:3.0%} {row['anchor']:>6}  {peer}"
        )
    return lines


def best_peer(row: Row) -> str | None:
    """Returns the fastest other provider with the same output as ours, or None."""
    peers = {
        name: figures["median_ms"]
        for name, figures in row["providers"].items()
        if not name.startswith("ours") and name not in NO_PEERS
    }
    return min(peers, key=peers.__getitem__) if peers else None


def _mib(size: int | None) -> str:
    return "        -" if size is None else f"{size / 2**20:7.1f} M"
