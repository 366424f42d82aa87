"""Bench exchange: what gossip costs a step of the ranks of this machine, by the size of its messages."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any, TextIO

from asyncprop.bench.contestants import Async, Contestant, Ddp, Kind
from asyncprop.bench.workloads import Workload, choose
from asyncprop.devices import available_cores
from asyncprop.engine import Decoupled
from asyncprop.runs import environment

BUCKETS = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
WORKLOAD = "resnet18-width16"
OFF, DDP = "off", "ddp"


def bench_exchange(names: str | None, *, ranks: int, rounds: int, seconds: float, messages: TextIO) -> dict[str, Any]:
    """Measure ranks that gossip against ranks that never meet, and against torch's DDP, in turn.

    Args:
        names: of the workloads, separated by commas; None for ResNet-18 of width 16.
        ranks: how many; the cores are shared out over them.
        rounds: how often; medians are taken.
        seconds: length of one measurement.
        messages: where progress is told.
    """
    rows = []
    for workload in choose(names or WORKLOAD):
        print(f"{workload.name} ...", file=messages, flush=True)
        rows += figures(workload, _measure(workload, ranks, rounds, seconds))
    return {"rows": rows, "ranks": ranks, "rounds": rounds, "seconds": seconds, "environment": environment()}


def contestants(ranks: int) -> dict[str, Kind]:
    """Return what each rank does, by name."""
    workers = Decoupled(lanes=max(1, available_cores() // ranks), intraop_threads=1)
    named: dict[str, Kind] = {OFF: Async(workers), DDP: Ddp()}
    return {**named, **{str(size): Async(workers, gossip={"bucket_bytes": size}) for size in BUCKETS}}


def figures(workload: Workload, measured: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each contestant: the median, and the median of its ratios to ranks that never meet."""
    return [
        {
            "name": workload.name,
            "exchange": name,
            "batch_s": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, measured[OFF], strict=True)),
            "rounds": values,
        }
        for name, values in measured.items()
    ]


def _measure(workload: Workload, ranks: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {}
    with ExitStack() as stack:
        open_ones = {
            name: stack.enter_context(Contestant((kind,), workload, ranks)) for name, kind in contestants(ranks).items()
        }
        first = {name: contestant.measure(LEAST_BATCHES) for name, contestant in open_ones.items()}  # to warm up
        count = max(LEAST_BATCHES, round(seconds / min(first.values()) / ranks))
        names = list(open_ones)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                measured.setdefault(name, []).append(open_ones[name].measure(count))
    return {name: measured[name] for name in names}


LEAST_BATCHES = 12
"""Batches of a rank per measurement at least."""
