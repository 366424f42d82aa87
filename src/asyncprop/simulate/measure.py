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

from asyncprop.engine import Coupled, Engine, LayerUpdate, Turn
from asyncprop.engine.passes import LossFn
from asyncprop.engine.update import Update
from asyncprop.recorder import Recorder
from asyncprop.simulate.costs import LayerCosts
from asyncprop.trace import Event, Trace

KEPT = 0.8
"""Share of the passes that count: the slowest were held up by something else."""
MOST_VARIATION = 0.99
"""That is noted, see `LayerCosts`."""


def measure_costs(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    at_once: int,
    passes: int,
    update: Update | None = None,
    intraop_threads: int = 1,
) -> LayerCosts:
    """Train a copy of the model, `at_once` passes at a time and at learning rate 0; return what its layers took.

    Args:
        model, optimizer, loss_fn: as for `asyncprop.Engine`; neither is changed.
        batches: used again and again.
        at_once: how many passes share the machine: one alone is faster than one beside others.
        passes: that are timed, after a quarter as many that are not.
        update: of the engine; layer updates by default.
        intraop_threads: that one operation of a pass may use.
    """
    with torch.random.fork_rng():
        own = copy.deepcopy(model)
        steps = optimizer_like(optimizer, model, own)
        recorder, warm = Recorder(), passes // 4 + at_once
        workers = Coupled(at_once, intraop_threads=intraop_threads)
        options: Any = {"workers": workers, "update": update or LayerUpdate(), "turn": Turn(), "trace": recorder}
        with Engine(own, steps, loss_fn, **options) as engine:
            for _ in engine.run(batches[number % len(batches)] for number in range(passes + warm)):
                pass
    return costs_of(recorder.trace(), first=warm)


def costs_of(trace: Trace, first: int = 0) -> LayerCosts:
    """Return the mean costs of the layers over the traced passes of batches from `first` on, and how passes vary.

    The slowest passes do not count for the means. They do for the variation.

    A layer's forward pass lasts until the next layer is read; its backward pass from the end of the step before to
    its gradient. What lies between a thread's passes belongs to the first layer that the next one reads. Of a pass that
    calls no layer's module all layers share the forward pass equally.
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
    transfer = (0.0,) * len(forward)
    return LayerCosts(forward, backward, update, transfer, min(variation, MOST_VARIATION), launch_s=idle)


def _one_pass(events: list[Event], idle_s: float, layers: int) -> tuple[list[float], list[float], list[float]]:
    backward, update = [0.0] * layers, [0.0] * layers
    whole = {event.kind: event for event in events if event.kind in ("forward", "backward")}
    reads = [event for event in events if event.kind == "read" and not event.detail]
    forward = _forward(whole["forward"].start_s - idle_s, reads, whole["forward"].end_s, layers)
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


def _forward(start_s: float, reads: list[Event], end_s: float, layers: int) -> list[float]:
    if not reads:  # no module of a layer was called
        return [(end_s - start_s) / layers] * layers
    forward = [0.0] * layers
    later = [event.start_s for event in reads[1:]]
    for event, start, end in zip(reads, [start_s, *later], [*later, end_s], strict=True):
        forward[event.layer] = end - start
    return forward


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
    """Return a copy of the optimizer that steps the copied model, at rest."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    memo = {id(parameter): own.get_parameter(names[id(parameter)]) for parameter in model.parameters()}
    return at_rest(copy.deepcopy(optimizer, memo))


def at_rest(optimizer: Optimizer) -> Optimizer:
    """Let its steps cost what they cost and change nothing: thousands on the same few batches might diverge."""
    for group in optimizer.param_groups:
        if group.get("lr") is not None:
            group["lr"] = 0 * group["lr"]  # a number, or a tensor where it was one
    return optimizer
