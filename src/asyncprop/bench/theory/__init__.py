"""Bench theory: each formula as printed and corrected, beside counts, simulations, and measurements in real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from asyncprop.bench.theory.gradients import bias_rows
from asyncprop.bench.theory.lost import lost_rows
from asyncprop.bench.theory.rows import Row
from asyncprop.bench.theory.sde import sde_rows
from asyncprop.bench.theory.speed import speed_rows
from asyncprop.bench.theory.variance import variance_rows
from asyncprop.bench.workloads import set_threads
from asyncprop.report.theory import print_theory, theory_markdown
from asyncprop.runs import environment, write_json


def bench_theory(
    seeds: int, out: TextIO, messages: TextIO, *, json: Path | None = None, markdown: Path | None = None
) -> None:
    """Evaluate and measure everything, print it to `out`, and write it to the files that are given.

    Args:
        seeds: how often what is measured is measured, with seeds 0, 1, ...
        out, messages: for the tables, and for progress.
        json, markdown: files to write.
    """
    figures = all_figures(seeds, messages)
    print_theory(figures, out)
    if json:
        write_json(json, figures)
    if markdown:
        markdown.write_text(theory_markdown(figures), encoding="utf-8")


def all_figures(seeds: int, messages: TextIO) -> dict[str, Any]:
    """Return the rows, as dictionaries, and where they come from."""
    set_threads(1)
    rows: list[Row] = []
    parts: tuple[tuple[str, Callable[[], list[Row]]], ...] = (
        ("speed-up and staleness", lambda: speed_rows(seeds)),
        ("stochastic differential equation", sde_rows),
        ("variance of parameters", lambda: variance_rows(seeds, messages)),
        ("bias of gradients", lambda: bias_rows(seeds)),
        ("lost updates", lambda: lost_rows(seeds)),
    )
    for name, part in parts:
        print(f"{name} ...", file=messages, flush=True)
        rows += part()
    return {"seeds": seeds, "rows": [row.to_json() for row in rows], "environment": environment()}
