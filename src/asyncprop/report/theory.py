"""Theory: its rows as tables, for a terminal and as Markdown."""

from __future__ import annotations

from itertools import groupby
from typing import Any, TextIO

from asyncprop.report.tables import Columns, Row, markdown_table, print_table, provenance

COLUMNS: Columns = {
    "quantity": lambda row: str(row["quantity"]),
    "case": lambda row: str(row["case"]),
    "source": lambda row: str(row["equation"]),
    "as printed": lambda row: _with_error(row["as_printed"], row["error_as_printed"]),
    "corrected": lambda row: _with_error(row["corrected"], row["error_corrected"]),
    "counted, simulated or exact": lambda row: _twin(row),
    "measured": lambda row: _measured(row),
}


def print_theory(figures: dict[str, Any], stream: TextIO) -> None:
    """Print the rows of `asyncprop theory`, a table for each section."""
    print(title(figures), file=stream)
    for section, rows in _sections(figures):
        print(f"\n{section}", file=stream)
        print_table(stream, list(COLUMNS), [_cells(row) for row in rows], numbers_from=3)


def theory_markdown(figures: dict[str, Any]) -> str:
    """Return them in Markdown, with how they were made."""
    parts = [f"# {title(figures)}\n"]
    for section, rows in _sections(figures):
        parts.append(
            f"## {section[0].upper()}{section[1:]}\n\n{markdown_table(list(COLUMNS), [_cells(r) for r in rows])}"
        )
    parts.append(provenance(figures["environment"]) + "\n")
    return "\n".join(parts)


def title(figures: dict[str, Any]) -> str:
    """Return what the numbers are, in one line."""
    return (
        f"The paper's formulas; measured: mean ± sample standard deviation, n = {figures['seeds']}, seeds from 0 on; "
        "in brackets: by how much a formula is off what was measured, or else counted"
    )


def _sections(figures: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    return [(str(name), list(rows)) for name, rows in groupby(figures["rows"], key=lambda row: row["section"])]


def _cells(row: Row) -> list[str]:
    return [cell(row) for cell in COLUMNS.values()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) if error is None else f"{_number(value)} ({error:+.1%})"


def _twin(row: Row) -> str:
    if row["twin"] is None:
        return ""
    error = "" if row["error_twin"] is None else f" ({row['error_twin']:+.1%})"
    return f"{_number(row['twin'])}{error}: {row['twin_is']}"


def _measured(row: Row) -> str:
    if row["measured_mean"] is None:
        return ""
    std = "" if row["measured_std"] is None else f" ± {row['measured_std']:.2g}"
    return f"{_number(row['measured_mean'])}{std}"
