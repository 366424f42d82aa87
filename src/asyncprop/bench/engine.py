"""Bench engine: Async LU against what the machine can give, and against what a user would pick instead."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any, TextIO

from asyncprop.bench.contestants import Async, Contestant, Ddp, Kind, Loop
from asyncprop.bench.workloads import Workload, choose
from asyncprop.devices import available_cores
from asyncprop.engine import Coupled, Decoupled
from asyncprop.runs import environment

LEAST_BATCHES = 12
"""Batches per measurement at least: a pipeline finishes batches in bursts, which must not show."""

Seconds = dict[str, list[float]]
"""Seconds per batch of the whole machine, by contestant, one per round."""


def bench_engine(
    names: str | None,
    *,
    rounds: int,
    seconds: float,
    sweep: bool,
    messages: TextIO,
) -> dict[str, Any]:
    """Measure all workloads, one after the other; within one, all contestants in turn, round after round.

    Args:
        names: of the workloads, separated by commas; None for all.
        rounds: how often; medians are taken.
        seconds: length of one measurement.
        sweep: whether other numbers of threads and lanes are measured, too.
        messages: where progress is told.
    """
    workloads = []
    for workload in choose(names):
        print(f"{workload.name} ...", file=messages, flush=True)
        workloads.append(figures(workload, _measure(workload, rounds, seconds, sweep)))
        print(_in_short(workloads[-1]), file=messages, flush=True)
    return {"workloads": workloads, "rounds": rounds, "seconds": seconds, "environment": environment()}


def figures(workload: Workload, measured: Seconds) -> dict[str, Any]:
    """Return a workload's figures: medians over rounds, their ratios, and medians of ratios for small differences."""
    median = {name: statistics.median(values) for name, values in measured.items()}
    best_sync = min(median["sgd_all_threads"], median["ddp"])
    return {
        "name": workload.name,
        "batch_size": workload.batch_size,
        "cores": available_cores(),
        "limit_s": median["limit"],
        "sgd_one_thread_s": median["sgd_one_thread"],
        "sgd_all_threads_s": median["sgd_all_threads"],
        "ddp_s": median["ddp"],
        "async_lu_s": median["async_lu"],
        "efficiency": median["limit"] / median["async_lu"],
        "vs_best_sync": best_sync / median["async_lu"],
        "lockstep_vs_loop": _ratio(measured["lockstep"], measured["sgd_all_threads"]),
        "telemetry_cost": _ratio(measured["async_lu"], measured["no_telemetry"]),
        "sweep": {name: seconds for name, seconds in median.items() if name in SWEEP},
        "rounds": measured,
    }


def _in_short(row: dict[str, Any]) -> str:
    return f"{row['name']}: efficiency {row['efficiency']:.3f}, vs best synchronous {row['vs_best_sync']:.3f}"


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios within rounds, which a drifting machine moves less than either."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


SWEEP: dict[str, Kind] = {
    "1 forward, 1 backward, 2 lanes": Async(Decoupled(1, 1, lanes=2)),
    "1 forward, 2 backward, 2 lanes": Async(Decoupled(1, 2, lanes=2)),
    "1 forward, 2 backward, 3 lanes": Async(Decoupled(1, 2, lanes=3)),
    "2 forward, 2 backward, 3 lanes": Async(Decoupled(2, 2, lanes=3)),
    "2 coupled": Async(Coupled(2)),
}


def contestants(sweep: bool) -> dict[str, tuple[Kind, int]]:
    """Return what is measured by name: what a process does, and how many of them at once."""
    cores = available_cores()
    named: dict[str, tuple[Kind, int]] = {
        "limit": (Loop(1), cores),
        "sgd_one_thread": (Loop(1), 1),
        "sgd_all_threads": (Loop(cores), 1),
        "ddp": (Ddp(), cores),
        "async_lu": (Async(Decoupled()), 1),
        "no_telemetry": (Async(Decoupled(), telemetry=False), 1),
        "lockstep": (Async(Decoupled(), lockstep=True, threads=cores), 1),
    }
    return {**named, **{name: (kind, 1) for name, kind in SWEEP.items() if sweep}}


def _measure(workload: Workload, rounds: int, seconds: float, sweep: bool) -> Seconds:
    measured: Seconds = {}
    with ExitStack() as stack:
        open_ones = {
            name: stack.enter_context(Contestant(kind, workload, ranks))
            for name, (kind, ranks) in contestants(sweep).items()
        }
        first = {name: contestant.measure(LEAST_BATCHES) for name, contestant in open_ones.items()}  # to warm up
        count = max(LEAST_BATCHES, round(seconds / min(first.values())))
        names = list(open_ones)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                ranks = contestants(sweep)[name][1]
                measured.setdefault(name, []).append(open_ones[name].measure(max(LEAST_BATCHES, count // ranks)))
    return measured
