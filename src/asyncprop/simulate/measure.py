"""Measure: what each layer costs on this machine, from the trace of passes that are timed layer by layer."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncprop.engine import Coupled, Engine, Turn
from asyncprop.engine.passes import LossFn
from asyncprop.recorder import Recorder
from asyncprop.simulate.costs import LayerCosts
from asyncprop.trace import Event, Trace

KEPT = 0.8
"""Share of the passes that count: the slowest were held up by something else."""
MOST_VARIATION = 0.99
"""That is noted, see `LayerCosts`."""


def measure_costs(
    model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, batches: Sequence[Any], *, at_once: int, passes: int
) -> LayerCosts:
    """Train a copy of the model on one core per pass, `at_once` passes at a time, and return what its layers took.

    Args:
        model, optimizer, loss_fn: as for `asyncprop.Engine`; neither is changed.
        batches: used again and again.
        at_once: how many passes share the machine: one alone is faster than one beside others.
        passes: that are timed, after a quarter as many that are not.
    """
    with torch.random.fork_rng():
        own = copy.deepcopy(model)
        steps = optimizer_like(optimizer, model, own)
        recorder, warm = Recorder(), passes // 4 + at_once
        workers = Coupled(at_once, intraop_threads=1)
        with Engine(own, steps, loss_fn, workers=workers, turn=Turn(), trace=recorder) as engine:
            for _ in engine.run(batches[number % len(batches)] for number in range(passes + warm)):
                pass
    return costs_of(recorder.trace(), first=warm)


def costs_of(trace: Trace, first: int = 0) -> LayerCosts:
    """Return the mean costs of the layers over the traced passes of batches from `first` on, and how passes vary.

    The slowest passes do not count for the means. They do for the variation.

    A layer's forward pass lasts until the next layer is read; its backward pass from the end of the step before to
    its gradient. What lies between a thread's passes belongs to the first layer that the next one reads.
    """
    by_batch: dict[int, list[Event]] = defaultdict(list)
    for event in trace.events:
        if event.batch >= first:
            by_batch[event.batch].append(event)
    idle = _between_passes(trace, first)
    passes = sorted((_one_pass(events, idle, len(trace.layers)) for events in by_batch.values()), key=_total)
    kept = passes[: max(1, round(KEPT * len(passes)))]
    means = [[fmean(costs) for costs in zip(*kind, strict=True)] for kind in zip(*kept, strict=True)]
    forward, backward, update = (tuple(kind) for kind in means)
    wholes = [_total(costs) for costs in passes]
    variation = stdev(wholes) / fmean(wholes) if len(wholes) > 1 else 0.0
    return LayerCosts(forward, backward, update, (0.0,) * len(forward), min(variation, MOST_VARIATION))


def _one_pass(events: list[Event], idle_s: float, layers: int) -> tuple[list[float], list[float], list[float]]:
    forward, backward, update = ([0.0] * layers for _ in range(3))
    whole = {event.kind: event for event in events if event.kind in ("forward", "backward")}
    reads = [event for event in events if event.kind == "read" and not event.detail]
    ends = [event.start_s for event in reads[1:]] + [whole["forward"].end_s]
    starts = [whole["forward"].start_s - idle_s] + [event.start_s for event in reads[1:]]
    for event, start, end in zip(reads, starts, ends, strict=True):
        forward[event.layer] = end - start
    last, latest = whole["backward"].start_s, -1
    for event in events:
        if event.kind == "ready":
            backward[event.layer] += event.start_s - last
            last = event.start_s
        elif event.kind == "write":
            update[event.layer] += event.end_s - last
            last, latest = event.end_s, event.layer
    if latest >= 0:
        update[latest] += whole["backward"].end_s - last
    return forward, backward, update


def _between_passes(trace: Trace, first: int) -> float:
    """Return the mean time between a pass and the next on its thread, without the longest."""
    gaps: list[float] = []
    ended: dict[int, float] = {}
    for event in trace.events:
        if event.kind == "forward" and event.batch > first and event.thread in ended:
            gaps.append(event.start_s - ended[event.thread])
        elif event.kind == "backward":
            ended[event.thread] = event.end_s
    return fmean(sorted(gaps)[: max(1, round(KEPT * len(gaps)))]) if gaps else 0.0


def _total(costs: tuple[list[float], ...]) -> float:
    return sum(map(sum, costs))


def optimizer_like(optimizer: Optimizer, model: nn.Module, own: nn.Module) -> Optimizer:
    """Return a copy of the optimizer that steps the copied model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    memo = {id(parameter): own.get_parameter(names[id(parameter)]) for parameter in model.parameters()}
    return copy.deepcopy(optimizer, memo)
