"""Bench theory: each formula as printed and corrected, beside counts, simulations, and measurements in real engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from asyncprop.bench.theory.gradients import bias_rows
from asyncprop.bench.theory.lost import lost_rows
from asyncprop.bench.theory.rows import Row
from asyncprop.bench.theory.sde import sde_rows
from asyncprop.bench.theory.speed import speed_rows
from asyncprop.bench.theory.variance import variance_rows
from asyncprop.bench.workloads import set_threads
from asyncprop.runs import environment


def bench_theory(seeds: int, messages: TextIO) -> dict[str, Any]:
    """Evaluate and measure everything; what is measured, once for each of `seeds` seeds."""
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
