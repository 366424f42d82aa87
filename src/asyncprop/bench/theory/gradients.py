"""Gradients: how far asynchronous ones are from sequential ones in real training, beside the bound."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev

from asyncprop.bench.theory.network import find_place, flat_loss, penalised
from asyncprop.bench.theory.quadratic import PASS_S, Regression, half_square
from asyncprop.bench.theory.rows import Row, mean_of
from asyncprop.bench.workloads import LEARNING_RATE, WORKLOADS
from asyncprop.delay import Delay
from asyncprop.engine import Coupled, Engine
from asyncprop.tasks import Batches, get_task
from asyncprop.theory import Comparison, Probe, bias_bound
from asyncprop.theory.bias import Sample

WORKERS = 4
EVERY = 20
NEVER = 10**9
UPDATES = 1000
EPOCHS = 12
COSTLY, COSTLY_BATCHES = "resnet18-width8", 60
LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Watched:
    """A training that was watched: samples with their comparisons, the largest staleness, and seconds."""

    samples: list[Sample]
    comparisons: list[Comparison]
    oldest: int
    seconds: float


def watch(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    learning_rate: float,
    *,
    workers: int,
    wait_s: float,
    every: int,
) -> Watched:
    """Train by layer updates with SGD, and compare gradients with fresh ones as training goes on."""
    probe = Probe(model, loss_fn, every=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    waits = [Delay(worker=worker, seconds=wait_s) for worker in range(workers)] if wait_s else []
    watched, oldest = [], 0
    crew = Coupled(workers, intraop_threads=1)
    start = time.perf_counter()
    with Engine(model, optimizer, probe.loss_fn, workers=crew, delays=waits) as engine:
        for step in engine.run(batches):
            oldest = max(oldest, *step.staleness)
            watched += [(sample, probe.measure(sample)) for sample in probe.collect()]
    watched += [(sample, probe.measure(sample)) for sample in probe.collect(drained=True)]
    seconds = time.perf_counter() - start
    return Watched([sample for sample, _ in watched], [comparison for _, comparison in watched], oldest, seconds)


def bias_rows(seeds: int) -> list[Row]:
    """Return all rows of the gradient's bias."""
    return [*_regression_bias(seeds), *_network_bias(seeds), *_digits_bias(seeds), *_cost(seeds)]


def _regression_bias(seeds: int) -> Iterator[Row]:
    for learning_rate in (0.01, 0.05):
        task = Regression(1.0, 64)
        runs = [
            watch(
                task.model(),
                half_square,
                task.batches(UPDATES, seed),
                learning_rate,
                workers=WORKERS,
                wait_s=PASS_S,
                every=EVERY,
            )
            for seed in range(seeds)
        ]
        smoothness = [max(_regression_smoothness(sample) for sample in run.samples) for run in runs]
        yield from _bias_of(f"linear regression, η = {learning_rate}", runs, smoothness, learning_rate)


def _network_bias(seeds: int) -> Iterator[Row]:
    place, learning_rate = find_place(), 0.01
    runs = [
        watch(
            place.model(),
            penalised,
            place.batches(UPDATES, 64, seed),
            learning_rate,
            workers=WORKERS,
            wait_s=PASS_S,
            every=EVERY,
        )
        for seed in range(seeds)
    ]
    smoothness = [max(_network_smoothness(sample) for sample in run.samples) for run in runs]
    yield from _bias_of(f"small network, η = {learning_rate}", runs, smoothness, learning_rate)


def _digits_bias(seeds: int) -> Iterator[Row]:
    """Yield the cosine on a real task, in the first and in the last third; its smoothness is unknown, so no bound."""
    learning_rate = 0.05
    task = get_task("digits")
    train = task.load().train
    runs = []
    for seed in range(seeds):
        batches = [batch for epoch in range(EPOCHS) for batch in Batches(train, 32, seed=seed, epoch=epoch)]
        model = task.build(seed=seed)
        runs.append(watch(model, task.loss, batches, learning_rate, workers=WORKERS, wait_s=PASS_S, every=EVERY))
    case = f"digits, η = {learning_rate}, {WORKERS} workers, {EPOCHS} epochs, τ_max = {max(run.oldest for run in runs)}"
    for name, part in (("first", 0), ("last", 2)):
        thirds = [run.comparisons[part * len(run.comparisons) // 3 :][: len(run.comparisons) // 3] for run in runs]
        for quantity, value in (("cosine", _cosine), ("norm ratio", _norm_ratio)):
            values = tuple(mean_of([value(comparison) for comparison in third]) for third in thirds)
            yield Row("gradient bias", f"{quantity}, applied and fresh, {name} third", case, "Sec. 5", measured=values)


def _cost(seeds: int) -> Iterator[Row]:
    """Yield how much longer training takes with the probe, where passes compute and the cores are busy."""
    workload, ratios = WORKLOADS[COSTLY], []
    for seed in range(seeds):
        seconds = []
        for every in (EVERY, NEVER):
            trained, batches = workload.make(seed), workload.batches()
            some = [next(batches) for _ in range(COSTLY_BATCHES)]
            run = watch(trained.model, trained.loss, some, LEARNING_RATE, workers=2, wait_s=0.0, every=every)
            seconds.append(run.seconds)
        ratios.append(seconds[0] / seconds[1])
    yield Row(
        section="gradient bias",
        quantity="time with the probe / without",
        case=f"{COSTLY}, 2 workers, each {EVERY}th pass watched",
        equation="1 + 1/every",
        corrected=1 + 1 / EVERY,
        measured=tuple(ratios),
    )


def _bias_of(case: str, runs: Sequence[Watched], smoothness: Sequence[float], learning_rate: float) -> Iterator[Row]:
    oldest, largest = max(run.oldest for run in runs), max(smoothness)
    norm = max(comparison.fresh_norm for run in runs for comparison in run.comparisons)
    case = f"{case}, {WORKERS} workers, α = {largest:.2f}, τ_max = {oldest}, G = {norm:.3g}"
    bound = bias_bound(norm, largest, learning_rate, oldest)
    yield Row(
        section="gradient bias",
        quantity="largest bias ‖b‖, and its bound",
        case=case if math.isfinite(bound) else f"{case}: αητ_max >= 1, no bound",
        equation="later version",
        as_printed=bound if math.isfinite(bound) else None,
        measured=tuple(max(comparison.bias for comparison in run.comparisons) for run in runs),
    )
    for quantity, value in (("cosine", _cosine), ("norm ratio", _norm_ratio)):
        values = tuple(mean_of([value(comparison) for comparison in run.comparisons]) for run in runs)
        yield Row("gradient bias", f"{quantity}, applied and fresh", case, "later version", measured=values)


def _cosine(comparison: Comparison) -> float:
    return comparison.cosine


def _norm_ratio(comparison: Comparison) -> float:
    return comparison.norm_ratio


def _regression_smoothness(sample: Sample) -> float:
    x = sample.batch[0]
    return float(torch.linalg.matrix_norm(x.T @ x / len(x), ord=2))


def _network_smoothness(sample: Sample) -> float:
    """Return the largest curvature of the batch's loss where the sample's backward pass began."""
    theta = torch.cat([value.flatten() for value in sample.parameters.values()])
    return float(torch.linalg.matrix_norm(jacrev(grad(flat_loss(sample.parameters)))(theta, *sample.batch), ord=2))
