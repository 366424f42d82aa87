"""Plans: what was advised beside what was best, for a terminal and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from asyncprop.report.tables import Columns, cells, markdown_table, print_table, provenance

ADVICE: Columns = {
    "workload": lambda row: str(row["name"]),
    "advised": lambda row: _advised(row["advice"]),
    "ms": lambda row: f"{1e3 * row['advised_s']:.2f}",
    "planned": lambda row: f"{1e3 * row['planned_s']:.2f}",
    "best": lambda row: str(row["best"]),
    "best ms": lambda row: f"{1e3 * row['best_s']:.2f}",
    "advised / best": lambda row: f"{row['ratio']:.3f}",
    "worst plan": lambda row: f"{row['worst_ratio']:.3f}",
}
CHOICES: Columns = {
    "choice": lambda row: str(row["choice"]),
    "planned (ms)": lambda row: f"{1e3 * row['planned_s']:.2f}",
    "measured (ms)": lambda row: f"{1e3 * row['measured_s']:.2f}",
    "planned / measured": lambda row: f"{row['planned_s'] / row['measured_s']:.3f}",
    "staleness": lambda row: f"{row['staleness']:.2f}",
}
PLANNED = "planned: what the plan says: tried where it was tried, else predicted"


def print_plans(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the figures of `bench plan`."""
    for row in figures["rows"]:
        print(row["name"], file=stream)
        print_table(stream, list(CHOICES), cells(CHOICES, row["choices"]), numbers_from=1)
    print(f"ms per batch of the whole machine, medians; {PLANNED}", file=stream)
    print_table(stream, list(ADVICE), cells(ADVICE, figures["rows"]))


def plans_markdown(figures: dict[str, Any]) -> str:
    """Return the figures of `bench plan` in Markdown."""
    rows = figures["rows"]
    parts = [
        "# What a plan advises beside the best of what it considers\n\nms per batch of the whole machine, medians over "
        f"rounds in turn; the ratio is the median plan's, and a plan's that of all rounds; {PLANNED}\n",
        markdown_table(list(ADVICE), cells(ADVICE, rows)),
    ]
    for row in rows:
        parts.append(f"## {row['name']}\n\n{markdown_table(list(CHOICES), cells(CHOICES, row['choices']))}")
        parts.append(f"{provenance(row['environment'])}\n")
    return "\n".join(parts)


def _advised(advice: Sequence[dict[str, Any]]) -> str:
    """Return what was advised; how often, if plans differ."""
    counts = Counter(one["choice"] for one in advice)
    if len(counts) == 1:
        return str(advice[0]["choice"])
    return "; ".join(f"{choice} ({count} of {len(advice)})" for choice, count in counts.most_common())
