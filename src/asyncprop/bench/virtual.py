"""Bench virtual: throughput and staleness as virtual time predicts them, beside what this machine does."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from statistics import fmean, median
from time import perf_counter
from typing import Any, TextIO

from asyncprop.bench.workloads import Workload, choose
from asyncprop.devices import available_cores, keep_freed_memory
from asyncprop.engine import Decoupled, Engine
from asyncprop.runs import environment
from asyncprop.simulate import Machine
from asyncprop.simulate.measure import measure_costs
from asyncprop.simulate.predict import predict

WORKERS = (
    Decoupled(2, 2, lanes=2, intraop_threads=1),
    Decoupled(1, 2, lanes=2, intraop_threads=1),
    Decoupled(1, 1, lanes=2, intraop_threads=1),
    Decoupled(1, 2, lanes=3, intraop_threads=1),  # more threads than two cores can run
)
NAMES = "resnet18-width8,transformer,mlp"
PREDICTED = 300
"""Batches of a prediction: passes drift apart and together, and their staleness with them."""


def bench_virtual(names: str | None, rounds: int, batches: int, messages: TextIO) -> dict[str, Any]:
    """Predict each choice of WORKERS from costs measured with all cores busy, and measure it, in turn.

    Staleness is predicted twice: with passes that vary as measured, and with passes that all take equally long.

    Args:
        names: of the workloads, separated by commas.
        rounds: of measuring costs and each choice; medians count.
        batches: of one measurement, at least.
        messages: where progress is told.
    """
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for workload in choose(names or NAMES):
        print(f"{workload.name} ...", file=messages, flush=True)
        rows += _rows(workload, rounds, batches)
    return {"rows": rows, "environment": environment()}


def _rows(workload: Workload, rounds: int, batches: int) -> list[dict[str, Any]]:
    cores = available_cores()
    predicted: list[list[Any]] = [[] for _ in WORKERS]
    equal: list[list[Any]] = [[] for _ in WORKERS]
    variations: list[float] = []
    measured: list[list[tuple[float, float]]] = [[] for _ in WORKERS]
    for number in range(rounds):
        trained = workload.make()
        some = list(islice(workload.batches(), workload.distinct))
        costs = measure_costs(trained.model, trained.optimizer, trained.loss, some, at_once=cores, passes=batches)
        variations.append(costs.variation)
        for place, workers in enumerate(WORKERS):
            varied = predict(costs, workers, [Machine(slots=cores)], batches=PREDICTED, seed=number)
            predicted[place].append(varied)
            equal[place].append(predict(replace(costs, variation=0.0), workers, [Machine(slots=cores)]))
            measured[place].append(_measure(workload, workers, batches))
    return [
        {
            "name": workload.name,
            "forward": workers.forward,
            "backward": workers.backward,
            "lanes": workers.lanes,
            "predicted_s": (seconds := median(one.seconds_per_batch for one in guesses)),
            "measured_s": (real := median(seconds for seconds, _ in seen)),
            "ratio": seconds / real,
            "predicted_staleness": (age := median(one.staleness for one in guesses)),
            "measured_staleness": (real_age := median(age for _, age in seen)),
            "staleness_ratio": age / real_age if real_age else None,
            "variation": median(variations),
            "equal_passes_staleness": (equal_age := median(one.staleness for one in fixed)),
            "equal_passes_staleness_ratio": equal_age / real_age if real_age else None,
        }
        for workers, guesses, fixed, seen in zip(WORKERS, predicted, equal, measured, strict=True)
    ]


def _measure(workload: Workload, workers: Decoupled, least: int) -> tuple[float, float]:
    """Return seconds per batch and mean staleness of the steady state, over whole bursts of lanes."""
    batches = math.ceil(least / (lanes := workers.lanes or 1)) * lanes
    trained = workload.make()
    with Engine(trained.model, trained.optimizer, trained.loss, workers=workers) as engine:
        steps = engine.run(workload.batches())
        for _ in range(batches // 4 + 4):
            next(steps)
        start = perf_counter()
        ages = [next(steps).mean_staleness for _ in range(batches)]
        seconds = perf_counter() - start
        steps.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
    return seconds / batches, fmean(ages)
