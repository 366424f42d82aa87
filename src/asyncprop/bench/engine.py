"""Bench engine: Async LU against what the machine can give, and against what a user would pick instead."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO

from asyncprop.bench.contestants import Async, Contestant, Ddp, Kind, Loop
from asyncprop.bench.nearness import Nearness
from asyncprop.bench.workloads import Workload, choose
from asyncprop.devices import available_cores
from asyncprop.engine import Coupled, Decoupled
from asyncprop.runs import environment

LEAST_BATCHES = 12
"""Batches per measurement at least: a pipeline finishes batches in bursts, which must not show."""

NEAR = 1.3
"""Cores count as near while handing over takes at most so many times what it took at best."""

Seconds = dict[str, list[float]]
"""Seconds per batch of the whole machine, by contestant, one per measurement."""


@dataclass(frozen=True)
class Measured:
    """What all contestants took, and how near the cores were meanwhile.

    Attributes:
        seconds: per batch of the whole machine.
        handover_ns: the slower of the hand-overs just before and just after each measurement; empty on one core.
    """

    seconds: Seconds
    handover_ns: dict[str, list[float]]

    def add(self, name: str, seconds: float, handovers_ns: list[float]) -> None:
        """Add a measurement of a contestant."""
        self.seconds.setdefault(name, []).append(seconds)
        if handovers_ns:
            self.handover_ns.setdefault(name, []).append(max(handovers_ns))

    def near(self, name: str, *, is_near: bool) -> list[float]:
        """Return a contestant's seconds that were measured while cores were near, or those while they were not."""
        if not self.handover_ns:
            return []
        limit = NEAR * min(map(min, self.handover_ns.values()))
        pairs = zip(self.seconds[name], self.handover_ns[name], strict=True)
        return [seconds for seconds, handover in pairs if (handover <= limit) == is_near]


def bench_engine(
    names: str | None,
    *,
    processes: int,
    rounds: int,
    seconds: float,
    sweep: bool,
    messages: TextIO,
) -> dict[str, Any]:
    """Measure all workloads, one after the other; within one, all contestants in turn, round after round.

    Args:
        names: of the workloads, separated by commas; None for all.
        processes: how often every contestant is started anew: processes of one kind differ, by where their memory
            happens to lie, which more rounds in the same processes would not average out.
        rounds: how often all of them are measured each time; medians over everything are taken.
        seconds: length of one measurement.
        sweep: whether other numbers of threads and lanes are measured, too.
        messages: where progress is told.
    """
    workloads = []
    for workload in choose(names):
        print(f"{workload.name} ...", file=messages, flush=True)
        workloads.append(figures(workload, measure(workload, entries(sweep), processes, rounds, seconds)))
        print(_in_short(workloads[-1]), file=messages, flush=True)
    options = {"processes": processes, "rounds": rounds, "seconds": seconds}
    return {"workloads": workloads, **options, "environment": environment()}


def figures(workload: Workload, made: Measured) -> dict[str, Any]:
    """Return a workload's figures: medians over rounds, their ratios, and medians of ratios for small differences."""
    measured = made.seconds
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
        "lockstep_vs_loop": _ratio(measured["lockstep"], measured["loop"]),
        "telemetry_cost": _ratio(measured["telemetry"], measured["no_telemetry"]),
        "sweep": {name: seconds for name, seconds in median.items() if name in SWEEP},
        "efficiency_near": _efficiency(made, is_near=True),
        "efficiency_far": _efficiency(made, is_near=False),
        "handover_ns": statistics.median(chain(*made.handover_ns.values())) if made.handover_ns else None,
        "rounds": measured,
        "rounds_handover_ns": made.handover_ns,
    }


def _efficiency(made: Measured, *, is_near: bool) -> float | None:
    """Return the efficiency of what was measured while cores were near, or were not; None where there is nothing."""
    limit, ours = (made.near(name, is_near=is_near) for name in ("limit", "async_lu"))
    return statistics.median(limit) / statistics.median(ours) if limit and ours else None


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
PAIR_SLICES = 2
"""Measurements of each half of a pair in a round, in turn: what is small is told by many short ones."""
LEAST_IN_SLICE = 6
"""Batches of such a measurement at least."""


@dataclass(frozen=True)
class Entry:
    """What is measured: kinds, by name, that share their processes, and how many processes at once."""

    kinds: dict[str, Kind]
    ranks: int = 1


def entries(sweep: bool) -> list[Entry]:
    """Return what is measured, in turn."""
    cores = available_cores()
    alone: dict[str, Kind] = {
        "sgd_one_thread": Loop(1),
        "sgd_all_threads": Loop(cores),
        "async_lu": Async(Decoupled()),
        **(SWEEP if sweep else {}),
    }
    return [
        Entry({"limit": Loop(1)}, cores),
        Entry({"ddp": Ddp()}, cores),
        *(Entry({name: kind}) for name, kind in alone.items()),
        Entry({"loop": Loop(cores), "lockstep": Async(Decoupled(), lockstep=True, threads=cores)}),
        Entry({"telemetry": Async(Decoupled()), "no_telemetry": Async(Decoupled(), telemetry=False)}),
    ]


def measure(workload: Workload, all_entries: list[Entry], processes: int, rounds: int, seconds: float) -> Measured:
    """Start all entries' processes, measure them in turn `rounds` times, end them; and that `processes` times."""
    measured = Measured({}, {})
    for _ in range(processes):
        with ExitStack() as stack:
            nearness = stack.enter_context(Nearness())
            pairs = [
                (entry, stack.enter_context(Contestant(tuple(entry.kinds.values()), workload, entry.ranks)))
                for entry in all_entries
            ]
            fastest = min(
                contestant.measure(LEAST_BATCHES, which)  # to warm up, too
                for entry, contestant in pairs
                for which in range(len(entry.kinds))
            )
            count = max(LEAST_BATCHES, round(seconds / fastest))
            for turn in range(rounds):
                for entry, contestant in pairs[turn % len(pairs) :] + pairs[: turn % len(pairs)]:
                    _measure_entry(entry, contestant, count, measured, nearness)
    return measured


def _measure_entry(entry: Entry, contestant: Contestant, count: int, measured: Measured, nearness: Nearness) -> None:
    """Measure an entry's kinds on `count` batches of the whole machine each, and add what they took to `measured`."""
    slices, least = (PAIR_SLICES, LEAST_IN_SLICE) if len(entry.kinds) > 1 else (1, LEAST_BATCHES)
    batches = max(least, count // (entry.ranks * slices))
    for _ in range(slices):
        for which, name in enumerate(entry.kinds):
            before = nearness.handover_ns()
            seconds = contestant.measure(batches, which)
            measured.add(name, seconds, [ns for ns in (before, nearness.handover_ns()) if ns is not None])
