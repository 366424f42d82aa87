"""Bench partition: what partial backward passes save, block by block, against a whole one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from asyncprop.bench.workloads import Trained, Workload, choose, set_threads
from asyncprop.devices import CpuDevice
from asyncprop.engine.layers import Layer, find_layers
from asyncprop.engine.partition import cut, measure_backward
from asyncprop.runs import environment

ROUNDS = 9
COUNTS = (2, 4)
"""Numbers of blocks that are measured."""


def bench_partition(names: str | None, messages: TextIO) -> dict[str, Any]:
    """Cut each workload's network into blocks, and time a backward pass of each, on one thread.

    Args:
        names: of the workloads, separated by commas; None for all.
        messages: where progress is told.
    """
    set_threads(1)
    rows = []
    for workload in choose(names):
        print(f"{workload.name} ...", file=messages, flush=True)
        rows += [_row(workload, count) for count in COUNTS]
    return {"rows": rows, "environment": environment()}


def _row(workload: Workload, count: int) -> dict[str, Any]:
    trained, batch = workload.make(), next(workload.batches())
    model = trained.model
    layers = find_layers(model, [name for name, _ in model.named_parameters()])
    times = measure_backward(model, lambda m, b: [trained.loss(m, b)], batch, layers, CpuDevice())
    blocks = cut(times, layers, count)
    wanted = [[layer for layer in layers if layer.name in block] for block in blocks]
    measured: list[list[float]] = [[] for _ in range(count + 1)]
    for _ in range(ROUNDS):
        for place, members in enumerate([list(layers), *wanted]):
            measured[place].append(_backward_s(trained, model, batch, members))
    whole, *parts = (statistics.median(seconds) for seconds in measured)
    return {
        "name": workload.name,
        "blocks": [len(block) for block in blocks],
        "backward_s": whole,
        "block_s": parts,
        "saved": 1 - statistics.fmean(parts) / whole,
    }


def _backward_s(trained: Trained, model: nn.Module, batch: Any, layers: Sequence[Layer]) -> float:
    leaves = dict(model.named_parameters())
    loss: Tensor = trained.loss(model, batch)
    start = time.perf_counter()
    torch.autograd.backward(loss, inputs=[leaves[name] for layer in layers for name in layer.parameters])
    seconds = time.perf_counter() - start
    trained.optimizer.zero_grad()
    return seconds
