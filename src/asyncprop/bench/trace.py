"""Bench trace: what tracing costs, and what ordering costs that a run can be replayed, against free running."""

from __future__ import annotations

from statistics import median, stdev
from typing import Any, TextIO

from asyncprop.bench.contestants import Async, Contestant, Kind
from asyncprop.bench.workloads import WORKLOADS, Workload, choose
from asyncprop.engine import Decoupled
from asyncprop.runs import environment

NAMES = "resnet18-width8,transformer,mlp"
WORKERS = Decoupled(intraop_threads=1)
KINDS: dict[str, Kind] = {
    "free": Async(WORKERS),
    "traced": Async(WORKERS, traced=True),
    "ordered": Async(WORKERS, traced=True, ordered=True),
}
LEAST_BATCHES = 6
"""Of a measurement."""


def bench_trace(names: str | None, rounds: int, seconds: float, messages: TextIO) -> dict[str, Any]:
    """Time the steady state of each kind in turn, in one process, by many short measurements.

    Each row's ratios are medians of the rounds' ratios to free running; their errors are those of a median.

    Args:
        names: of the workloads, separated by commas.
        rounds: of measuring each kind, in turn.
        seconds: of one measurement.
        messages: where progress is told.
    """
    rows = []
    for workload in choose(names or NAMES, WORKLOADS):
        print(f"{workload.name} ...", file=messages, flush=True)
        rows.append(figures(workload, _measure(workload, rounds, seconds)))
    return {"rows": rows, "rounds": rounds, "seconds": seconds, "environment": environment()}


def figures(workload: Workload, measured: dict[str, list[float]]) -> dict[str, Any]:
    """Return a workload's figures, of the seconds per batch of each kind, one per round."""
    row: dict[str, Any] = {"name": workload.name, "free_s": median(measured["free"])}
    for kind, seconds in measured.items():
        ratios = [ours / free for ours, free in zip(seconds, measured["free"], strict=True)]
        row[f"{kind}_ratio"] = median(ratios)
        row[f"{kind}_error"] = 1.25 * stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
    return {**row, "rounds": measured}


def _measure(workload: Workload, rounds: int, seconds: float) -> dict[str, list[float]]:
    kinds = list(KINDS)
    measured: dict[str, list[float]] = {kind: [] for kind in kinds}
    with Contestant(list(KINDS.values()), workload) as contestant:
        fastest = min(contestant.measure(LEAST_BATCHES, place) for place in range(len(kinds)))  # to warm up, too
        count = max(LEAST_BATCHES, round(seconds / fastest))
        for number in range(rounds):
            for place in range(len(kinds)):
                place = (place + number) % len(kinds)
                measured[kinds[place]].append(contestant.measure(count, place))
    return measured
