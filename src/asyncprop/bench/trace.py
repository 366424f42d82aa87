"""Bench trace: what tracing costs, and what ordering costs that a run can be replayed, against free running."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, TextIO

from asyncprop.bench.workloads import Workload, choose
from asyncprop.devices import keep_freed_memory
from asyncprop.engine import Decoupled, Engine
from asyncprop.recorder import Recorder
from asyncprop.replay import Ordered
from asyncprop.runs import environment

NAMES = "resnet18-width8,transformer,mlp"
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "free": dict,
    "traced": lambda: {"trace": Recorder()},
    "ordered": lambda: {"trace": Recorder(), "turn": Ordered()},
}


def bench_trace(names: str | None, rounds: int, batches: int, messages: TextIO) -> dict[str, Any]:
    """Time the steady state of each kind in turn; each row's ratios are medians of the rounds' ratios to free running.

    Args:
        names: of the workloads, separated by commas.
        rounds: of measuring each kind, in turn.
        batches: of one measurement.
        messages: where progress is told.
    """
    keep_freed_memory()
    rows = []
    for workload in choose(names or NAMES):
        print(f"{workload.name} ...", file=messages, flush=True)
        took = [{kind: _seconds(workload, KINDS[kind](), batches) for kind in _turned(turn)} for turn in range(rounds)]
        free = median(seconds["free"] for seconds in took)
        ratios = {f"{kind}_ratio": median(seconds[kind] / seconds["free"] for seconds in took) for kind in KINDS}
        rows.append({"name": workload.name, "free_s": free, **ratios})
    return {"rows": rows, "environment": environment()}


def _turned(turn: int) -> list[str]:
    kinds = list(KINDS)
    first = turn % len(kinds)
    return kinds[first:] + kinds[:first]


def _seconds(workload: Workload, options: dict[str, Any], batches: int) -> float:
    """Return the seconds of one batch in the steady state."""
    trained = workload.make()
    workers = Decoupled(intraop_threads=1)
    with Engine(trained.model, trained.optimizer, trained.loss, workers=workers, **options) as engine:
        steps = engine.run(workload.batches())
        for _ in range(batches // 4 + 4):
            next(steps)
        start = perf_counter()
        for _ in range(batches):
            next(steps)
        seconds = perf_counter() - start
        steps.close()  # type: ignore[attr-defined]
    return seconds / batches
